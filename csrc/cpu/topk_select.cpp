// topk_select: scores in tiles, compared with each query's running threshold while they are hot.
//
// A tile is MR queries × NR keys of dot products, accumulated over D in registers from keys packed in panels
// of NR. Where the heads have their own selections (R = 1) the tile never leaves the first-level cache: what
// beats the threshold goes to the query's candidates. Where R heads share one, the tiles of a few queries are
// stored as rows [R, Tk], turned into softmax probabilities, summed over the heads, and the sums are streamed
// the same way.
#include "candidates.h"
#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int W = Vec::W;
#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;  // 12 of 16
#else
constexpr int MR = 4, NV = 2;
#endif
constexpr int NR = NV * W;
constexpr int kRowGroups = 4;  // row groups that share one pass over the panels
constexpr int kBlockRows = MR * kRowGroups;

// ---- packing: words of 4 bytes, one float or a pair of bfloat16
// -------------------------------------------------

struct FloatTile {
    static constexpr int kDepth = 1;
    template <class T>
    static SPARSE_ATTN_INLINE float word(const T* row, int64_t stride, int64_t w, int64_t, float sign) {
        return to_float(row[w * stride]) * sign;
    }
    static SPARSE_ATTN_INLINE Vec multiply_add(const float* a, const float* b, Vec c) {
        return fma(broadcast(*a), load(b), c);
    }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 multiplied and added to float32 in one instruction.
struct BFloat16Tile {
    static constexpr int kDepth = 2;
    static SPARSE_ATTN_INLINE uint32_t half(bfloat16 x, float sign) {
        if (sign == 1.0f) return x.bits;
        return round_to_bfloat16(to_float(x) * sign);
    }
    static SPARSE_ATTN_INLINE float word(const bfloat16* row, int64_t stride, int64_t w, int64_t n,
                                         float sign) {
        uint32_t low = half(row[2 * w * stride], sign);
        uint32_t high = 2 * w + 1 < n ? half(row[(2 * w + 1) * stride], sign) : 0u;
        return float_of(low | high << 16);
    }
    static SPARSE_ATTN_INLINE Vec multiply_add(const float* a, const float* b, Vec c) {
        __m512 pair = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits_of(*a))));
        return {_mm512_dpbf16_ps(c.v, (__m512bh)pair, (__m512bh)load(b).v)};
    }
};
#else
using BFloat16Tile = FloatTile;
#endif

template <class T>
struct TileOf {
    using type = FloatTile;
};
template <>
struct TileOf<bfloat16> {
    using type = BFloat16Tile;
};

SPARSE_ATTN_INLINE int64_t words(const SelectParams& p) {
    int64_t depth = p.dtype == DType::kBFloat16 ? BFloat16Tile::kDepth : 1;
    return (p.head_dim + depth - 1) / depth;
}

int64_t panel_count(const SelectParams& p) {
    return (p.key_length + NR - 1) / NR;
}
int64_t packed_head_bytes(const SelectParams& p) {
    return panel_count(p) * words(p) * NR * 4;
}

// to[w][j] = word w of row j, for `rows` rows padded with zeros to `width`.
template <class T>
SPARSE_ATTN_INLINE void pack(float* to, int64_t width, const T* from, int64_t rows, int64_t row_stride,
                             int64_t stride, int64_t head_dim, int64_t word_count, float sign) {
    using Tile = typename TileOf<T>::type;
    for (int64_t j = 0; j < rows; ++j)
        for (int64_t w = 0; w < word_count; ++w)
            to[w * width + j] = Tile::word(from + j * row_stride, stride, w, head_dim, sign);
    for (int64_t w = 0; w < word_count; ++w)
        for (int64_t j = rows; j < width; ++j) to[w * width + j] = 0.0f;
}

template <class T>
void pack_keys_of(const SelectParams& p, int64_t b, int64_t kv_head, Range panels, float* packed) {
    const Strides& s = p.key_strides;
    const T* key = static_cast<const T*>(p.key) + b * s.b + kv_head * s.h;
    for (int64_t n = panels.begin; n < panels.end; ++n) {
        int64_t first = n * NR;
        pack<T>(packed + n * words(p) * NR, NR, key + first * s.t, minimum<int64_t>(NR, p.key_length - first),
                s.t, s.d, p.head_dim, words(p), 1.0f);
    }
}

void pack_keys(const SelectParams& p, int64_t b, int64_t kv_head, Range panels, void* packed_head) {
    float* packed = static_cast<float*>(packed_head);
    if (p.dtype == DType::kFloat32) pack_keys_of<float>(p, b, kv_head, panels, packed);
    if (p.dtype == DType::kBFloat16) pack_keys_of<bfloat16>(p, b, kv_head, panels, packed);
    if (p.dtype == DType::kFloat16) pack_keys_of<float16>(p, b, kv_head, panels, packed);
}

// ---- what a query may see
// ---------------------------------------------------------------------------------------

// Keys [0, sink_end) and [end, limit) are forced where the mask lets them, [sink_end, end) are candidates.
struct Visible {
    int64_t sink_end, end, limit;
    const uint8_t* mask;  // its row, or null
    int64_t mask_stride;
};

SPARSE_ATTN_INLINE Visible visible_to(const SelectParams& p, int64_t b, int64_t group, int64_t query) {
    Visible v;
    v.limit = p.lengths ? p.lengths[b] : p.key_length;
    v.end = v.limit;
    if (p.is_causal) {
        int64_t causal_end = query + p.causal_offset + 1;
        v.limit = clamp<int64_t>(causal_end, 0, v.limit);
        v.end = clamp<int64_t>(causal_end - p.window, 0, v.limit);
    }
    v.sink_end = minimum(p.sinks, v.limit);
    v.end = maximum(v.end, v.sink_end);
    const Strides& s = p.mask_strides;
    v.mask = p.mask ? p.mask + b * s.b + group * s.h + query * s.t : nullptr;
    v.mask_stride = s.d;
    return v;
}

SPARSE_ATTN_INLINE bool allowed(const Visible& v, int64_t key) {
    return !v.mask || v.mask[key * v.mask_stride];
}

SPARSE_ATTN_INLINE int64_t forced_count(const Visible& v) {
    if (!v.mask) return v.sink_end + (v.limit - v.end);
    int64_t n = 0;
    for (int64_t j = 0; j < v.sink_end; ++j) n += allowed(v, j);
    for (int64_t j = v.end; j < v.limit; ++j) n += allowed(v, j);
    return n;
}

// Which of the `width` keys from `first` on are candidates.
SPARSE_ATTN_INLINE uint32_t candidate_bits(const Visible& v, int64_t first, int64_t width) {
    uint32_t bits = low_bits(clamp<int64_t>(v.end - first, 0, width)) &
                    ~low_bits(clamp<int64_t>(v.sink_end - first, 0, width));
    if (!v.mask || !bits) return bits;
    uint32_t open = 0;
    if (v.mask_stride == 1 && first + width <= v.limit) {
        for (int64_t i = 0; i < width; i += W) open |= nonzero_bytes(v.mask + first + i) << i;
    } else {
        for (uint32_t left = bits; left; left &= left - 1) {
            int64_t i = __builtin_ctz(left);
            if (allowed(v, first + i)) open |= 1u << i;
        }
    }
    return bits & open;
}

// Writes one query's row: forced sinks, the chosen, forced window; ascending, then −1.
SPARSE_ATTN_INLINE void emit(int32_t* row, int64_t slots, const Visible& v, const int32_t* chosen,
                             int64_t count) {
    int64_t n = 0;
    for (int64_t j = 0; j < v.sink_end; ++j)
        if (allowed(v, j)) row[n++] = static_cast<int32_t>(j);
    memcpy(row + n, chosen, static_cast<size_t>(count) * 4);
    n += count;
    for (int64_t j = v.end; j < v.limit; ++j)
        if (allowed(v, j)) row[n++] = static_cast<int32_t>(j);
    for (; n < slots; ++n) row[n] = -1;
}

// ---- the tile
// ---------------------------------------------------------------------------------------------------

// tile[r][j] = dot product of query r and key j of the panel, and, if wanted, bit j of beats[r]: it is not <=
// the row's threshold. Returns the rows with any bit. Not inlined: the accumulators need all registers.
template <class Tile, bool kCompare>
__attribute__((noinline)) uint32_t score_tile(float* tile, const float* queries, const float* panel,
                                              int64_t word_count, const float* threshold, uint32_t* beats) {
    Vec acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = zero();
    for (int64_t w = 0; w < word_count; ++w) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                acc[r][v] = Tile::multiply_add(queries + w * MR + r, panel + w * NR + v * W, acc[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(tile + r * NR + v * W, acc[r][v]);
    uint32_t rows = 0;
    if constexpr (kCompare) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            const Vec bound = broadcast(threshold[r]);
            uint32_t bits = 0;
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) bits |= not_le(acc[r][v], bound) << (v * W);
            beats[r] = bits;
            rows |= static_cast<uint32_t>(bits != 0) << r;
        }
    }
    return rows;
}

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
    return shared_heads(p) == 1 ? kBlockRows : shared_queries(p);
}

int64_t select_scratch_bytes(const SelectParams& p) {
    int64_t buffer = candidate_capacity(p.top_k) + kSlack;
    int64_t rows = shared_heads(p) == 1 ? kBlockRows : 1;
    int64_t query_rows = kBlockRows;
    int64_t stored = 0;
    if (shared_heads(p) > 1) {
        query_rows = round_up(shared_queries(p) * shared_heads(p), MR);
        stored = shared_queries(p) * shared_heads(p) * (panel_count(p) * NR * 4 + 64);
    }
    return rows * (buffer * 8 + 128) + buffer * 4 + (query_rows + MR) * words(p) * 4 + stored + 1024;
}

// Rows of one head: tiles stay in registers.
template <class T>
void select_rows(const SelectParams& p, int64_t b, int64_t head, Range queries, const float* packed,
                 void* memory) {
    using Tile = typename TileOf<T>::type;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t word_count = words(p), rows = queries.end - queries.begin;
    const int64_t buffer = candidate_capacity(p.top_k) + kSlack;
    const int32_t full = static_cast<int32_t>(candidate_capacity(p.top_k));
    int32_t* keys = scratch.take<int32_t>(buffer);
    float* tile_queries = scratch.take<float>(kBlockRows * word_count);
    Candidates candidates[kBlockRows];
    Visible visible[kBlockRows];
    float threshold[kBlockRows];
    alignas(64) float tile[MR * NR];
    uint32_t beats[MR];
    bool scored[kBlockRows];
    // Per row group: where any scored row needs tiles, and where all lanes of all its rows count.
    Range needed[kRowGroups], inner[kRowGroups];

    for (int g = 0; g < kRowGroups; ++g) {
        needed[g] = {INT64_MAX, 0};
        inner[g] = {0, INT64_MAX};
        for (int r = 0; r < MR; ++r) {
            int64_t i = g * MR + r;
            candidates[i] = {scratch.take<float>(buffer), scratch.take<int32_t>(buffer), 0, 0};
            scored[i] = false;
            threshold[i] = closed_threshold();
            if (i >= rows) continue;
            visible[i] = visible_to(p, b, head, queries.begin + i);
            Visible& v = visible[i];
            candidates[i].keep = static_cast<int32_t>(p.top_k - forced_count(v));
            scored[i] = candidates[i].keep > 0 && v.end > v.sink_end &&
                        (v.mask || v.end - v.sink_end > candidates[i].keep);
            if (!scored[i]) continue;
            threshold[i] = open_threshold();
            needed[g] = {minimum(needed[g].begin, v.sink_end), maximum(needed[g].end, v.end)};
            inner[g] = {maximum(inner[g].begin, v.sink_end), minimum(inner[g].end, v.end)};
        }
        if (p.mask) inner[g].end = 0;
    }

    Range panels{INT64_MAX, 0};
    for (int g = 0; g < kRowGroups; ++g) {
        if (needed[g].end == 0) continue;
        panels = {minimum(panels.begin, needed[g].begin / NR),
                  maximum(panels.end, (needed[g].end + NR - 1) / NR)};
        const Strides& s = p.query_strides;
        const T* first =
            static_cast<const T*>(p.query) + b * s.b + head * s.h + (queries.begin + g * MR) * s.t;
        pack<T>(tile_queries + g * MR * word_count, MR, first, minimum<int64_t>(MR, rows - g * MR), s.t, s.d,
                p.head_dim, word_count, sign_of(p.scale));
    }

    for (int64_t n = panels.begin; n < panels.end; ++n) {
        const int64_t base = n * NR;
        const float* panel = packed + n * word_count * NR;
        for (int g = 0; g < kRowGroups; ++g) {
            if (base >= needed[g].end || base + NR <= needed[g].begin) continue;
            uint32_t beaten = score_tile<Tile, true>(tile, tile_queries + g * MR * word_count, panel,
                                                     word_count, threshold + g * MR, beats);
            const bool all_lanes = base >= inner[g].begin && base + NR <= inner[g].end;
            for (; beaten; beaten &= beaten - 1) {
                const int r = __builtin_ctz(beaten), i = g * MR + r;
                uint32_t bits = beats[r];
                if (!all_lanes) bits &= scored[i] ? candidate_bits(visible[i], base, NR) : 0u;
                if (!bits) continue;
                Candidates& c = candidates[i];
                int32_t count = c.count;
                if ((bits & (bits - 1)) == 0) {
                    // The usual case once the threshold is good: one survivor.
                    const int lane = __builtin_ctz(bits);
                    c.scores[count] = tile[r * NR + lane];
                    c.indices[count++] = static_cast<int32_t>(base) + lane;
                } else {
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v)
                        count += append(c.scores + count, c.indices + count, bits >> (v * W) & low_bits(W),
                                        load(tile + r * NR + v * W), static_cast<int32_t>(base + v * W));
                }
                c.count = count;
                if (count > full) threshold[i] = keep_best(c, keys);
            }
        }
    }

    int32_t* out = p.indices + ((b * p.groups + head) * p.query_length + queries.begin) * p.top_k;
    for (int64_t i = 0; i < rows; ++i, out += p.top_k) {
        Candidates& c = candidates[i];
        Visible& v = visible[i];
        if (scored[i]) {
            keep_best(c, keys);
        } else if (c.keep > 0) {
            for (int64_t j = v.sink_end; j < v.end; ++j) c.indices[c.count++] = static_cast<int32_t>(j);
        }
        emit(out, p.top_k, v, c.indices, c.count);
    }
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

template <class T>
void select_shared(const SelectParams& p, int64_t b, int64_t group, Range queries, const float* packed,
                   void* memory) {
    using Tile = typename TileOf<T>::type;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t word_count = words(p), sharing = shared_heads(p), per_kv_head = p.heads / p.kv_heads;
    const int64_t rows = queries.end - queries.begin, buffer = candidate_capacity(p.top_k) + kSlack;
    const int32_t full = static_cast<int32_t>(candidate_capacity(p.top_k));
    int32_t* keys = scratch.take<int32_t>(buffer);
    Candidates c{scratch.take<float>(buffer), scratch.take<int32_t>(buffer), 0, 0};
    // Rows of one key head are (query, head) pairs; a group covers whole key heads, or is one.
    const int64_t kv_heads = maximum<int64_t>(1, sharing / per_kv_head), heads_per_kv = sharing / kv_heads;
    const int64_t tile_rows = rows * heads_per_kv, padded_rows = round_up(tile_rows, MR);
    float* tile_queries = scratch.take<float>(padded_rows * word_count);

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
            packed + (b * p.kv_heads + first_head / per_kv_head) * panel_count(p) * word_count * NR;
        for (int64_t start = 0; start < padded_rows; start += MR)
            for (int64_t r = 0; r < MR; ++r) {
                int64_t row = start + r, i = row / heads_per_kv, h = row % heads_per_kv;
                float* to = tile_queries + start * word_count + r;
                const T* from = static_cast<const T*>(p.query) + b * s.b + (first_head + h) * s.h +
                                (queries.begin + i) * s.t;
                for (int64_t w = 0; w < word_count; ++w)
                    to[w * MR] =
                        row < tile_rows ? Tile::word(from, s.d, w, p.head_dim, sign_of(p.scale)) : 0.0f;
            }
        for (int64_t base = 0; base < length; base += NR)
            for (int64_t start = 0; start < padded_rows; start += MR) {
                score_tile<Tile, false>(tile, tile_queries + start * word_count,
                                        head_keys + base * word_count, word_count, nullptr, nullptr);
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
                if (c.count > full) threshold = keep_best(c, keys);
            }
            keep_best(c, keys);
        }
        emit(out, p.top_k, v, c.indices, c.count);
    }
}

template <class T>
void select_of(const SelectParams& p, int64_t b, int64_t group, Range queries, const void* packed,
               void* scratch) {
    const float* keys = static_cast<const float*>(packed);
    if (shared_heads(p) > 1) return select_shared<T>(p, b, group, queries, keys, scratch);
    int64_t kv_head = group / (p.heads / p.kv_heads);
    select_rows<T>(p, b, group, queries, keys + (b * p.kv_heads + kv_head) * panel_count(p) * words(p) * NR,
                   scratch);
}

void select(const SelectParams& p, int64_t b, int64_t group, Range queries, const void* packed,
            void* scratch) {
    if (p.dtype == DType::kFloat32) select_of<float>(p, b, group, queries, packed, scratch);
    if (p.dtype == DType::kBFloat16) select_of<bfloat16>(p, b, group, queries, packed, scratch);
    if (p.dtype == DType::kFloat16) select_of<float16>(p, b, group, queries, packed, scratch);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
