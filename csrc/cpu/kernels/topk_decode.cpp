// topk_select for a few queries (decoding): no key is packed or read twice, and a head's keys may be split
// over threads. Selections, ties and NaN are those of topk_select.cpp, to the bit.
#include "topk_decode.h"

#include "lib/decode_index.h"
#include "lib/decode_panels.h"
#include "lib/select_shared.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

int64_t decode_panels(const SelectParams& p) {
    return panel_count(p);
}
int64_t decode_panel_keys() {
    return NR;
}

SPARSE_ATTN_INLINE int64_t row_of(const SelectParams& p, int64_t b, int64_t head, int64_t query) {
    return (b * p.heads + head) * p.query_length + query;
}

// Whether a query must choose among its candidates, and not merely take them all.
SPARSE_ATTN_INLINE bool chooses(const Visible& v, int64_t keep) {
    return keep > 0 && v.end > v.sink_end && (v.mask || v.end - v.sink_end > keep);
}

// ---- scan

struct ScanRow {
    Visible v;
    Candidates c;
};

int64_t scan_scratch_bytes(const DecodeParams& d) {
    const SelectParams& p = d.select;
    const int64_t rows = round_up(rows_of(p), MR), buffer = candidate_capacity(d.kept) + kSlack;
    int64_t column = 0;
    with_exact_tile(p.dtype, [&]<class T, class Tile>() { column = words<Tile>(p); });
    const int64_t of_scan = buffer * 8 + 128 + static_cast<int64_t>(sizeof(ScanRow)) + 4;
    const int64_t candidates = shared_heads(p) > 1 ? 0 : d.heads * rows * of_scan + buffer * 4;
    const int64_t listed = survivor_room(d.kept) + kSlack, four = (p.head_dim + 3) / 4;
    const int64_t of_row = static_cast<int64_t>(sizeof(RoundedQuery) + sizeof(Visible) + sizeof(Survivors));
    const int64_t index =
        (rows + kIndexRows) * (of_row + four * 4 + listed * 12 + 192) + listed * 4 + p.head_dim * 4;
    return maximum(each_tile_bytes(d, column) + candidates, d.index.codes ? index : 0) + 1024;
}

// Hands over the best of a chunk for row r of its head.
inline void keep_of_chunk(const DecodeParams& d, DecodeChunk t, int64_t r, Candidates& c, int32_t* keys) {
    const SelectParams& p = d.select;
    if (c.count > c.keep) keep_best<false>(c, keys);
    const int64_t head = t.kv_head * (p.heads / p.kv_heads) + r / p.query_length;
    const int64_t slot = row_of(p, t.b, head, r % p.query_length) * d.chunks + t.chunk;
    d.best_counts[slot] = c.count;
    memcpy(d.best_scores + slot * d.room, c.scores, static_cast<size_t>(c.count) * 4);
    memcpy(d.best_indices + slot * d.room, c.indices, static_cast<size_t>(c.count) * 4);
}

// Hands over what the bounds leave of a chunk for row r of its head.
inline void keep_bounds(const DecodeParams& d, DecodeChunk t, int64_t r, const Survivors& own) {
    const SelectParams& p = d.select;
    const int64_t head = t.kv_head * (p.heads / p.kv_heads) + r / p.query_length;
    const int64_t slot = row_of(p, t.b, head, r % p.query_length) * d.chunks + t.chunk;
    const size_t bytes = static_cast<size_t>(own.count) * 4;
    d.best_counts[slot] = -1 - own.count;
    memcpy(d.best_scores + slot * d.room, own.low, bytes);
    memcpy(d.best_above + slot * d.room, own.high, bytes);
    memcpy(d.best_indices + slot * d.room, own.indices, bytes);
}

// A selection per head: the best of the chunk for each row. Rows are those of each_tile.
template <class T, class Tile>
void scan_best(const DecodeParams& d, DecodeChunk t, void* memory) {
    const SelectParams& p = d.select;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t rows = rows_of(p), padded = round_up(rows, MR), per_kv = p.heads / p.kv_heads;
    const int64_t capacity = candidate_capacity(d.kept), buffer = capacity + kSlack;
    float* threshold = scratch.take<float>(d.heads * padded);
    ScanRow* row = scratch.take<ScanRow>(d.heads * padded);
    int32_t* keys = scratch.take<int32_t>(buffer);

    int64_t begin = INT64_MAX, end = 0;
    for (int64_t r = 0; r < d.heads * padded; ++r) {
        threshold[r] = closed_threshold();
        const int64_t of_head = r % padded;
        if (of_head >= rows) continue;
        const int64_t h = (t.kv_head + r / padded) * per_kv + of_head / p.query_length;
        Visible& v = row[r].v;
        v = visible_to(p, t.b, h, of_head % p.query_length);
        const int64_t keep = p.top_k - forced_count(v);
        row[r].c = {scratch.take<float>(buffer), scratch.take<int32_t>(buffer), 0,
                    static_cast<int32_t>(keep)};
        if (!chooses(v, keep)) {
            v.end = v.sink_end;  // nothing to scan
            continue;
        }
        threshold[r] = open_threshold();
        begin = minimum(begin, v.sink_end);
        end = maximum(end, v.end);
    }
    const Range panels = begin < end ? panels_between(d, t.chunk, begin, end) : Range{0, 0};
    each_tile<T, Tile, true>(
        d, t, panels, scratch, threshold,
        [&](int64_t base, int64_t first, int64_t, const float* tile, uint32_t beaten, const uint32_t* beats) {
            for (; beaten; beaten &= beaten - 1) {
                const int r = __builtin_ctz(beaten);
                ScanRow& own = row[first + r];
                const uint32_t bits = beats[r] & candidate_bits(own.v, base, NR);
                if (!bits) continue;
                Candidates& c = own.c;
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    c.count += append(c.scores + c.count, c.indices + c.count, bits >> (v * W) & low_bits(W),
                                      load(tile + r * NR + v * W), static_cast<int32_t>(base + v * W));
                if (c.count > capacity) threshold[first + r] = keep_best<true>(c, keys);
            }
        });
    for (int64_t h = 0; h < d.heads; ++h)
        for (int64_t r = 0; r < rows; ++r)
            keep_of_chunk(d, {t.b, t.kv_head + h, t.chunk}, r, row[h * padded + r].c, keys);
}

// Where block n of a head's keys stands in the index, in blocks; `of`: d.index.blocks.
SPARSE_ATTN_INLINE int64_t place_of_block(const DecodeParams& d, PageOf of, int64_t b, int64_t kv_head,
                                          int64_t n) {
    const int64_t heads = d.select.kv_heads;
    if (!d.pages.table) return (b * heads + kv_head) * of.size + n;
    n += d.pages.first / kIndexKeys;
    return (d.pages.table[of.page(n)] * heads + kv_head) * of.size + of.place(n);
}

// The same through the key index; false where its bounds are of no use here.
template <class T, class Tile>
bool scan_index(const DecodeParams& d, DecodeChunk t, void* memory) {
    const SelectParams& p = d.select;
    if (d.pages.table && d.pages.first % kIndexKeys != 0) return false;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t rows = rows_of(p), per_kv = p.heads / p.kv_heads, column = words<Tile>(p);
    const int64_t four = (p.head_dim + 3) / 4, room = survivor_room(d.kept), buffer = room + kSlack;
    const int64_t head = t.b * p.kv_heads + t.kv_head;
    RoundedQuery* rounded = scratch.take<RoundedQuery>(round_up(rows, kIndexRows));
    int32_t* queries = scratch.take<int32_t>(round_up(rows, kIndexRows) * four);
    Visible* visible = scratch.take<Visible>(rows);
    Survivors* survivors = scratch.take<Survivors>(rows);
    int32_t* order = scratch.take<int32_t>(buffer);
    float* query = scratch.take<float>(maximum(p.head_dim, column));

    int64_t begin = INT64_MAX, end = 0;
    for (int64_t r = 0; r < round_up(rows, kIndexRows); ++r) {
        rounded[r] = {};
        for (int64_t w = 0; w < four; ++w) queries[r * four + w] = 0;
        if (r >= rows) continue;
        const int64_t h = t.kv_head * per_kv + r / p.query_length, i = r % p.query_length;
        Visible& v = visible[r];
        v = visible_to(p, t.b, h, i);
        const int64_t keep = p.top_k - forced_count(v);
        survivors[r] = {scratch.take<float>(buffer),   scratch.take<float>(buffer),
                        scratch.take<int32_t>(buffer), 0,
                        static_cast<int32_t>(keep),    closed_threshold()};
        if (!chooses(v, keep)) {
            v.end = v.sink_end;
            continue;
        }
        const Strides& s = p.query_strides;
        FloatTile::pack_column<true>(query, 1, static_cast<const T*>(p.query) + t.b * s.b + h * s.h + i * s.t,
                                     s.d, p.head_dim, p.head_dim, sign_of(p.rule.scale));
        rounded[r].fit(query, d.index.shift + head * p.head_dim, p.head_dim, queries + r * four);
        if (!rounded[r].useful) return false;
        survivors[r].threshold = open_threshold();
        begin = minimum(begin, v.sink_end);
        end = maximum(end, v.end);
    }
    begin = maximum(begin, t.chunk * d.chunk * NR) / kIndexKeys;
    end = minimum(end, (t.chunk + 1) * d.chunk * NR);
    alignas(64) float products[kIndexRows * kIndexKeys];
    const PageOf of{d.index.blocks};
    for (int64_t n = begin; n * kIndexKeys < end; ++n) {
        const int64_t base = n * kIndexKeys;
        // A page lies anywhere, and where the next one lies no hardware can tell.
        if (d.pages.table && (n + kIndexAhead) * kIndexKeys < end) {
            const int64_t later = place_of_block(d, of, t.b, t.kv_head, n + kIndexAhead);
            for (int64_t w = 0; w < four; ++w) __builtin_prefetch(d.index.codes + (later * four + w) * 64);
            for (int64_t j = 0; j < 3; ++j) __builtin_prefetch(d.index.bounds + (later * 3 + j) * kIndexKeys);
        }
        const int64_t place = place_of_block(d, of, t.b, t.kv_head, n);
        const int8_t* block = d.index.codes + place * four * 64;
        const float* numbers = d.index.bounds + place * 3 * kIndexKeys;
        for (int64_t first = 0; first < rows; first += kIndexRows) {
            const int64_t count = minimum<int64_t>(kIndexRows, rows - first);
            const auto multiply = [&]<int R>() {
                byte_products<R>(block, four, queries + first * four, four, rounded + first, products);
            };
            if (count == 1)
                multiply.template operator()<1>();
            else if (count == 2)
                multiply.template operator()<2>();
            else if (count == 3)
                multiply.template operator()<3>();
            else
                multiply.template operator()<4>();
            for (int64_t r = 0; r < count; ++r) {
                Survivors& own = survivors[first + r];
                const RoundedQuery& q = rounded[first + r];
                const Vec norm_factor = broadcast(q.norm_factor), error_factor = broadcast(q.error_factor),
                          rest = broadcast(q.rest), threshold = broadcast(own.threshold);
#pragma GCC unroll 4
                for (int j = 0; j < kIndexKeys; j += W) {
                    const Vec score = load(products + r * kIndexKeys + j) * load(numbers + j);
                    const Vec bound = fma(load(numbers + 2 * kIndexKeys + j), norm_factor,
                                          fma(load(numbers + kIndexKeys + j), error_factor, rest));
                    const Vec high = score + bound;
                    uint32_t bits = not_le(high, threshold);
                    if (!bits) continue;
                    bits &= candidate_bits(visible[first + r], base + j, W);
                    if (!bits) continue;
                    own.add(bits, score - bound, high, static_cast<int32_t>(base) + j);
                }
                if (own.count <= room - kIndexKeys) continue;
                own.cut(order);
                if (own.count > room / 4 * 3) return false;
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        Survivors& own = survivors[r];
        if (d.best_above) {
            // The bounds of all chunks together leave fewer: `choose` scores those.
            own.cut(order);
            keep_bounds(d, t, r, own);
            continue;
        }
        const int64_t h = t.kv_head * per_kv + r / p.query_length, i = r % p.query_length;
        Candidates c{own.low, own.indices, own.count, own.keep};
        if (own.count > 0) {
            own.cut(order);
            const Strides& s = p.query_strides;
            Tile::template pack_column<true>(query, 1,
                                             static_cast<const T*>(p.query) + t.b * s.b + h * s.h + i * s.t,
                                             s.d, p.head_dim, column, sign_of(p.rule.scale));
            c.count = own.count;
            listed_scores<T, Tile>(KeyRows<T>(d, t.b, t.kv_head), p.head_dim, query, c.indices, c.count,
                                   c.scores);
        }
        keep_of_chunk(d, t, r, c, order);
    }
    return true;
}

// One selection for several heads: the scores of the chunk for each row that has to choose.
template <class T, class Tile>
void scan_all(const DecodeParams& d, DecodeChunk t, void* memory) {
    const SelectParams& p = d.select;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t rows = rows_of(p), padded = round_up(rows, MR), per_kv = p.heads / p.kv_heads;
    const int64_t sharing = shared_heads(p);
    int64_t begin = INT64_MAX, end = 0;  // the probabilities of all visible keys are needed
    for (int64_t group = t.kv_head * per_kv / sharing; group * sharing < (t.kv_head + d.heads) * per_kv;
         ++group)
        for (int64_t i = 0; i < p.query_length; ++i) {
            const Visible v = visible_to(p, t.b, group, i);
            if (!chooses(v, p.top_k - forced_count(v))) continue;
            begin = minimum(begin, v.begin);
            end = maximum(end, v.limit);
        }
    const Range panels = begin < end ? panels_between(d, t.chunk, begin, end) : Range{0, 0};
    each_tile<T, Tile, false>(
        d, t, panels, scratch, nullptr,
        [&](int64_t base, int64_t first, int64_t count, const float* tile, uint32_t, const uint32_t*) {
            for (int64_t r = 0; r < count; ++r) {
                const int64_t of_head = first % padded + r;
                const int64_t h = (t.kv_head + first / padded) * per_kv + of_head / p.query_length;
                const int64_t to = row_of(p, t.b, h, of_head % p.query_length) * d.length + base;
                memcpy(d.scores + to, tile + r * NR, NR * 4);
            }
        });
}

void scan(const DecodeParams& d, DecodeChunk t, void* scratch) {
    with_exact_tile(d.select.dtype, [&]<class T, class Tile>() {
        if (shared_heads(d.select) > 1)
            scan_all<T, Tile>(d, t, scratch);
        else if (!d.index.codes || !scan_index<T, Tile>(d, t, scratch))
            scan_best<T, Tile>(d, t, scratch);
    });
}

// ---- choose

int64_t choose_scratch_bytes(const DecodeParams& d) {
    const SelectParams& p = d.select;
    const int64_t buffer = maximum(candidate_capacity(p.top_k), d.chunks * d.room) + kSlack;
    return buffer * (d.best_above ? 24 : 12) + panel_count(p) * 12 + p.head_dim * 4 + 1024;
}

void weigh(const DecodeParams& d, DecodeRow t, void* memory) {
    const SelectParams& p = d.select;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t group = t.head / shared_heads(p), row = row_of(p, t.b, t.head, t.query);
    const Visible v = visible_to(p, t.b, group, t.query);
    if (!chooses(v, p.top_k - forced_count(v))) return;
    const Panels panels = panels_of(p, t.b, group, {t.query, t.query + 1}, v, scratch);
    d.weights[row] = weigh_head(p, d.scores + row * d.length + panels.first[0], panels, v, t.head);
}

// The best of the chunks' best.
inline void merge_best(const DecodeParams& d, int64_t row, Candidates& c, int32_t* keys) {
    for (int64_t slot = row * d.chunks; slot < (row + 1) * d.chunks; ++slot) {
        const int32_t n = d.best_counts[slot];
        memcpy(c.scores + c.count, d.best_scores + slot * d.room, static_cast<size_t>(n) * 4);
        memcpy(c.indices + c.count, d.best_indices + slot * d.room, static_cast<size_t>(n) * 4);
        c.count += n;
    }
    if (c.count > c.keep) keep_best<false>(c, keys);
}

// The same where bounds are what is known of some chunks, or of all: those keys are scored that the bounds of
// all such chunks together leave.
template <class T, class Tile>
void score_and_merge(const DecodeParams& d, DecodeRow t, Candidates& c, int32_t* keys, Scratch& scratch) {
    const SelectParams& p = d.select;
    const int64_t row = row_of(p, t.b, t.head, t.query), buffer = d.chunks * d.room + kSlack;
    Survivors left{
        scratch.take<float>(buffer), scratch.take<float>(buffer), scratch.take<int32_t>(buffer), 0, c.keep,
        closed_threshold()};
    for (int64_t slot = row * d.chunks; slot < (row + 1) * d.chunks; ++slot) {
        const int32_t n = -1 - d.best_counts[slot];
        if (n <= 0) continue;
        const size_t bytes = static_cast<size_t>(n) * 4;
        memcpy(left.low + left.count, d.best_scores + slot * d.room, bytes);
        memcpy(left.high + left.count, d.best_above + slot * d.room, bytes);
        memcpy(left.indices + left.count, d.best_indices + slot * d.room, bytes);
        left.count += n;
    }
    left.cut(keys);
    const int64_t column = words<Tile>(p);
    float* query = scratch.take<float>(column);
    const Strides& s = p.query_strides;
    Tile::template pack_column<true>(
        query, 1, static_cast<const T*>(p.query) + t.b * s.b + t.head * s.h + t.query * s.t, s.d, p.head_dim,
        column, sign_of(p.rule.scale));
    if (left.count > 0)
        listed_scores<T, Tile>(KeyRows<T>(d, t.b, t.head / (p.heads / p.kv_heads)), p.head_dim, query,
                               left.indices, left.count, left.low);
    int32_t next = 0;
    for (int64_t chunk = 0; chunk < d.chunks; ++chunk) {  // in the order of keys
        const int64_t slot = row * d.chunks + chunk, end = (chunk + 1) * d.chunk * NR;
        int32_t n = d.best_counts[slot];
        const float* scores = d.best_scores + slot * d.room;
        const int32_t* indices = d.best_indices + slot * d.room;
        if (n < 0) {
            scores = left.low + next, indices = left.indices + next;
            for (n = 0; next < left.count && left.indices[next] < end; ++next) ++n;
        }
        memcpy(c.scores + c.count, scores, static_cast<size_t>(n) * 4);
        memcpy(c.indices + c.count, indices, static_cast<size_t>(n) * 4);
        c.count += n;
    }
    if (c.count > c.keep) keep_best<false>(c, keys);
}

// The best by summed probability.
inline void stream_mass(const DecodeParams& d, DecodeRow t, const Visible& v, Candidates& c, int32_t* keys) {
    const SelectParams& p = d.select;
    const int64_t sharing = shared_heads(p), full = candidate_capacity(p.top_k);
    const int64_t stride = p.query_length * d.length, first = row_of(p, t.b, t.head * sharing, t.query);
    const float *scores = d.scores + first * d.length, *weights = d.weights + first;
    float threshold = open_threshold();
    for (int64_t j = v.sink_end / W * W; j < v.end; j += W) {
        const uint32_t candidates = candidate_bits(v, j, W);
        if (!candidates) continue;
        Vec mass = zero();
        for (int64_t h = 0; h < sharing; ++h)
            mass = fma(load(scores + h * stride + j), broadcast(weights[h * p.query_length]), mass);
        const uint32_t bits = not_le(mass, broadcast(threshold)) & candidates;
        if (!bits) continue;
        c.count += append(c.scores + c.count, c.indices + c.count, bits, mass, static_cast<int32_t>(j));
        if (c.count > full) threshold = keep_best<true>(c, keys);
    }
    keep_best<false>(c, keys);
}

void choose(const DecodeParams& d, DecodeRow t, void* memory) {
    const SelectParams& p = d.select;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t buffer = maximum(candidate_capacity(p.top_k), d.chunks * d.room) + kSlack;
    int32_t* keys = scratch.take<int32_t>(buffer);
    const Visible v = visible_to(p, t.b, t.head, t.query);
    const int64_t keep = p.top_k - forced_count(v);
    Candidates c{scratch.take<float>(buffer), scratch.take<int32_t>(buffer), 0, static_cast<int32_t>(keep)};
    if (!chooses(v, keep)) {
        for (int64_t j = v.sink_end; keep > 0 && j < v.end; ++j)
            c.indices[c.count++] = static_cast<int32_t>(j);
    } else if (shared_heads(p) > 1) {
        stream_mass(d, t, v, c, keys);
    } else if (d.best_above) {
        with_exact_tile(p.dtype,
                        [&]<class T, class Tile>() { score_and_merge<T, Tile>(d, t, c, keys, scratch); });
    } else {
        merge_best(d, row_of(p, t.b, t.head, t.query), c, keys);
    }
    emit(p.indices + ((t.b * p.rule.groups + t.head) * d.group_rows + t.query) * p.top_k, p.top_k, v,
         c.indices, c.count);
}

SPARSE_ATTN_KERNELS(topk_decode, DecodeKernels) = {
    .panels = decode_panels,
    .panel_keys = decode_panel_keys,
    .index_room = survivor_room,
    .scan = {.scratch_bytes = scan_scratch_bytes, .run = scan},
    .weigh = weigh,
    .choose = {.scratch_bytes = choose_scratch_bytes, .run = choose},
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
