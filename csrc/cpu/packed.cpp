#include "cpu/packed.h"

#include <cstring>

namespace sparse_attn {
namespace {

// Queries in a row that see keys of [start, start + keys) alone, which those before and behind them do not
// see.
struct Run {
    int64_t b, first, count, start, keys;
};

struct Pack {
    std::vector<Run> few, many;  // those that decode, and those that are tiles of queries
    std::vector<int64_t> starts,
        offsets;  // [B, Tq]: the rule's, counted from the run's own first query and key
};

// Sequences of fewer keys are worth no task of their own, unless there are others that are.
constexpr int64_t kOwnTask = 32;
// Scores, or places for the best of them, that are stored at once.
constexpr int64_t kStored = int64_t{1} << 23;

// As key_range() in the kernels.
cpu::Range keys_of(const SelectParams& p, int64_t b, int64_t query) {
    int64_t end = p.rule.lengths ? p.rule.lengths[b] : p.key_length;
    if (p.rule.is_causal) end = std::clamp<int64_t>(p.rule.last_key(b, query) + 1, 0, end);
    const int64_t begin = p.rule.starts.given() ? p.rule.starts.at(b, query) : 0;
    return {std::clamp<int64_t>(begin, 0, end), end};
}

std::vector<Run> runs_of(const SelectParams& p) {
    std::vector<Run> runs;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t i = 0; i < p.query_length; ++i) {
            const cpu::Range own = keys_of(p, b, i);
            const int64_t keys = own.end - own.begin;
            Run* run = i == 0 ? nullptr : &runs.back();
            const bool joins = run && (keys == 0 || run->keys == 0
                                           ? keys == run->keys
                                           : own.begin < run->start + run->keys && run->start < own.end);
            if (!joins) {
                runs.push_back({b, i, 1, own.begin, keys});
                continue;
            }
            const int64_t end = std::max(run->start + run->keys, own.end);
            run->start = keys == 0 ? run->start : std::min(run->start, own.begin);
            run->keys = keys == 0 ? 0 : end - run->start;
            ++run->count;
        }
    return runs;
}

int64_t stored_of(const SelectParams& p, const Run& r) {
    return p.heads * r.count * (p.rule.groups == p.heads ? std::min(p.top_k, r.keys) : r.keys);
}

Pack pack_of(const SelectParams& p) {
    Pack pack;
    const std::vector<Run> runs = runs_of(p);
    const auto decodes = [&](const Run& r) {
        return r.count <= kDecodeQueries && stored_of(p, r) <= kDecodeScores &&
               (p.key_strides.d == 1 || p.head_dim <= 1);
    };
    const bool any =
        p.query_length <= kDecodeQueries ||
        std::any_of(runs.begin(), runs.end(), [&](const Run& r) { return decodes(r) && r.keys >= kOwnTask; });
    pack.starts.resize(static_cast<size_t>(p.batch * p.query_length));
    pack.offsets.resize(pack.starts.size());
    for (const Run& r : runs) {
        (any && decodes(r) ? pack.few : pack.many).push_back(r);
        for (int64_t i = 0; i < r.count; ++i) {
            const size_t at = static_cast<size_t>(r.b * p.query_length + r.first + i);
            pack.starts[at] = keys_of(p, r.b, r.first + i).begin - r.start;
            pack.offsets[at] = p.rule.is_causal ? p.rule.last_key(r.b, r.first + i) - r.start - i : 0;
        }
    }
    return pack;
}

// One run as a call of its own.
DecodeParams call_of(const SelectParams& p, const Pack& pack, const Run& r, const KeyPages& pages,
                     const KeyIndexParams& index) {
    DecodeParams d = decode_params(p, index);
    SelectParams& own = d.select;
    const Strides &q = p.query_strides, &k = p.key_strides, &m = p.rule.mask_strides;
    const int64_t size = bytes_of(p.dtype), at = r.b * p.query_length + r.first;
    own.batch = 1, own.query_length = r.count, own.key_length = r.keys;
    own.query = static_cast<const char*>(p.query) + (r.b * q.b + r.first * q.t) * size;
    own.indices = p.indices + (r.b * p.rule.groups * p.query_length + r.first) * p.top_k;
    own.rule.lengths = nullptr;
    own.rule.starts = {nullptr, pack.starts.data() + at, 0, 1};
    if (p.rule.is_causal) own.rule.offsets = {nullptr, pack.offsets.data() + at, 0, 1};
    if (p.rule.mask) own.rule.mask = p.rule.mask + r.b * m.b + r.first * m.t + r.start * m.d;
    d.pages = pages;
    d.pages.first = r.start;
    if (!pages.table) own.key = static_cast<const char*>(p.key) + (r.b * k.b + r.start * k.t) * size;
    return d;
}

void add_to_row(const SelectParams& p, int64_t b, int64_t group, int64_t query, int64_t number) {
    if (number == 0) return;
    int32_t* row = p.indices + ((b * p.rule.groups + group) * p.query_length + query) * p.top_k;
    for (int64_t i = 0; i < p.top_k && row[i] >= 0; ++i) row[i] += static_cast<int32_t>(number);
}

void decode_runs(const SelectParams& p, const Pack& pack, const KeyPages& pages, int64_t scratch_bytes,
                 const RowsDone& then, const KeyIndexParams& index = {}) {
    std::vector<DecodeParams> calls;
    for (size_t next = 0; next < pack.few.size();) {
        const size_t first = next;
        calls.clear();
        for (int64_t stored = 0; next < pack.few.size(); ++next) {
            stored += stored_of(p, pack.few[next]);
            if (next > first && stored > kStored) break;
            calls.push_back(call_of(p, pack, pack.few[next], pages, index));
        }
        decode(calls.data(), static_cast<int64_t>(calls.size()), scratch_bytes,
               [&](int64_t c, int64_t, int64_t group, int64_t query, char* scratch) {
                   const Run& r = pack.few[first + static_cast<size_t>(c)];
                   const int64_t i = r.first + query;
                   add_to_row(p, r.b, group, i, r.start);
                   then(r.b, group, {i, i + 1}, scratch);
               });
    }
}

// The queries of the runs in parts of one task each, those with the most keys first. Short sequences share
// one.
std::vector<QueryPart> parts_of(const SelectParams& p, const std::vector<Run>& runs) {
    const int64_t step = cpu::topk_select_kernels().block_queries(p), together = 512;
    std::vector<std::pair<int64_t, QueryPart>> parts;  // with their keys
    int64_t end = 0;                                   // of the keys of the last part
    for (const Run& r : runs) {
        QueryPart* last = parts.empty() ? nullptr : &parts.back().second;
        const int64_t begin = last ? end - parts.back().first : 0;
        if (last && last->b == r.b && last->queries.end == r.first && r.start >= end &&
            r.start + r.keys - begin <= together && r.first + r.count - last->queries.begin <= step) {
            last->queries.end += r.count;
            end = r.start + r.keys;
            parts.back().first = end - begin;
            continue;
        }
        for (int64_t i = 0; i < r.count; i += step)
            parts.push_back({keys_of(p, r.b, r.first + std::min(r.count, i + step) - 1).end - r.start,
                             {r.b, {r.first + i, r.first + std::min(r.count, i + step)}}});
        end = r.start + r.keys;
    }
    std::stable_sort(parts.begin(), parts.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    std::vector<QueryPart> sorted;
    for (const auto& part : parts) sorted.push_back(part.second);
    return sorted;
}

// The panels of packed keys that a query of the runs sees.
std::vector<uint8_t> panels_of(const SelectParams& p, const std::vector<Run>& runs) {
    const int64_t keys = cpu::topk_decode_kernels().panel_keys();
    std::vector<uint8_t> seen(static_cast<size_t>(blocks(p.key_length, keys)));
    for (const Run& r : runs)
        for (int64_t n = r.start / keys; n < blocks(r.start + r.keys, keys) && r.keys > 0; ++n)
            seen[static_cast<size_t>(n)] = 1;
    return seen;
}

bool is_pack(const SelectParams& p) {
    return p.rule.starts.given() && p.rule.starts.t != 0 && p.query_length > 1 && !p.rounded && !p.blocks &&
           needs_scores(p);
}

}  // namespace

void select_rows(Selection& s, int64_t scratch_bytes, const RowsDone& then,
                 const std::function<bool(const Block&)>& wanted) {
    const SelectParams& p = s.params;
    const auto block_done = [&](const Block& t, char* scratch) { then(t.b, t.group, t.queries, scratch); };
    if (!is_pack(p)) {
        if (!decodes(p)) return select_all(s, scratch_bytes, block_done, wanted);
        return decode(p, scratch_bytes, [&](int64_t b, int64_t group, int64_t i, char* scratch) {
            then(b, group, {i, i + 1}, scratch);
        });
    }
    const Pack pack = pack_of(p);
    if (!pack.many.empty()) {
        s.parts = parts_of(p, pack.many);
        if (!pack.few.empty()) s.panels = panels_of(p, pack.many);
        select_all(s, scratch_bytes, block_done, wanted);
    }
    decode_runs(p, pack, {}, scratch_bytes, then);
}

void select_paged(Selection& s, const int32_t* table, int64_t page_size, int64_t page_count,
                  int64_t scratch_bytes, const PagedRowDone& then, const KeyIndexParams& index) {
    SelectParams& p = s.params;
    const Pack pack = pack_of(p);
    // Pages that are needed and there. The others' keys do not exist.
    std::vector<int32_t> pages(static_cast<size_t>(p.key_length / page_size));
    std::vector<uint8_t> exists;
    for (const auto* runs : {&pack.few, &pack.many})
        for (const Run& r : *runs)
            for (int64_t n = r.start / page_size; r.keys > 0 && n * page_size < r.start + r.keys; ++n) {
                if (table[n] >= 0 && table[n] < page_count) {
                    pages[static_cast<size_t>(n)] = table[n];
                    continue;
                }
                if (exists.empty()) exists.resize(static_cast<size_t>(p.key_length), 1);
                std::memset(exists.data() + n * page_size, 0, static_cast<size_t>(page_size));
            }
    if (!exists.empty()) {
        p.rule.mask = exists.data();
        p.rule.mask_strides = {0, 0, 0, 1};
    }
    const auto decoded = [&](int64_t, int64_t group, cpu::Range queries, char* scratch) {
        then(group, queries.begin, pages.data(), scratch);
    };
    decode_runs(p, pack, {pages.data(), 0, page_size}, scratch_bytes, decoded, index);
    if (pack.many.empty()) return;

    // Keys that many queries read are worth a copy in one piece, [Tk', Hkv, D].
    std::vector<Run> runs = pack.many;
    std::vector<int64_t> starts(static_cast<size_t>(p.query_length)), offsets(starts), moves(starts);
    int64_t length = 0;
    for (Run& r : runs) {
        for (int64_t i = r.first; i < r.first + r.count; ++i) {
            const size_t at = static_cast<size_t>(i);
            // Those that see nothing see nothing of the sequence that follows here, either.
            const bool nothing = keys_of(p, 0, i).begin == keys_of(p, 0, i).end;
            starts[at] = nothing ? kFar : length + pack.starts[at];
            offsets[at] = length + pack.offsets[at] - r.first;
            moves[at] = r.start - length;
        }
        r.start = length;
        length += r.keys;
    }
    const int64_t size = bytes_of(p.dtype), row = p.head_dim * size;
    const Memory keys = allocate(length * p.kv_heads * row);
    std::vector<uint8_t> mask(p.rule.mask ? static_cast<size_t>(length) : 0);
    const bool in_one = p.key_strides.h == p.head_dim || p.kv_heads == 1;
    constexpr int64_t kCopied = 512;  // keys
    for (size_t n = 0; n < runs.size(); ++n) {
        const int64_t from = pack.many[n].start, to = runs[n].start, count = runs[n].keys;
        if (!mask.empty() && count)
            std::memcpy(mask.data() + to, exists.data() + from, static_cast<size_t>(count));
        for_each_task(blocks(count, kCopied), 64, count > kCopied, [&](int64_t task, char*) {
            for (int64_t j = task * kCopied; j < std::min(count, (task + 1) * kCopied); ++j) {
                const int64_t at = from + j;
                const char* source = static_cast<const char*>(p.key) +
                                     (pages[static_cast<size_t>(at / page_size)] * p.key_strides.b +
                                      at % page_size * p.key_strides.t) *
                                         size;
                char* target = keys.get() + (to + j) * p.kv_heads * row;
                if (in_one) {
                    std::memcpy(target, source, static_cast<size_t>(p.kv_heads * row));
                    continue;
                }
                for (int64_t h = 0; h < p.kv_heads; ++h)
                    std::memcpy(target + h * row, source + h * p.key_strides.h * size,
                                static_cast<size_t>(row));
            }
        });
    }
    Selection rest;
    SelectParams& own = rest.params = p;
    own.key = keys.get();
    own.key_strides = {0, p.head_dim, p.kv_heads * p.head_dim, 1};
    own.key_length = length;
    own.rule.starts = {nullptr, starts.data(), 0, 1};
    own.rule.offsets = {nullptr, offsets.data(), 0, 1};
    if (!mask.empty()) own.rule.mask = mask.data();
    rest.parts = parts_of(own, runs);
    select_all(rest, scratch_bytes, [&](const Block& t, char* scratch) {
        for (int64_t i = t.queries.begin; i < t.queries.end; ++i) {
            add_to_row(p, 0, t.group, i, moves[static_cast<size_t>(i)]);
            then(t.group, i, pages.data(), scratch);
        }
    });
}

}  // namespace sparse_attn
