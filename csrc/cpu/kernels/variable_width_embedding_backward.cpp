// The gradients of variable_width_embedding, over distinct rows alone: G = grad_out summed over the positions
// of each row, in their order; grad of the row = G · projection; grad of the projection = Gᵀ · rows.
//
// Every sum has one order, whatever the number of threads: a row's positions ascend, a product's terms ascend
// in blocks of kDepth.
#include "lib/gemm_tile.h"
#include "lib/scratch.h"
#include "variable_width_embedding.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

namespace {

constexpr int64_t kDepth = 256;  // distinct rows of one pass over a projection's gradient

// Positions of one partial sum: the error of a token that occurs n times grows with n / kPartial, not with n.
constexpr int64_t kPartial = 64;

SPARSE_ATTN_INLINE const char* row_bytes(const void* rows, int64_t row, int64_t bytes) {
    return static_cast<const char*>(rows) + row * bytes;
}

// to [D] = the sum of grad_out over positions [begin, end), begin < end.
template <class T>
void sum_some(const EmbeddingParams& p, int64_t begin, int64_t end, float* to) {
    const int64_t n = p.embedding_dim, bytes = n * static_cast<int64_t>(sizeof(T));
    load_row(to, reinterpret_cast<const T*>(row_bytes(p.grad_out, p.positions[begin], bytes)), n);
    for (int64_t i = begin + 1; i < end; ++i) {
        const T* from = reinterpret_cast<const T*>(row_bytes(p.grad_out, p.positions[i], bytes));
        if (i + 1 < end) {
            const char* next = row_bytes(p.grad_out, p.positions[i + 1], bytes);
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(next + byte);
        }
        int64_t d = 0;
        for (; d + Vec::W <= n; d += Vec::W) store(to + d, load(to + d) + load(from + d));
        for (; d < n; ++d) to[d] += to_float(from[d]);
    }
}

// to [D] = the sum of grad_out over a row's positions; `partial` [D] is scratch.
template <class T>
void sum_positions(const EmbeddingParams& p, int64_t distinct, float* to, float* partial) {
    const int64_t begin = p.starts[distinct], end = p.starts[distinct + 1];
    sum_some<T>(p, begin, minimum(end, begin + kPartial), to);
    for (int64_t i = begin + kPartial; i < end; i += kPartial) {
        sum_some<T>(p, i, minimum(end, i + kPartial), partial);
        for (int64_t d = 0; d < p.embedding_dim; ++d) to[d] += partial[d];
    }
}

template <class T>
void rows_backward(const EmbeddingParams& p, int64_t band, Range distinct, void* memory) {
    const EmbeddingBand& e = p.bands[band];
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t dim = p.embedding_dim, rows = distinct.end - distinct.begin;
    const int64_t columns = padded_cols(e.width);
    T* grad_table = static_cast<T*>(e.grad_table);
    auto grad_row = [&](int64_t u) { return grad_table + (e.grad_rows ? u - e.first : p.row[u]) * e.width; };
    float* partial = scratch.take<float>(dim);
    if (!e.projection) {
        float* sum = scratch.take<float>(dim);
        for (int64_t u = distinct.begin; u < distinct.end; ++u) {
            sum_positions<T>(p, u, sum, partial);
            store_row(grad_row(u), sum, dim);
        }
        return;
    }
    float* sums = e.sums ? e.sums + (distinct.begin - e.first) * dim
                         : scratch.take<float>(kEmbeddingBlock * dim);  // [rows, D]
    float* packed_sums = scratch.take<float>(kEmbeddingBlock * dim);
    float* results = scratch.take<float>(kEmbeddingBlock * columns);
    for (int64_t r = 0; r < rows; ++r) {
        sum_positions<T>(p, distinct.begin + r, sums + r * dim, partial);
        if (e.rows) {
            const T* from = static_cast<const T*>(e.table) + p.row[distinct.begin + r] * e.table_stride;
            for (int64_t w = 0; w < columns; w += kTileCols) {
                float* to = e.rows + w * (e.last - e.first) + (distinct.begin + r - e.first) * kTileCols;
                const int64_t filled = minimum<int64_t>(kTileCols, e.width - w);
                load_row(to, from + w, filled);
                for (int64_t j = filled; j < kTileCols; ++j) to[j] = 0.0f;
            }
        }
    }
    if (!grad_table) return;
    pack_rows(packed_sums, sums, rows, dim, dim, 1);
    gemm_packed<false>(results, columns, packed_sums, e.packed, rows, columns, dim);
    for (int64_t r = 0; r < rows; ++r)
        store_row(grad_row(distinct.begin + r), results + r * columns, e.width);
}

// Rows [columns.begin, columns.end) of the projection's gradient, at most kEmbeddingBlock.
template <class T>
void projection_backward(const EmbeddingParams& p, int64_t band, Range columns, void* memory) {
    const EmbeddingBand& e = p.bands[band];
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t dim = p.embedding_dim, width = padded_cols(e.width);
    const int64_t count = columns.end - columns.begin, all = e.last - e.first;
    float* packed_sums = scratch.take<float>(kDepth * kEmbeddingBlock);
    float* results = scratch.take<float>(kEmbeddingBlock * width);
    memset(results, 0, static_cast<size_t>(kEmbeddingBlock * width) * 4);
    for (int64_t first = 0; first < all; first += kDepth) {
        const int64_t depth = minimum(kDepth, all - first);
        pack_rows(packed_sums, e.sums + first * dim + columns.begin, count, 1, depth, dim);
        for (int64_t w = 0; w < width; w += kTileCols)
            gemm_packed<true>(results + w, width, packed_sums, e.rows + w * all + first * kTileCols, count,
                              kTileCols, depth);
    }
    T* to = static_cast<T*>(e.grad_projection) + columns.begin * e.width;
    for (int64_t r = 0; r < count; ++r) store_row(to + r * e.width, results + r * width, e.width);
}

}  // namespace

void embedding_backward(const EmbeddingParams& p, RowsTask task, void* scratch) {
    const auto [band, distinct] = task;
    if (p.dtype == DType::kFloat32) rows_backward<float>(p, band, distinct, scratch);
    if (p.dtype == DType::kBFloat16) rows_backward<bfloat16>(p, band, distinct, scratch);
    if (p.dtype == DType::kFloat16) rows_backward<float16>(p, band, distinct, scratch);
}

void embedding_backward_projection(const EmbeddingParams& p, int64_t band, Range columns, void* scratch) {
    if (p.dtype == DType::kFloat32) projection_backward<float>(p, band, columns, scratch);
    if (p.dtype == DType::kBFloat16) projection_backward<bfloat16>(p, band, columns, scratch);
    if (p.dtype == DType::kFloat16) projection_backward<float16>(p, band, columns, scratch);
}

// Sums, packed sums and results of some rows; packed sums and results of a pass over the projection's
// gradient.
int64_t embedding_backward_scratch_bytes(const EmbeddingParams& p) {
    const int64_t d = padded_cols(p.embedding_dim), w = padded_cols(p.widest);
    return (kEmbeddingBlock * (2 * d + 2 * w) + d) * 4 + 1024 + kDepth * kEmbeddingBlock * 4;
}

SPARSE_ATTN_KERNELS(variable_width_embedding_backward, EmbeddingBackwardKernels) = {
    .rows = {.scratch_bytes = embedding_backward_scratch_bytes, .run = embedding_backward},
    .projection = embedding_backward_projection,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
