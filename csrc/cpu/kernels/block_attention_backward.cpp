// block_attention, backward, in two passes that are the same for any number of threads. With P = exp(s − LSE)
// and dP = dO·Vᵀ:
//     dS = P ∘ (dP − Σ P∘dP + dLSE)   dQ = scale · dS·K   dV = Pᵀ·dO   dK = scale · dSᵀ·Q
// The query pass owns up to 64 rows (head, query) of a tile and walks its blocks; it leaves the sums behind.
// The key pass owns a chunk of up to 64 keys and walks the queries of the tiles that chose its block, in
// order. What a pass owns are the columns of its products, packed once; what it walks past are their rows,
// copied 64 at a time:
//     scores [rows][64] = rows · columnsᵀ          sums [columns][width] += weightsᵀ [64][rows] · rows
#include "lib/block_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {
namespace {

constexpr int64_t kCols = 64, kMostRows = 64;
constexpr int64_t kPadded = (64 + kTileRows - 1) / kTileRows * kTileRows;  // 64 in whole tiles
static_assert(kCols == kChunk && kCols % kTileCols == 0);

// Not inlined: the accumulators need all registers. Scores, then sums.
__attribute__((noinline)) void score_products(float* c, const float* a, int64_t a_row, const float* b,
                                              int64_t depth) {
    multiply_tile<false>(c, kCols, a, a_row, 1, b, kTileCols, depth);
}
__attribute__((noinline)) void sum_products(float* c, int64_t ldc, const float* a, const float* b,
                                            int64_t ldb, int64_t depth) {
    multiply_tile<true>(c, ldc, a, 1, kCols, b, ldb, depth);
}

// Rows of floats, zeros up to whole tiles both ways.
struct Rows {
    float* data;  // [kPadded, stride]
    int64_t width, stride;
    bool special[kMostRows];  // holds NaN or an infinity

    template <class T>
    SPARSE_ATTN_INLINE void put(int64_t r, const T* from, int64_t from_stride) {
        float* to = data + r * stride;
        if (from_stride == 1)
            load_row(to, from, width);
        else
            load_row(to, from, width, from_stride);
        Vec unusual = zero();
        for (int64_t d = width; d < stride; ++d) to[d] = 0.0f;
        for (int64_t d = 0; d < stride; d += Vec::W) unusual = unusual + (load(to + d) - load(to + d));
        special[r] = is_nan(unusual) != 0;
    }
    SPARSE_ATTN_INLINE void pad(int64_t count) {
        for (int64_t i = count * stride; i < round_up(count, kTileRows) * stride; ++i) data[i] = 0.0f;
    }
};

SPARSE_ATTN_INLINE Rows take_rows(Scratch& scratch, int64_t width) {
    const int64_t stride = round_up(width, kTileCols);
    return {scratch.take<float>(kPadded * stride), width, stride, {}};
}
SPARSE_ATTN_INLINE int64_t rows_bytes(int64_t width) {
    return kPadded * round_up(width, kTileCols) * 4 + 64;
}

// products [rows][kCols] of `count` rows and the packed columns.
inline void multiply(float* products, const Rows& rows, int64_t count, const float* columns, int64_t cols) {
    for (int64_t j = 0; j < cols; j += kTileCols)
        for (int64_t r = 0; r < count; r += kTileRows)
            score_products(products + r * kCols + j, rows.data + r * rows.stride, rows.stride,
                           columns + j * rows.width, rows.width);
}

// sums [columns][stride] += weightsᵀ · rows. A special row reaches only the columns where it has a weight:
// 0 · NaN is NaN. It is lost.
inline void add_weighted(float* sums, const float* weights, Rows& rows, int64_t count, int64_t cols) {
    for (int64_t r = 0; r < count; ++r) {
        if (!rows.special[r]) continue;
        float* row = rows.data + r * rows.stride;
        for (int64_t c = 0; c < cols; ++c)
            if (weights[r * kCols + c] != 0.0f)
                for (int64_t d = 0; d < rows.width; ++d)
                    sums[c * rows.stride + d] += weights[r * kCols + c] * row[d];
        for (int64_t d = 0; d < rows.width; ++d) row[d] = 0.0f;
    }
    for (int64_t d = 0; d < rows.stride; d += kTileCols)
        for (int64_t c = 0; c < cols; c += kTileRows)
            sum_products(sums + c * rows.stride + d, rows.stride, weights + c, rows.data + d, rows.stride,
                         count);
}

// Column c of packed columns: factor · row.
template <class T>
SPARSE_ATTN_INLINE void put_column(float* columns, int64_t c, const T* from, int64_t stride, int64_t width,
                                   float factor) {
    float* to = columns + c / kTileCols * kTileCols * width + c % kTileCols;
    for (int64_t d = 0; d < width; ++d) to[d * kTileCols] = to_float(from[d * stride]) * factor;
}

template <class T>
SPARSE_ATTN_INLINE const T* at(const void* base, const Strides& s, int64_t b, int64_t h, int64_t t) {
    return static_cast<const T*>(base) + b * s.b + h * s.h + t * s.t;
}

SPARSE_ATTN_INLINE int64_t most_chunks(const BlockParams& p) {
    return p.attend.slots * p.chunks_per_block;
}

// ---- dQ

template <class T>
void query_tile(const BlockBackwardParams& p, int64_t b, Range heads, int64_t tile, void* memory) {
    const BlockParams& f = p.forward;
    const AttendParams& a = f.attend;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t begin = tile * f.query_tile, length = minimum(f.query_tile, a.query_length - begin);
    const int64_t owned = (heads.end - heads.begin) * length;
    const int64_t kv_head = heads.begin / (a.heads / a.kv_heads), group = heads.begin / (a.heads / a.groups);
    const int32_t* blocks =
        a.indices + b * a.indices_strides.b + group * a.indices_strides.h + tile * a.indices_strides.t;
    Rows key = take_rows(scratch, a.head_dim), value = take_rows(scratch, a.value_dim);
    float* queries = scratch.take<float>(kCols * a.head_dim);
    float* grads = scratch.take<float>(kCols * a.value_dim);
    float* sums = scratch.take<float>(kPadded * key.stride);
    float* lse = scratch.take<float>(kCols);
    float* centre = scratch.take<float>(kCols);
    int32_t* begin_of = scratch.take<int32_t>(kCols);  // from there
    int32_t* end = scratch.take<int32_t>(kCols);       // up to there keys are visible
    int64_t* used = scratch.take<int64_t>(most_chunks(f));
    float* probability = scratch.take<float>(most_chunks(f) * kPadded * kCols + kTileRows);
    float* grad_score = scratch.take<float>(most_chunks(f) * kPadded * kCols + kTileRows);

    for (int64_t start = 0; start < owned; start += kCols) {
        const int64_t cols = minimum(kCols, owned - start);
        Range any{a.key_length, 0};  // keys that one of them sees
        for (int64_t c = 0; c < kCols; ++c) {
            const int64_t h = heads.begin + (start + c) / length, i = begin + (start + c) % length;
            centre[c] = 0.0f;
            lse[c] = 0.0f;
            begin_of[c] = end[c] = 0;
            if (c >= cols) continue;
            const Range keys = key_range(f.rule, b, i, a.key_length);
            if (keys.begin < keys.end) any = {minimum(any.begin, keys.begin), maximum(any.end, keys.end)};
            begin_of[c] = static_cast<int32_t>(keys.begin);
            end[c] = static_cast<int32_t>(keys.end);
            lse[c] = a.lse[(b * a.heads + h) * a.query_length + i];
            if (lse[c] == -__builtin_inff()) lse[c] = __builtin_inff();  // P = 0
            put_column(queries, c, at<T>(a.query, a.query_strides, b, h, i), a.query_strides.d, a.head_dim,
                       a.scale);
            put_column(grads, c, at<T>(p.grad_out, p.grad_out_strides, b, h, i), p.grad_out_strides.d,
                       a.value_dim, 1.0f);
        }
        for (int64_t c = cols; c < round_up(cols, kTileCols); ++c) {
            const float nothing = 0.0f;
            put_column(queries, c, &nothing, 0, a.head_dim, 0.0f);
            put_column(grads, c, &nothing, 0, a.value_dim, 0.0f);
        }

        auto put_keys = [&](const Chunk& c) {
            for (int64_t r = 0; r < c.count; ++r)
                key.put(r, at<T>(a.key, a.key_strides, b, kv_head, c.first + r), a.key_strides.d);
            key.pad(c.count);
        };
        int64_t n = 0;
        for (int64_t m = 0; m < a.slots; ++m) {
            if (blocks[m] < 0 || blocks[m] >= f.block_count) continue;
            for (int64_t part = 0; part < f.chunks_per_block; ++part) {
                const int64_t chunk = blocks[m] * f.chunks_per_block + part;
                const Chunk c = chunk_of(f, chunk);
                if (c.count == 0 || c.first >= any.end) break;
                if (c.first + c.count <= any.begin) continue;
                float *to = probability + n * kPadded * kCols, *grad_to = grad_score + n * kPadded * kCols;
                used[n++] = chunk;
                put_keys(c);
                for (int64_t r = 0; r < c.count; ++r)
                    value.put(r, at<T>(a.value, a.value_strides, b, kv_head, c.first + r), a.value_strides.d);
                value.pad(c.count);
                multiply(to, key, c.count, queries, cols);
                multiply(grad_to, value, c.count, grads, cols);
                for (int64_t r = 0; r < c.count; ++r)
                    for (int64_t j = 0; j < cols; j += Vec::W) {
                        const int32_t next = static_cast<int32_t>(c.first + r + 1);
                        const uint32_t seen = keys_ge(end + j, next) & ~keys_ge(begin_of + j, next);
                        float *s = to + r * kCols + j, *g = grad_to + r * kCols + j;
                        const Vec weight = where(seen, exp(load(s) - load(lse + j)), zero());
                        const Vec grad = where(seen, load(g), zero());
                        store(s, weight);
                        store(g, grad);
                        store(centre + j, fma(weight, grad, load(centre + j)));
                    }
            }
        }

        for (int64_t c = 0; c < cols; ++c) {
            const int64_t h = heads.begin + (start + c) / length, i = begin + (start + c) % length;
            const int64_t row = (b * a.heads + h) * a.query_length + i;
            if (p.grad_lse) centre[c] -= p.grad_lse[row];
            p.centre[row] = centre[c];
        }
        for (int64_t i = 0; i < kPadded * key.stride; ++i) sums[i] = 0.0f;
        for (int64_t u = 0; u < n; ++u) {
            const Chunk c = chunk_of(f, used[u]);
            const float* weights = probability + u * kPadded * kCols;
            float* grad = grad_score + u * kPadded * kCols;
            for (int64_t r = 0; r < c.count; ++r)
                for (int64_t j = 0; j < cols; j += Vec::W) {
                    const int64_t i = r * kCols + j;
                    store(grad + i, load(weights + i) * (load(grad + i) - load(centre + j)));
                }
            put_keys(c);
            add_weighted(sums, grad, key, c.count, cols);
        }
        for (int64_t c = 0; c < cols; ++c) {
            const int64_t h = heads.begin + (start + c) / length, i = begin + (start + c) % length;
            T* out = static_cast<T*>(p.grad_query) + ((b * a.heads + h) * a.query_length + i) * a.head_dim;
            for (int64_t d = 0; d < a.head_dim; ++d) convert(sums[c * key.stride + d] * a.scale, out + d);
        }
    }
}

// ---- dK and dV

// Queries on their way past a chunk of keys.
struct Passing {
    Rows query, grad;
    float lse[kMostRows], centre[kMostRows];
    Range seen[kMostRows];  // keys of the chunk
    int64_t count;
};

struct KeySums {
    const float *key, *value;  // columns
    float *grad_key, *grad_value, *probability, *grad_score;
    int64_t cols;
};

inline void flush(Passing& rows, const KeySums& k) {
    if (rows.count == 0) return;
    rows.query.pad(rows.count);
    rows.grad.pad(rows.count);
    multiply(k.probability, rows.query, rows.count, k.key, k.cols);
    multiply(k.grad_score, rows.grad, rows.count, k.value, k.cols);
    for (int64_t r = 0; r < rows.count; ++r)
        for (int64_t j = 0; j < k.cols; j += Vec::W) {
            const uint32_t seen = low_bits(clamp<int64_t>(rows.seen[r].end - j, 0, Vec::W)) &
                                  ~low_bits(clamp<int64_t>(rows.seen[r].begin - j, 0, Vec::W));
            float *s = k.probability + r * kCols + j, *g = k.grad_score + r * kCols + j;
            const Vec weight = where(seen, exp(load(s) - broadcast(rows.lse[r])), zero());
            store(s, weight);
            store(g, where(seen, weight * (load(g) - broadcast(rows.centre[r])), zero()));
        }
    add_weighted(k.grad_value, k.probability, rows.grad, rows.count, k.cols);
    add_weighted(k.grad_key, k.grad_score, rows.query, rows.count, k.cols);
    rows.count = 0;
}

template <class T>
void key_chunk(const BlockBackwardParams& p, int64_t b, int64_t kv_head, int64_t chunk, void* memory) {
    const BlockParams& f = p.forward;
    const AttendParams& a = f.attend;
    Scratch scratch{static_cast<char*>(memory)};
    const Chunk c = chunk_of(f, chunk);
    if (c.count == 0) return;
    Passing rows{take_rows(scratch, a.head_dim), take_rows(scratch, a.value_dim), {}, {}, {}, 0};
    float* key = scratch.take<float>(kCols * a.head_dim);
    float* value = scratch.take<float>(kCols * a.value_dim);
    KeySums k{key,
              value,
              scratch.take<float>(kPadded * rows.query.stride),
              scratch.take<float>(kPadded * rows.grad.stride),
              scratch.take<float>(kPadded * kCols + kTileRows),
              scratch.take<float>(kPadded * kCols + kTileRows),
              c.count};
    for (int64_t i = 0; i < kPadded * rows.query.stride; ++i) k.grad_key[i] = 0.0f;
    for (int64_t i = 0; i < kPadded * rows.grad.stride; ++i) k.grad_value[i] = 0.0f;
    const float nothing = 0.0f;
    for (int64_t j = 0; j < round_up(c.count, kTileCols); ++j) {
        if (j < c.count) {
            put_column(key, j, at<T>(a.key, a.key_strides, b, kv_head, c.first + j), a.key_strides.d,
                       a.head_dim, a.scale);
            put_column(value, j, at<T>(a.value, a.value_strides, b, kv_head, c.first + j), a.value_strides.d,
                       a.value_dim, 1.0f);
        } else {
            put_column(key, j, &nothing, 0, a.head_dim, 0.0f);
            put_column(value, j, &nothing, 0, a.value_dim, 0.0f);
        }
    }

    const int64_t sharing = a.heads / a.kv_heads, block = chunk / f.chunks_per_block;
    for (int64_t h = kv_head * sharing; h < (kv_head + 1) * sharing; ++h) {
        const int64_t list = (b * a.groups + h / (a.heads / a.groups)) * f.block_count + block;
        for (int64_t e = p.starts[list]; e < p.starts[list + 1]; ++e) {
            const int64_t begin = p.tiles_of[e] * f.query_tile;
            for (int64_t i = begin; i < minimum(begin + f.query_tile, a.query_length); ++i) {
                const Range seen = within(c, key_range(f.rule, b, i, a.key_length));
                const int64_t row = (b * a.heads + h) * a.query_length + i;
                if (seen.begin == seen.end || a.lse[row] == -__builtin_inff()) continue;
                const int64_t r = rows.count++;
                rows.seen[r] = seen;
                rows.lse[r] = a.lse[row];
                rows.centre[r] = p.centre[row];
                rows.query.put(r, at<T>(a.query, a.query_strides, b, h, i), a.query_strides.d);
                rows.grad.put(r, at<T>(p.grad_out, p.grad_out_strides, b, h, i), p.grad_out_strides.d);
                if (rows.count == kMostRows) flush(rows, k);
            }
        }
    }
    flush(rows, k);
    const int64_t first = (b * a.kv_heads + kv_head) * a.key_length + c.first;
    for (int64_t j = 0; j < c.count; ++j) {
        T* to = static_cast<T*>(p.grad_key) + (first + j) * a.head_dim;
        for (int64_t d = 0; d < a.head_dim; ++d)
            convert(k.grad_key[j * rows.query.stride + d] * a.scale, to + d);
        store_row(static_cast<T*>(p.grad_value) + (first + j) * a.value_dim,
                  k.grad_value + j * rows.grad.stride, a.value_dim);
    }
}

}  // namespace

int64_t block_backward_query_scratch_bytes(const BlockBackwardParams& p) {
    const AttendParams& a = p.forward.attend;
    return 2 * rows_bytes(a.head_dim) + rows_bytes(a.value_dim) + 4 * kCols * (a.head_dim + a.value_dim + 4) +
           most_chunks(p.forward) * (kPadded * kCols * 8 + 8) + 8 * kTileRows + 1024;
}

void block_backward_query(const BlockBackwardParams& p, TileTask task, void* scratch) {
    const auto [b, heads, tile] = task;
    const DType dtype = p.forward.attend.dtype;
    if (dtype == DType::kFloat32) query_tile<float>(p, b, heads, tile, scratch);
    if (dtype == DType::kBFloat16) query_tile<bfloat16>(p, b, heads, tile, scratch);
    if (dtype == DType::kFloat16) query_tile<float16>(p, b, heads, tile, scratch);
}

int64_t block_backward_key_scratch_bytes(const BlockBackwardParams& p) {
    const AttendParams& a = p.forward.attend;
    return 2 * (rows_bytes(a.head_dim) + rows_bytes(a.value_dim)) + 4 * kCols * (a.head_dim + a.value_dim) +
           8 * (kPadded * kCols + kTileRows) + 1024;
}

void block_backward_key(const BlockBackwardParams& p, int64_t b, int64_t kv_head, int64_t chunk,
                        void* scratch) {
    const DType dtype = p.forward.attend.dtype;
    if (dtype == DType::kFloat32) key_chunk<float>(p, b, kv_head, chunk, scratch);
    if (dtype == DType::kBFloat16) key_chunk<bfloat16>(p, b, kv_head, chunk, scratch);
    if (dtype == DType::kFloat16) key_chunk<float16>(p, b, kv_head, chunk, scratch);
}

SPARSE_ATTN_KERNELS(block_attention_backward, BlockBackwardKernels) = {
    .query = {.scratch_bytes = block_backward_query_scratch_bytes, .run = block_backward_query},
    .key_scratch_bytes = block_backward_key_scratch_bytes,
    .key = block_backward_key,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
