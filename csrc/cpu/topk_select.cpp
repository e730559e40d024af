// topk_select: scores in tiles, compared with each query's running threshold while they are hot.
//
// Where the heads have their own selections (R = 1) a tile never leaves the first-level cache: what beats the
// threshold goes to the query's candidates. Where R heads share one, the tiles of a few queries are stored as
// rows [R, Tk], turned into softmax probabilities, summed over the heads, and the sums are streamed the same
// way.
#include "select_stream.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// ---- packed keys
// ------------------------------------------------------------------------------------------------

int64_t panel_count(const SelectParams& p) {
    return (p.key_length + NR - 1) / NR;
}
int64_t packed_head_bytes(const SelectParams& p) {
    int64_t bytes = 0;
    with_tile(p, [&]<class T, class Tile>() { bytes = panel_count(p) * column_words<Tile>(p) * NR * 4; });
    return bytes;
}

void pack_keys(const SelectParams& p, int64_t b, int64_t kv_head, Range panels, void* packed_head) {
    float* packed = static_cast<float*>(packed_head);
    const Strides& s = p.key_strides;
    with_tile(p, [&]<class T, class Tile>() {
        const T* key = static_cast<const T*>(p.key) + b * s.b + kv_head * s.h;
        for (int64_t n = panels.begin; n < panels.end; ++n) {
            int64_t first = n * NR;
            pack<Tile, false>(p, packed + n * column_words<Tile>(p) * NR, NR, key + first * s.t,
                              minimum<int64_t>(NR, p.key_length - first), s.t, s.d, 1.0f);
        }
    });
}

// ---- a selection per head
// ---------------------------------------------------------------------------------------

SPARSE_ATTN_INLINE float sign_of(float scale) {
    return scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f;
}

SPARSE_ATTN_INLINE int64_t shared_heads(const SelectParams& p) {
    return p.heads / p.groups;
}

// Queries of one stored tile when heads share: enough rows to fill the row groups.
SPARSE_ATTN_INLINE int64_t shared_queries(const SelectParams& p) {
    int64_t rows_per_query = p.heads / p.kv_heads < shared_heads(p) ? p.heads / p.kv_heads : shared_heads(p);
    return clamp<int64_t>(2 * MR / rows_per_query, 1, 2 * MR);
}

int64_t select_block_queries(const SelectParams& p) {
    if (p.blocks) {
        const int64_t parts = (p.query_tile + kBlockRows - 1) / kBlockRows;  // of a tile
        return (p.query_tile + parts - 1) / parts;
    }
    return shared_heads(p) == 1 ? kBlockRows : shared_queries(p);
}

int64_t select_scratch_bytes(const SelectParams& p) {
    int64_t column = 0;
    with_tile(p, [&]<class T, class Tile>() { column = column_words<Tile>(p); });
    if (shared_heads(p) == 1) return stream_scratch_bytes(p) + kBlockRows * column * 4 + 1024;
    const int64_t buffer = candidate_capacity(p.top_k) + kSlack;
    const int64_t query_rows = round_up(shared_queries(p) * shared_heads(p), MR);
    const int64_t stored = shared_queries(p) * shared_heads(p) * (panel_count(p) * NR * 4 + 64);
    return buffer * 12 + 128 + (query_rows + MR) * column * 4 + stored + 1024;
}

template <class T, class Tile>
struct HeadScorer {
    const SelectParams& p;
    const T* query;       // [Tq, D] of the head
    const float* packed;  // its key head's panels
    float* tile_queries;  // [kRowGroups] tiles

    void prepare(int g, int64_t first, int64_t rows) {
        const Strides& s = p.query_strides;
        pack<Tile, true>(p, tile_queries + g * MR * column_words<Tile>(p), MR, query + first * s.t, rows, s.t,
                         s.d, sign_of(p.scale));
    }
    SPARSE_ATTN_INLINE uint32_t score(int g, int64_t panel, float* tile, const float* threshold,
                                      uint32_t* beats) {
        const int64_t column = column_words<Tile>(p);
        return score_tile<Tile, true>(tile, tile_queries + g * MR * column, packed + panel * column * NR,
                                      words<Tile>(p), threshold, beats);
    }
};

template <class T, class Tile>
void select_rows(const SelectParams& p, int64_t b, int64_t head, Range queries, const float* packed,
                 void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t kv_head = head / (p.heads / p.kv_heads);
    HeadScorer<T, Tile> scorer{
        p, static_cast<const T*>(p.query) + b * p.query_strides.b + head * p.query_strides.h,
        packed + (b * p.kv_heads + kv_head) * panel_count(p) * column_words<Tile>(p) * NR,
        scratch.take<float>(kBlockRows * column_words<Tile>(p))};
    stream_rows(p, b, head, queries, scratch, scorer);
}

// ---- heads that share a selection
// ---------------------------------------------------------------------------------

// scores [Tk] of one query and head → exp(score − max) over the visible keys, 0 elsewhere, NaN where the
// score is NaN; returns 1 / their sum without NaN (0 where nothing weighs), so that a NaN marks its own key
// alone.
inline float exponentiate(float* scores, const Visible& v, int64_t length, float scale) {
    const Vec factor = broadcast(scale);
    const Vec nothing = broadcast(-__builtin_inff());
    Vec top = nothing;
    for (int64_t j = 0; j < length; j += W) {
        Vec s = load(scores + j) * factor;
        uint32_t lanes = low_bits(clamp<int64_t>(v.limit - j, 0, W));
        if (v.mask)
            for (uint32_t left = lanes; left; left &= left - 1)
                if (!allowed(v, j + __builtin_ctz(left))) lanes &= ~(left & -left);
        s = where(lanes, s, nothing);
        store(scores + j, s);
        top = max(s, top);  // skips NaN
    }
    float peak = max_lane(top);
    Vec total = zero();
    for (int64_t j = 0; j < length; j += W) {
        Vec s = load(scores + j);
        uint32_t nan = is_nan(s);
        // With peak −inf every score is −inf or NaN, and −inf − −inf must not become NaN.
        Vec e = peak == -__builtin_inff() ? where(nan, s, zero()) : exp(s - broadcast(peak));
        store(scores + j, e);
        total = total + where(is_nan(e), zero(), e);
    }
    float weight = sum(total);
    return weight > 0 ? 1.0f / weight : 0.0f;
}

template <class T, class Tile>
void select_shared(const SelectParams& p, int64_t b, int64_t group, Range queries, const float* packed,
                   void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t word_count = words<Tile>(p), column = column_words<Tile>(p), sharing = shared_heads(p),
                  per_kv_head = p.heads / p.kv_heads;
    const int64_t rows = queries.end - queries.begin, buffer = candidate_capacity(p.top_k) + kSlack;
    const int32_t full = static_cast<int32_t>(candidate_capacity(p.top_k));
    int32_t* keys = scratch.take<int32_t>(buffer);
    Candidates c{scratch.take<float>(buffer), scratch.take<int32_t>(buffer), 0, 0};
    // Rows of one key head are (query, head) pairs; a group covers whole key heads, or is one.
    const int64_t kv_heads = maximum<int64_t>(1, sharing / per_kv_head), heads_per_kv = sharing / kv_heads;
    const int64_t tile_rows = rows * heads_per_kv, padded_rows = round_up(tile_rows, MR);
    float* tile_queries = scratch.take<float>(padded_rows * column);

    int64_t limit = 0;
    for (int64_t i = 0; i < rows; ++i)
        limit = maximum(limit, visible_to(p, b, group, queries.begin + i).limit);
    const int64_t length = round_up(limit, NR);
    float* scores = scratch.take<float>(rows * sharing * length);  // [rows, sharing, length]

    const bool trivial = !p.mask && limit <= p.top_k;
    alignas(64) float tile[MR * NR];
    const Strides& s = p.query_strides;
    for (int64_t k = 0; k < kv_heads && !trivial; ++k) {
        const int64_t first_head = group * sharing + k * heads_per_kv;
        const float* head_keys =
            packed + (b * p.kv_heads + first_head / per_kv_head) * panel_count(p) * column * NR;
        for (int64_t start = 0; start < padded_rows; start += MR)
            for (int64_t r = 0; r < MR; ++r) {
                int64_t row = start + r, i = row / heads_per_kv, h = row % heads_per_kv;
                float* to = tile_queries + start * column + r;
                const T* from = static_cast<const T*>(p.query) + b * s.b + (first_head + h) * s.h +
                                (queries.begin + i) * s.t;
                if (row < tile_rows)
                    Tile::template pack_column<true>(to, MR, from, s.d, p.head_dim, word_count,
                                                     sign_of(p.scale));
                else
                    for (int64_t w = 0; w < column; ++w) to[w * MR] = 0.0f;
            }
        for (int64_t base = 0; base < length; base += NR)
            for (int64_t start = 0; start < padded_rows; start += MR) {
                score_tile<Tile, false>(tile, tile_queries + start * column, head_keys + base * column,
                                        word_count, nullptr, nullptr);
                for (int64_t r = 0; r < minimum<int64_t>(MR, tile_rows - start); ++r) {
                    int64_t row = start + r, i = row / heads_per_kv,
                            h = k * heads_per_kv + row % heads_per_kv;
                    memcpy(scores + (i * sharing + h) * length + base, tile + r * NR, NR * 4);
                }
            }
    }

    int32_t* out = p.indices + ((b * p.groups + group) * p.query_length + queries.begin) * p.top_k;
    float* weight = scratch.take<float>(sharing);
    for (int64_t i = 0; i < rows; ++i, out += p.top_k) {
        const Visible v = visible_to(p, b, group, queries.begin + i);
        c.count = 0;
        c.keep = static_cast<int32_t>(p.top_k - forced_count(v));
        if (c.keep > 0 && !v.mask && v.end - v.sink_end <= c.keep) {
            for (int64_t j = v.sink_end; j < v.end; ++j) c.indices[c.count++] = static_cast<int32_t>(j);
        } else if (c.keep > 0) {
            float* row = scores + i * sharing * length;
            const int64_t row_length = minimum(length, round_up(v.limit, W));
            for (int64_t h = 0; h < sharing; ++h)
                weight[h] = exponentiate(row + h * length, v, row_length, __builtin_fabsf(p.scale));
            float threshold = open_threshold();
            for (int64_t j = v.sink_end / W * W; j < v.end; j += W) {
                Vec mass = zero();
                for (int64_t h = 0; h < sharing; ++h)
                    mass = fma(load(row + h * length + j), broadcast(weight[h]), mass);
                uint32_t bits = not_le(mass, broadcast(threshold)) & candidate_bits(v, j, W);
                if (!bits) continue;
                c.count +=
                    append(c.scores + c.count, c.indices + c.count, bits, mass, static_cast<int32_t>(j));
                if (c.count > full) threshold = keep_best<true>(c, keys);
            }
            keep_best<false>(c, keys);
        }
        emit(out, p.top_k, v, c.indices, c.count);
    }
}

void select(const SelectParams& p, int64_t b, int64_t group, Range queries, const void* packed,
            void* scratch) {
    const float* keys = static_cast<const float*>(packed);
    with_tile(p, [&]<class T, class Tile>() {
        if (shared_heads(p) > 1)
            select_shared<T, Tile>(p, b, group, queries, keys, scratch);
        else
            select_rows<T, Tile>(p, b, group, queries, keys, scratch);
    });
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
