// Attention by dense tiles, backward, in one walk over tiles of queries × keys. With P = e^(s − LSE) where a
// bit is set, else 0, dP = dO·Vᵀ and δ = Σ dO∘out − dLSE:
//     dS = P ∘ (dP − δ)   dV = Pᵀ·dO   dK = scale · dSᵀ·Q   dQ = scale · dS·K
// With a soft cap s is the capped score, and dS has the factor 1 − (s / cap)².
//
// A task owns a part of one head's keys, whose gradients it adds up tile by tile, all query heads and queries
// in order. Each part adds to a dQ of its own; those are summed in order at the end. The parts depend on the
// shapes alone, so the result does not depend on the number of threads.
#include "lib/elementary.h"
#include "lib/gemm_tile.h"
#include "masked_attention.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {
namespace {

// Whole tiles whichever side of a product they are: multiples of kTileRows, kTileCols and 32.
constexpr int64_t kQueries = 60, kKeys = 96;
static_assert(kQueries % kTileRows == 0 && kKeys % kTileRows == 0 && kKeys % kTileCols == 0 &&
              kKeys % 32 == 0);

int64_t padded_rows(int64_t rows) {
    return round_up(rows, kQueries);
}
int64_t padded_width(int64_t width) {
    return round_up(width, kTileCols);
}

template <class T>
SPARSE_ATTN_INLINE const T* at(const void* base, const Strides& s, int64_t b, int64_t h, int64_t t) {
    return static_cast<const T*>(base) + b * s.b + h * s.h + t * s.t;
}

// factor · row, zeros behind; whether it holds NaN or an infinity.
template <class T>
SPARSE_ATTN_INLINE bool put_row(float* to, const T* from, int64_t stride, int64_t width, float factor) {
    if (stride == 1)
        load_row(to, from, width);
    else
        load_row(to, from, width, stride);
    for (int64_t d = width; d < padded_width(width); ++d) to[d] = 0.0f;
    Vec unusual = zero();
    for (int64_t d = 0; d < padded_width(width); d += Vec::W) {
        const Vec x = load(to + d);
        unusual = unusual + (x - x);
        store(to + d, x * broadcast(factor));
    }
    return is_nan(unusual) != 0;
}

// ---- before the walk: rows of a head as the products want them

template <class T>
void prepare_rows(const MaskedBackwardParams& p, int64_t b, int64_t h, Range rows) {
    const AttendParams& f = p.forward;
    const int64_t wide = padded_width(f.head_dim), wide_v = padded_width(f.value_dim);
    const int64_t first = (b * f.heads + h) * padded_rows(f.query_length);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        float *query = p.queries + (first + i) * wide, *grad = p.grads + (first + i) * wide_v;
        if (i >= f.query_length) {
            memset(query, 0, static_cast<size_t>(wide) * 4);
            memset(grad, 0, static_cast<size_t>(wide_v) * 4);
            p.centre[first + i] = 0.0f;
            p.lse[first + i] = __builtin_inff();
            p.special[first + i] = 0;
            continue;
        }
        bool special =
            put_row(query, at<T>(f.query, f.query_strides, b, h, i), f.query_strides.d, f.head_dim, f.scale);
        special |= put_row(grad, at<T>(p.grad_out, p.grad_out_strides, b, h, i), p.grad_out_strides.d,
                           f.value_dim, 1.0f);
        const T* out = at<T>(p.out, p.out_strides, b, h, i);
        float centre = 0.0f;
        for (int64_t d = 0; d < f.value_dim; ++d) centre += grad[d] * to_float(out[d * p.out_strides.d]);
        const int64_t row = (b * f.heads + h) * f.query_length + i;
        const bool dead = f.lse[row] == -__builtin_inff();
        p.centre[first + i] = dead ? 0.0f : centre - (p.grad_lse ? p.grad_lse[row] : 0.0f);
        p.lse[first + i] = dead ? __builtin_inff() : f.lse[row];
        p.special[first + i] = special;
    }
}

// ---- products. Not inlined: the accumulators need all registers.

__attribute__((noinline)) void by_columns(float* c, const float* a, int64_t a_row, const float* b,
                                          int64_t depth) {
    multiply_tile<false>(c, kKeys, a, a_row, 1, b, kTileCols, depth);
}
__attribute__((noinline)) void add_rows(float* c, int64_t ldc, const float* a, int64_t a_row, int64_t a_depth,
                                        const float* b, int64_t ldb, int64_t depth) {
    multiply_tile<true>(c, ldc, a, a_row, a_depth, b, ldb, depth);
}

// c [kQueries, kKeys] = rows [kQueries, stride] · packed columns, the first `keys` of them.
SPARSE_ATTN_INLINE void score(float* c, const float* rows, int64_t stride, const float* columns, int64_t keys,
                              int64_t depth) {
    for (int64_t j = 0; j < keys; j += kTileCols)
        for (int64_t r = 0; r < kQueries; r += kTileRows)
            by_columns(c + r * kKeys + j, rows + r * stride, stride, columns + j * depth, depth);
}

// c [count, stride] += weights · rows, weight (i, k) at i·w_row + k·w_depth. Where a row is special, weights
// of 0 are left out: 0 · NaN is NaN, and no part of those sums.
inline void add_weighted(float* c, int64_t stride, int64_t count, const float* weights, int64_t w_row,
                         int64_t w_depth, const float* rows, int64_t depth, bool special) {
    if (special) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t d = 0; d < stride; d += Vec::W) {
                Vec sum_of = zero();
                for (int64_t k = 0; k < depth; ++k) {
                    const float w = weights[i * w_row + k * w_depth];
                    if (w != 0.0f) sum_of = fma(broadcast(w), load(rows + k * stride + d), sum_of);
                }
                store(c + i * stride + d, load(c + i * stride + d) + sum_of);
            }
        return;
    }
    for (int64_t d = 0; d < stride; d += kTileCols)
        for (int64_t i = 0; i < count; i += kTileRows)
            add_rows(c + i * stride + d, stride, weights + i * w_row, w_row, w_depth, rows + d, stride,
                     depth);
}

// ---- the walk

struct Tile {
    float *probability, *grad;  // [kQueries, kKeys]: q·k and dO·v, then P and dS
    const uint32_t* bits;       // of the first query and key; rows at `bit_stride`
    int64_t bit_stride, words, rows;
    const float *lse, *centre;
    int64_t first;  // key
    const float *tail, *share;
    const int32_t* seen;
    const bfloat16* counts;  // rows at `bit_stride`, where they are there
};

// How many of the tile's keys, in whole words, reach to the last that a row of it counts; 0: none is.
SPARSE_ATTN_INLINE int64_t keys_in_use(const Tile& t) {
    int64_t words = 0;
    if (t.seen) {
        for (int64_t r = 0; r < t.rows; ++r)
            if (t.seen[2 * r] < t.first + kKeys)
                words = maximum(words, (clamp<int64_t>(t.seen[2 * r + 1] - t.first, 0, kKeys) + 31) / 32);
        return words * 32;
    }
    for (int64_t w = t.words; w > 0; --w) {
        uint32_t any = 0;
        for (int64_t r = 0; r < t.rows; ++r) any |= t.bits[r * t.bit_stride + w - 1];
        if (any) return w * 32;
    }
    return 0;
}

// What counts in a row: chosen keys; all that are seen; each as often as a number says.
enum class Counts { kChosen, kSeen, kTimes };

// P and dS of the first `keys` keys, whole words; zeros behind them up to whole rows of tiles.
template <bool kCapped, Counts kCounts>
SPARSE_ATTN_INLINE void weigh(const Tile& t, int64_t keys, float cap) {
    const Vec nothing = broadcast(-__builtin_inff());
    for (int64_t r = 0; r < kQueries; ++r) {
        const Vec lse = broadcast(t.lse[r]), centre = broadcast(t.centre[r]);
        for (int64_t j = keys; j < round_up(keys, kTileRows); j += Vec::W) {
            store(t.probability + r * kKeys + j, zero());
            store(t.grad + r * kKeys + j, zero());
        }
        for (int64_t w = 0; w < keys / 32; ++w) {
            const uint32_t word = t.bits && r < t.rows && w < t.words ? t.bits[r * t.bit_stride + w] : 0u;
            uint32_t seen = 0;
            if (kCounts == Counts::kSeen && r < t.rows) {
                const int64_t key = t.first + w * 32;
                seen = low_bits(clamp<int64_t>(t.seen[2 * r + 1] - key, 0, 32)) &
                       ~low_bits(clamp<int64_t>(t.seen[2 * r] - key, 0, 32));
            }
            for (int64_t j = 0; j < 32; j += Vec::W) {
                float *s = t.probability + r * kKeys + w * 32 + j, *g = t.grad + r * kKeys + w * 32 + j;
                const uint32_t bits = word >> j & low_bits(Vec::W);
                Vec score = load(s);
                if (kCapped) score = tanh(score / broadcast(cap)) * broadcast(cap);
                if (kCounts == Counts::kTimes) {
                    const Vec times = r < t.rows ? load(t.counts + r * t.bit_stride + w * 32 + j) : zero();
                    const uint32_t some = not_le(times, zero());
                    const Vec p = exp(where(some, score - lse, nothing)) * times;
                    Vec d = p * (load(g) - centre);
                    if (kCapped) d = d * cap_slope(score, 1.0f / cap);
                    store(s, p);
                    store(g, where(some, d, zero()));
                    continue;
                }
                if (kCounts == Counts::kSeen) {
                    // dP is that of the value which the left out have, and they weigh what one of them does.
                    const uint32_t lanes = seen >> j & low_bits(Vec::W), kept = bits & lanes;
                    const Vec p = exp(where(lanes, score - lse, nothing));
                    Vec d = p * (where(kept, load(g), broadcast(t.tail[r])) - centre);
                    if (kCapped) d = d * cap_slope(score, 1.0f / cap);
                    store(s, where(kept, p, where(lanes, broadcast(t.share[r]), zero())));
                    store(g, where(lanes, d, zero()));
                    continue;
                }
                const Vec p = exp(where(bits, score - lse, nothing));
                Vec d = p * (load(g) - centre);
                if (kCapped) d = d * cap_slope(score, 1.0f / cap);
                store(s, p);
                store(g, where(bits, d, zero()));
            }
        }
    }
}

template <Counts kCounts>
SPARSE_ATTN_INLINE void weigh_as(const Tile& t, int64_t keys, float cap) {
    if (cap > 0)
        weigh<true, kCounts>(t, keys, cap);
    else
        weigh<false, kCounts>(t, keys, 0.0f);
}

SPARSE_ATTN_INLINE Range part_of(const MaskedBackwardParams& p, int64_t part) {
    const int64_t tiles = (p.forward.key_length + kKeys - 1) / kKeys;
    return {tiles * part / p.parts, tiles * (part + 1) / p.parts};
}

template <class T>
void walk(const MaskedBackwardParams& p, int64_t b, int64_t kv_head, int64_t part, void* memory) {
    const AttendParams& f = p.forward;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t wide = padded_width(f.head_dim), wide_v = padded_width(f.value_dim);
    const int64_t sharing = f.heads / f.kv_heads, per_group = f.heads / f.groups,
                  all = padded_rows(f.query_length);
    float* key_rows = scratch.take<float>(kKeys * wide);
    float* value_rows = scratch.take<float>(kKeys * wide_v);
    float* key_columns = scratch.take<float>(kKeys * f.head_dim);
    float* value_columns = scratch.take<float>(kKeys * f.value_dim);
    float* grad_key = scratch.take<float>(kKeys * wide);
    float* grad_value = scratch.take<float>(kKeys * wide_v);
    float* probability = scratch.take<float>(kQueries * kKeys);
    float* grad = scratch.take<float>(kQueries * kKeys);
    for (int64_t h = kv_head * sharing; h < (kv_head + 1) * sharing; ++h)
        memset(p.sums + ((part * f.batch + b) * f.heads + h) * all * wide, 0,
               static_cast<size_t>(all * wide) * 4);

    const Range tiles = part_of(p, part);
    for (int64_t n = tiles.begin; n < tiles.end; ++n) {
        const int64_t first = n * kKeys, count = minimum(kKeys, f.key_length - first);
        bool special_keys = false;
        for (int64_t j = 0; j < kKeys; ++j) {
            if (j < count) {
                special_keys |=
                    put_row(key_rows + j * wide, at<T>(f.key, f.key_strides, b, kv_head, first + j),
                            f.key_strides.d, f.head_dim, 1.0f);
                put_row(value_rows + j * wide_v, at<T>(f.value, f.value_strides, b, kv_head, first + j),
                        f.value_strides.d, f.value_dim, 1.0f);
            } else {
                memset(key_rows + j * wide, 0, static_cast<size_t>(wide) * 4);
                memset(value_rows + j * wide_v, 0, static_cast<size_t>(wide_v) * 4);
            }
        }
        pack_cols(key_columns, key_rows, f.head_dim, 1, kKeys, wide);
        pack_cols(value_columns, value_rows, f.value_dim, 1, kKeys, wide_v);
        memset(grad_key, 0, static_cast<size_t>(kKeys * wide) * 4);
        memset(grad_value, 0, static_cast<size_t>(kKeys * wide_v) * 4);

        for (int64_t h = kv_head * sharing; h < (kv_head + 1) * sharing; ++h) {
            const int64_t words = bit_words(f.key_length), head = b * f.heads + h;
            const int64_t list = (b * f.groups + h / per_group) * f.query_length;
            float* sums = p.sums + ((part * f.batch + b) * f.heads + h) * all * wide;
            for (int64_t i = 0; i < f.query_length; i += kQueries) {
                const int64_t row = head * all + i;
                const Tile t{probability,
                             grad,
                             p.bits ? p.bits + (list + i) * words + first / 32 : nullptr,
                             p.counts ? p.count_stride : words,
                             minimum<int64_t>(kKeys / 32, words - first / 32),
                             minimum(kQueries, f.query_length - i),
                             p.lse + row,
                             p.centre + row,
                             first,
                             p.tail ? p.tail + row : nullptr,
                             p.tail ? p.share + row : nullptr,
                             p.seen ? p.seen + 2 * row : nullptr,
                             p.counts ? reinterpret_cast<const bfloat16*>(p.counts) +
                                            (list + i) * p.count_stride + first
                                      : nullptr};
                const int64_t keys = keys_in_use(t), padded = round_up(keys, kTileRows);
                if (keys == 0) continue;
                bool special = false;
                for (int64_t r = 0; r < kQueries; ++r) special |= p.special[row + r] != 0;
                const float *queries = p.queries + row * wide, *grads = p.grads + row * wide_v;
                score(probability, queries, wide, key_columns, keys, f.head_dim);
                score(grad, grads, wide_v, value_columns, keys, f.value_dim);
                if (p.counts)
                    weigh_as<Counts::kTimes>(t, keys, f.softcap);
                else if (p.tail)
                    weigh_as<Counts::kSeen>(t, keys, f.softcap);
                else
                    weigh_as<Counts::kChosen>(t, keys, f.softcap);
                add_weighted(grad_value, wide_v, padded, probability, 1, kKeys, grads, kQueries, special);
                add_weighted(grad_key, wide, padded, grad, 1, kKeys, queries, kQueries, special);
                add_weighted(sums + i * wide, wide, kQueries, grad, kKeys, 1, key_rows, keys, special_keys);
            }
        }
        const int64_t row = (b * f.kv_heads + kv_head) * f.key_length + first;
        for (int64_t j = 0; j < count; ++j) {
            store_row(static_cast<T*>(p.grad_key) + (row + j) * f.head_dim, grad_key + j * wide, f.head_dim);
            store_row(static_cast<T*>(p.grad_value) + (row + j) * f.value_dim, grad_value + j * wide_v,
                      f.value_dim);
        }
    }
}

template <class T>
void finish_rows(const MaskedBackwardParams& p, int64_t b, int64_t h, Range rows) {
    const AttendParams& f = p.forward;
    const int64_t wide = padded_width(f.head_dim), all = padded_rows(f.query_length), head = b * f.heads + h;
    const int64_t part = f.batch * f.heads * all * wide;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        float* sum_of = p.sums + (head * all + i) * wide;
        for (int64_t n = 1; n < p.parts; ++n)
            for (int64_t d = 0; d < wide; d += Vec::W)
                store(sum_of + d, load(sum_of + d) + load(sum_of + n * part + d));
        for (int64_t d = 0; d < wide; d += Vec::W) store(sum_of + d, load(sum_of + d) * broadcast(f.scale));
        T* to = static_cast<T*>(p.grad_query) + (head * f.query_length + i) * f.head_dim;
        if (p.adds)
            for (int64_t d = 0; d < f.head_dim; ++d) sum_of[d] += to_float(to[d]);
        store_row(to, sum_of, f.head_dim);
    }
}

template <class F>
void with_dtype(DType dtype, const F& f) {
    if (dtype == DType::kFloat32) f(float{});
    if (dtype == DType::kBFloat16) f(bfloat16{});
    if (dtype == DType::kFloat16) f(float16{});
}

}  // namespace

void masked_prepare(const MaskedBackwardParams& p, int64_t b, int64_t head, Range rows) {
    with_dtype(p.forward.dtype, [&](auto type) { prepare_rows<decltype(type)>(p, b, head, rows); });
}

int64_t masked_backward_scratch_bytes(const MaskedBackwardParams& p) {
    const AttendParams& f = p.forward;
    const int64_t wide = padded_width(f.head_dim), wide_v = padded_width(f.value_dim);
    return 4 * (kKeys * (3 * wide + 3 * wide_v) + 2 * kQueries * kKeys) + 1024;
}

void masked_part(const MaskedBackwardParams& p, int64_t b, int64_t kv_head, int64_t part, void* scratch) {
    with_dtype(p.forward.dtype, [&](auto type) { walk<decltype(type)>(p, b, kv_head, part, scratch); });
}

void masked_finish(const MaskedBackwardParams& p, int64_t b, int64_t head, Range rows) {
    with_dtype(p.forward.dtype, [&](auto type) { finish_rows<decltype(type)>(p, b, head, rows); });
}

SPARSE_ATTN_KERNELS(masked_attention_backward, MaskedBackwardKernels) = {
    .padded_rows = padded_rows,
    .padded_width = padded_width,
    .prepare = masked_prepare,
    .scratch_bytes = masked_backward_scratch_bytes,
    .part = masked_part,
    .finish = masked_finish,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
