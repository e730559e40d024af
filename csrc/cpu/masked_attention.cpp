// Attention by dense tiles: which queries it serves, and their tasks.
#include "cpu/masked_attention.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <optional>

#include "cpu/kernels/gathered_attention.h"

SPARSE_ATTN_FIND_KERNELS(gathered_attention, AttendKernel)

namespace sparse_attn {

// ---- the choice

// Measured on an EPYC (Zen 3, AVX2) and, of CPUs with tiles, on a Xeon (AVX-512 at 2.6 GHz);
// `sparse-attn bench --calibrate` measures another machine.
static TileCosts usual_costs() {
    if (std::strcmp(cpu::isa_name(), "amx") == 0)
        return {
            .gather = 0.076,
            .candidate = 1.32,
            .tile_key = 1.23,
            .tile = 0.0152,
            .gather_backward = 0.188,
            .tile_key_backward = 0.876,
            .tile_backward = 0.0384,
        };
    return {
        .gather = 0.13,
        .candidate = 3.5,
        .tile_key = 1.8,
        .tile = 0.028,
        .gather_backward = 0.42,
        .tile_key_backward = 0.6,
        .tile_backward = 0.08,
    };
}
static std::optional<TileCosts> costs_in_use;
static std::mutex costs_lock;
static std::atomic<Ways> ways{Ways::kAuto};

TileCosts tile_costs() {
    const std::lock_guard<std::mutex> guard(costs_lock);
    if (!costs_in_use) costs_in_use = usual_costs();
    return *costs_in_use;
}

void set_tile_costs(const TileCosts& costs) {
    const std::lock_guard<std::mutex> guard(costs_lock);
    costs_in_use = costs;
}

void use_tiles(Ways which) {
    ways = which;
}

Ways tiles_used() {
    return ways;
}

bool tiles_pay(const TileCosts& c, int64_t visible, int64_t top_k, int64_t head_dim, int64_t value_dim) {
    const Ways which = ways;
    if (which != Ways::kAuto) return which == Ways::kTiles && visible > 0;
    if (std::min(visible, top_k) < kFewKept) return false;
    const double keys = static_cast<double>(visible), kept = static_cast<double>(std::min(visible, top_k));
    // In keys of random order the n-th beats the best K so far with probability K/n.
    const double passing = visible > top_k ? kept * (1.0 + std::log(keys / kept)) : 0.0;
    const double width = static_cast<double>(head_dim + value_dim);
    return keys * (c.tile_key + c.tile * static_cast<double>(value_dim)) <=
           passing * c.candidate + kept * width * c.gather;
}

bool tiles_pay_for(const TileCosts& c, int64_t named, int64_t span, int64_t width) {
    const Ways which = ways;
    if (which != Ways::kAuto) return which == Ways::kTiles && named > 0;
    if (named < kFewKept) return false;
    const double components = static_cast<double>(width);
    return static_cast<double>(span) * (c.tile_key + c.tile * components) <=
           static_cast<double>(named) * components * c.gather;
}

bool backward_tiles_pay(const TileCosts& c, int64_t first, int64_t keys, int64_t top_k, int64_t width) {
    const Ways which = ways;
    if (which != Ways::kAuto) return which == Ways::kTiles && keys > 0;
    // Without FMA each step of the tiles' long sums rounds twice.
    if (keys < kFewKeys || cpu::isa() == cpu::Isa::generic) return false;
    const double least = static_cast<double>(first), most = static_cast<double>(keys),
                 kept = static_cast<double>(std::min(keys, top_k));
    // Of rows that see fewer keys than they may keep all keys count.
    const double whole = least >= kept ? 0.0 : most <= kept ? 1.0 : (kept - least) / (most - least);
    const double named = whole * (least + kept) / 2 + (1.0 - whole) * kept;
    return (least + most) / 2 * (c.tile_key_backward + c.tile_backward * static_cast<double>(width)) <=
           named * static_cast<double>(width) * c.gather_backward;
}

// ---- values

PackedValues pack_values(MaskedParams& p, bool parallel) {
    const cpu::MaskedKernels& k = cpu::masked_attention_kernels();
    const AttendParams& a = p.attend;
    const int64_t heads = a.batch * a.kv_heads, chunk = 512,
                  chunks = std::max<int64_t>(1, blocks(a.key_length, chunk));
    PackedValues packed{allocate(heads * k.packed_value(p) * 4), allocate(heads * a.key_length)};
    p.packed_value = reinterpret_cast<const float*>(packed.values.get());
    p.special = reinterpret_cast<const uint8_t*>(packed.special.get());
    for_each_task(heads * chunks, 64, parallel, [&](int64_t i, char*) {
        const int64_t first = i % chunks * chunk;
        k.pack(p, i / chunks / a.kv_heads, i / chunks % a.kv_heads,
               {first, std::min(first + chunk, a.key_length)});
    });
    return packed;
}

// ---- topk_attention

bool attend_by_tiles(Selection& s, const AttendParams& a, uint32_t* bits, std::vector<uint8_t>& done) {
    const SelectParams& p = s.params;
    if (!tiles_take(p) || (ways.load() == Ways::kAuto && p.top_k < kFewKept)) return false;
    const TileCosts costs = tile_costs();
    MaskedParams m{p, a, bits, nullptr, nullptr, nullptr};
    const cpu::MaskedKernels& k = cpu::masked_attention_kernels();
    const int64_t step = k.block_queries(m);
    struct Run {
        int64_t b;
        cpu::Range queries;
    };
    std::vector<Run> runs;
    done.assign(static_cast<size_t>(p.batch * p.query_length), 0);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t first = 0, next = 0; first < p.query_length; first = next) {
            // Queries whose keys begin with the same one: a sequence. A few of them gather, as they do alone.
            const int64_t begin = keys_of(p.rule, b, first, p.key_length).begin;
            for (next = first;
                 next < p.query_length && keys_of(p.rule, b, next, p.key_length).begin == begin;)
                ++next;
            if (next - first <= kDecodeQueries) continue;
            bool goes_on = false;
            for (int64_t i = first; i < next; ++i) {
                const int64_t visible = keys_of(p.rule, b, i, p.key_length).end - begin;
                const bool pays = tiles_pay(costs, visible, p.top_k, p.head_dim, a.value_dim);
                if (pays) {
                    done[static_cast<size_t>(b * p.query_length + i)] = 1;
                    if (goes_on && runs.back().queries.end - runs.back().queries.begin < step)
                        ++runs.back().queries.end;
                    else
                        runs.push_back({b, {i, i + 1}});
                }
                goes_on = pays;
            }
        }
    if (runs.empty()) return false;
    pack_keys(s, cpu::topk_select_kernels().block_queries(p), true);
    m.packed_key = s.packed.get();
    const PackedValues values = pack_values(m, s.parallel);
    const int64_t count = static_cast<int64_t>(runs.size());
    // All queries of a head in turn, the longest rows first.
    for_each_task(p.heads * count, k.scratch_bytes(m), s.parallel, [&](int64_t i, char* scratch) {
        const Run& run = runs[static_cast<size_t>(count - 1 - i % count)];
        k.choose(m, {run.b, {i / count, i / count + 1}, run.queries}, scratch);
    });
    return true;
}

// ---- gathered_attention

namespace {

constexpr int64_t kAttendQueries = 64;

bool worth_threads_for(const AttendParams& a) {
    return worth_threads(static_cast<double>(a.batch * a.heads) * a.query_length * a.slots *
                         (a.head_dim + a.value_dim));
}

// How many keys the rows name, and the range of them.
struct Named {
    int64_t count = 0, rows = 0;
    cpu::Range keys{0, 0};

    void look(const AttendParams& a, int64_t b, int64_t group, int64_t query) {
        const Strides& s = a.indices_strides;
        const int32_t* row = a.indices + b * s.b + group * s.h + query * s.t;
        const int32_t length = static_cast<int32_t>(a.key_length);
        int32_t least = length, most = -1;
        int64_t n = 0;
        for (int64_t i = 0; i < a.slots; ++i) {
            const bool is_key = row[i] >= 0 && row[i] < length;
            n += is_key;
            least = std::min(least, is_key ? row[i] : length);
            most = std::max(most, is_key ? row[i] : -1);
        }
        ++rows;
        if (n == 0) return;
        keys = count == 0
                   ? cpu::Range{least, most + 1}
                   : cpu::Range{std::min<int64_t>(keys.begin, least), std::max<int64_t>(keys.end, most + 1)};
        count += n;
    }
    bool tiles(const TileCosts& c, int64_t width) const {
        return rows > 0 && tiles_pay_for(c, count / rows, keys.end - keys.begin, width);
    }
};

// Calls use(row) for some rows, from which the whole call is judged, until it says that it has seen enough; a
// function of its shape and indices alone.
template <class Use>
void some_rows(const AttendParams& a, const Use& use) {
    if (a.query_length <= 16 || a.slots == 0 || a.key_length == 0) return;
    const int64_t step = std::max<int64_t>(1, a.query_length / 16);
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t i = a.query_length - 1; i >= 0; i -= step) {
            Named one;
            one.look(a, b, (b + i) % a.groups, i);
            if (one.count > 0 && use(one)) return;
        }
}

}  // namespace

bool bits_of_rows(const AttendParams& a, int64_t list, cpu::Range queries, uint32_t* bits) {
    const int64_t words = bit_words(a.key_length);
    const Strides& s = a.indices_strides;
    uint32_t twice = 0;
    for (int64_t row = queries.begin; row < queries.end; ++row) {
        const int32_t* indices = a.indices + list / a.groups * s.b + list % a.groups * s.h + row * s.t;
        uint32_t* to = bits + (list * a.query_length + row) * words;
        std::fill(to, to + words, 0u);
        // Neighbours in a row are mostly of one word, which is kept at hand.
        int64_t at = 0;
        uint32_t word = 0;
        for (int64_t i = 0; i < a.slots; ++i) {
            const int64_t key = indices[i];
            if (key < 0 || key >= a.key_length) continue;
            if (key / 32 != at) {
                to[at] = word;
                at = key / 32;
                word = to[at];
            }
            const uint32_t bit = 1u << (key % 32);
            twice |= word & bit;
            word |= bit;
        }
        if (words > 0) to[at] = word;
    }
    return twice == 0;
}

bool bits_of_indices(const AttendParams& a, uint32_t* bits, bool parallel) {
    const int64_t chunk = 64, per_list = blocks(a.query_length, chunk);
    std::atomic<bool> once{true};
    for_each_task(a.batch * a.groups * per_list, 64, parallel, [&](int64_t n, char*) {
        const int64_t first = n % per_list * chunk;
        if (!bits_of_rows(a, n / per_list, {first, std::min(a.query_length, first + chunk)}, bits))
            once = false;
    });
    return once;
}

void attend_to_indices(const AttendParams& a) {
    const cpu::AttendKernel& gather = cpu::gathered_attention_kernels();
    const bool parallel = worth_threads_for(a);
    const int64_t per_kv = a.heads / a.kv_heads, width = a.head_dim + a.value_dim;
    const TileCosts costs = tile_costs();
    bool any = false;  // each block of rows goes its own way
    some_rows(a, [&](const Named& n) { return any = n.tiles(costs, width); });
    if (!any) {
        const int64_t per_head = blocks(a.query_length, kAttendQueries);
        return for_each_task(a.batch * a.kv_heads * per_head, gather.scratch_bytes(a), parallel,
                             [&](int64_t i, char* scratch) {
                                 Block t = block_of(i, a.kv_heads, per_head, kAttendQueries, a.query_length);
                                 gather.run(a, {t.b, {t.group * per_kv, (t.group + 1) * per_kv}, t.queries},
                                            scratch);
                             });
    }
    Selection s{};
    SelectParams& p = s.params;
    p.query = a.query, p.key = a.key, p.query_strides = a.query_strides, p.key_strides = a.key_strides;
    p.batch = a.batch, p.heads = a.heads, p.kv_heads = a.kv_heads, p.query_length = a.query_length;
    p.key_length = a.key_length, p.head_dim = a.head_dim, p.top_k = a.slots, p.dtype = a.dtype;
    p.rule.scale = a.scale, p.rule.groups = a.heads;
    const cpu::MaskedKernels& k = cpu::masked_attention_kernels();
    MaskedParams m{p, a, nullptr, nullptr, nullptr, nullptr};
    const int64_t step = k.block_queries(m), per_head = blocks(a.query_length, step),
                  per_group = a.heads / a.groups;
    pack_keys(s, step, true);
    m.packed_key = s.packed.get();
    const PackedValues values = pack_values(m, parallel);
    for_each_task(a.batch * a.kv_heads * per_head, std::max(k.scratch_bytes(m), gather.scratch_bytes(a)),
                  parallel, [&](int64_t i, char* scratch) {
                      Block t = block_of(i, a.kv_heads, per_head, step, a.query_length);
                      const cpu::Range heads{t.group * per_kv, (t.group + 1) * per_kv};
                      Named named;
                      for (int64_t g = heads.begin / per_group; g <= (heads.end - 1) / per_group; ++g)
                          for (int64_t n = t.queries.begin; n < t.queries.end; ++n) named.look(a, t.b, g, n);
                      // Sums begin at a multiple of a chunk, so that they do not depend on the first key.
                      const cpu::Range keys{named.keys.begin / kMaskedChunk * kMaskedChunk, named.keys.end};
                      if (!named.tiles(costs, width) || !k.attend(m, {t.b, heads, t.queries}, keys, scratch))
                          gather.run(a, {t.b, heads, t.queries}, scratch);
                  });
}

const uint32_t* bits_of(AttendParams& a, const char* op, const Tensor& bits, int64_t key_length) {
    const bool fits = bits.dim() == 4 && bits.scalar_type() == ScalarType::Int && bits.size(0) == a.batch &&
                      bits.size(1) == a.heads && bits.size(2) == a.query_length &&
                      bits.size(3) == bit_words(key_length);
    STD_TORCH_CHECK(fits, op, ": bits must be int32 [B, Hq, Tq, ceil(Tk / 32)]; got ", shape_of(bits));
    a.groups = a.heads;
    return static_cast<const uint32_t*>(bits.const_data_ptr());
}

Gradients new_gradients(MaskedBackwardParams& p, const char* op, const Tensor& query, const Tensor& key,
                        const Tensor& value, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                        const Tensor& out, const Tensor& lse) {
    AttendParams& f = p.forward;
    Gradients g;
    g.lse = torch::stable::contiguous(lse);
    if (grad_lse) g.grad_lse = torch::stable::contiguous(*grad_lse);
    check_gradients(op, f, grad_out, g.grad_lse, g.lse);
    check_out(op, f, query, out);
    g.query = torch::stable::new_empty(query, {f.batch, f.heads, f.query_length, f.head_dim});
    g.key = torch::stable::new_empty(key, {f.batch, f.kv_heads, f.key_length, f.head_dim});
    g.value = torch::stable::new_empty(value, {f.batch, f.kv_heads, f.key_length, f.value_dim});
    f.lse = static_cast<float*>(g.lse.mutable_data_ptr());
    p.out = out.const_data_ptr(), p.out_strides = strides_of(out);
    p.grad_out = grad_out.const_data_ptr(), p.grad_out_strides = strides_of(grad_out);
    p.grad_lse = g.grad_lse ? static_cast<const float*>(g.grad_lse->const_data_ptr()) : nullptr;
    p.grad_query = g.query.mutable_data_ptr();
    p.grad_key = g.key.mutable_data_ptr();
    p.grad_value = g.value.mutable_data_ptr();
    return g;
}

bool backward_by_tiles(MaskedBackwardParams& p, const int32_t* indices) {
    AttendParams& f = p.forward;
    f.indices = indices;
    const TileCosts c = tile_costs();
    const int64_t width = f.head_dim + f.value_dim;
    // All rows go one way, the one that is cheaper for them together.
    double by_tiles = 0.0, by_gathering = 0.0;
    bool long_enough = false;
    some_rows(f, [&](const Named& n) {
        const double span = static_cast<double>(n.keys.end - n.keys.begin),
                     components = static_cast<double>(width);
        by_tiles += span * (c.tile_key_backward + c.tile_backward * components);
        by_gathering += static_cast<double>(n.count) * components * c.gather_backward;
        long_enough |= n.keys.end - n.keys.begin >= kFewKeys;
        return false;
    });
    const Ways which = tiles_used();
    // Without FMA each step of the tiles' long sums rounds twice.
    const bool pays = long_enough && by_tiles <= by_gathering && cpu::isa() != cpu::Isa::generic;
    if (by_gathering == 0.0 || !(which == Ways::kAuto ? pays : which == Ways::kTiles)) return false;
    const bool parallel = worth_threads_for(f);
    Memory bits = allocate(f.batch * f.groups * f.query_length * bit_words(f.key_length) * 4);
    if (!bits_of_indices(f, reinterpret_cast<uint32_t*>(bits.get()), parallel)) return false;
    p.bits = reinterpret_cast<const uint32_t*>(bits.get());
    walk_tiles(p, parallel);
    return true;
}

void walk_tiles(MaskedBackwardParams& p, bool parallel, const TilesPrepared& then) {
    AttendParams& f = p.forward;
    const cpu::MaskedBackwardKernels& k = cpu::masked_attention_backward_kernels();
    const int64_t rows = f.batch * f.heads * k.padded_rows(f.query_length), key_heads = f.batch * f.kv_heads;
    const int64_t wide = k.padded_width(f.head_dim), wide_v = k.padded_width(f.value_dim);
    // Tasks for many threads, without a dQ for each of them; a function of the shapes alone.
    p.parts = std::clamp<int64_t>(blocks(32, key_heads), 1, std::clamp<int64_t>(f.key_length / 512, 1, 8));
    Memory floats = allocate(rows * (wide * (p.parts + 1) + wide_v + 2) * 4 + 64), special = allocate(rows);
    p.queries = reinterpret_cast<float*>(floats.get());
    p.sums = p.queries + rows * wide;
    p.grads = p.sums + rows * wide * p.parts;
    p.centre = p.grads + rows * wide_v;
    p.lse = p.centre + rows;
    p.special = reinterpret_cast<uint8_t*>(special.get());
    const int64_t chunk = 256, all = k.padded_rows(f.query_length);
    p.rows = all;
    const auto for_rows = [&](int64_t length, const auto& run) {
        const int64_t chunks = blocks(length, chunk);
        for_each_task(f.batch * f.heads * chunks, 64, parallel, [&](int64_t i, char*) {
            const int64_t head = i / chunks, first = i % chunks * chunk;
            run(p, head / f.heads, head % f.heads, cpu::Range{first, std::min(length, first + chunk)});
        });
    };
    for_rows(all, k.prepare);
    if (then) then(p);
    // The first keys of all heads first: most queries see them.
    for_each_task(key_heads * p.parts, k.scratch_bytes(p), parallel, [&](int64_t i, char* scratch) {
        k.part(p, i % key_heads / f.kv_heads, i % key_heads % f.kv_heads, i / key_heads, scratch);
    });
    for_rows(f.query_length, k.finish);
}

void gradients_of_bits(MaskedBackwardParams& p) {
    const AttendParams& f = p.forward;
    walk_tiles(p, worth_threads(static_cast<double>(f.batch * f.heads) * f.query_length * f.key_length *
                                (f.head_dim + f.value_dim)));
}

// ---- the rest of topk_attention

void select_rest(Selection& s, int64_t scratch_bytes, const std::vector<uint8_t>* done,
                 const RowsDone& then) {
    if (!done) return select_rows(s, scratch_bytes, then);
    const uint8_t* marks = done->data();
    const int64_t length = s.params.query_length;
    // A block that holds a few of the done is selected whole: to the same indices.
    select_rows(
        s, scratch_bytes,
        [&](int64_t b, int64_t group, cpu::Range queries, char* scratch) {
            const uint8_t* row = marks + b * length;
            for (int64_t i = queries.begin; i < queries.end;) {
                int64_t end = i;
                while (end < queries.end && !row[end]) ++end;
                if (end > i) then(b, group, {i, end}, scratch);
                i = end + 1;
            }
        },
        [&](const Block& t) {
            const uint8_t* row = marks + t.b * length;
            return std::find(row + t.queries.begin, row + t.queries.end, 0) != row + t.queries.end;
        });
}

}  // namespace sparse_attn
