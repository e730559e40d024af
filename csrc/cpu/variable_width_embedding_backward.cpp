// The gradients of variable_width_embedding, over distinct rows alone: G = grad_out summed over the positions
// of each row, in their order; grad of the row = G · projection; grad of the projection = Gᵀ · rows.
//
// Every sum has one order, whatever the number of threads: a row's positions ascend, a product's terms ascend
// in blocks of kDepth.
#include "kernels.h"
#include "scratch.h"
#include "tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

int64_t embedding_padded_width(int64_t width);

namespace {

constexpr int64_t kDepth = 256;  // distinct rows of one pass over a projection's gradient

// to [D] = the sum of grad_out over a row's positions.
template <class T>
void sum_positions(const EmbeddingParams& p, int64_t distinct, float* to) {
    const int64_t n = p.embedding_dim;
    const T* grad_out = static_cast<const T*>(p.grad_out);
    const int64_t begin = p.starts[distinct], end = p.starts[distinct + 1];
    load_row(to, grad_out + p.positions[begin] * n, n);
    for (int64_t i = begin + 1; i < end; ++i) {
        const T* from = grad_out + p.positions[i] * n;
        if (i + 1 < end) {
            const char* next = reinterpret_cast<const char*>(grad_out + p.positions[i + 1] * n);
            for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += 64)
                __builtin_prefetch(next + byte);
        }
        int64_t d = 0;
        for (; d + Vec::W <= n; d += Vec::W) store(to + d, load(to + d) + load(from + d));
        for (; d < n; ++d) to[d] += to_float(from[d]);
    }
}

template <class T>
void rows_backward(const EmbeddingParams& p, int64_t band, Range distinct, void* memory) {
    const EmbeddingBand& e = p.bands[band];
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t dim = p.embedding_dim, rows = distinct.end - distinct.begin;
    const int64_t columns = embedding_padded_width(e.width);
    T* grad_table = static_cast<T*>(e.grad_table);
    auto grad_row = [&](int64_t u) { return grad_table + (e.grad_rows ? u - e.first : p.row[u]) * e.width; };
    if (!e.projection) {
        float* sum = scratch.take<float>(dim);
        for (int64_t u = distinct.begin; u < distinct.end; ++u) {
            sum_positions<T>(p, u, sum);
            store_row(grad_row(u), sum, dim);
        }
        return;
    }
    float* sums = e.sums ? e.sums + (distinct.begin - e.first) * dim
                         : scratch.take<float>(kEmbeddingBlock * dim);  // [rows, D]
    float* packed_sums = scratch.take<float>(kEmbeddingBlock * dim);
    float* results = scratch.take<float>(kEmbeddingBlock * columns);
    for (int64_t r = 0; r < rows; ++r) {
        sum_positions<T>(p, distinct.begin + r, sums + r * dim);
        if (e.rows) {
            const T* from = static_cast<const T*>(e.table) + p.row[distinct.begin + r] * e.table_stride;
            float* to = e.rows + (distinct.begin + r - e.first) * columns;
            load_row(to, from, e.width);
            for (int64_t w = e.width; w < columns; ++w) to[w] = 0.0f;
        }
    }
    if (!grad_table) return;
    for (int64_t r = 0; r < round_up(rows, kTileRows); ++r) {
        float* to = packed_sums + r / kTileRows * kTileRows * dim + r % kTileRows;
        for (int64_t d = 0; d < dim; ++d) to[d * kTileRows] = r < rows ? sums[r * dim + d] : 0.0f;
    }
    for (int64_t n = 0; n < columns / kTileColumns; ++n)
        for (int64_t r = 0; r < rows; r += kTileRows)
            multiply_tile<false>(results + r * columns + n * kTileColumns, columns, packed_sums + r * dim,
                                 e.packed + n * dim * kTileColumns, kTileColumns, dim);
    for (int64_t r = 0; r < rows; ++r)
        store_row(grad_row(distinct.begin + r), results + r * columns, e.width);
}

// Rows [columns.begin, columns.end) of the projection's gradient, at most kEmbeddingBlock.
template <class T>
void projection_backward(const EmbeddingParams& p, int64_t band, Range columns, void* memory) {
    const EmbeddingBand& e = p.bands[band];
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t dim = p.embedding_dim, width = embedding_padded_width(e.width);
    const int64_t count = columns.end - columns.begin, all = e.last - e.first;
    float* packed_sums = scratch.take<float>(kDepth * kEmbeddingBlock);
    float* results = scratch.take<float>(kEmbeddingBlock * width);
    memset(results, 0, static_cast<size_t>(kEmbeddingBlock * width) * 4);
    for (int64_t first = 0; first < all; first += kDepth) {
        const int64_t depth = minimum(kDepth, all - first);
        for (int64_t r = 0; r < count; r += kTileRows) {
            float* to = packed_sums + r * kDepth;
            const float* from = e.sums + first * dim + columns.begin + r;
            const int64_t filled = minimum<int64_t>(kTileRows, count - r);
            for (int64_t k = 0; k < depth; ++k, to += kTileRows, from += dim)
                for (int64_t i = 0; i < kTileRows; ++i) to[i] = i < filled ? from[i] : 0.0f;
        }
        for (int64_t n = 0; n < width / kTileColumns; ++n)
            for (int64_t r = 0; r < count; r += kTileRows)
                multiply_tile<true>(results + r * width + n * kTileColumns, width, packed_sums + r * kDepth,
                                    e.rows + first * width + n * kTileColumns, width, depth);
    }
    T* to = static_cast<T*>(e.grad_projection) + columns.begin * e.width;
    for (int64_t r = 0; r < count; ++r) store_row(to + r * e.width, results + r * width, e.width);
}

}  // namespace

void embedding_backward(const EmbeddingParams& p, int64_t band, Range distinct, void* scratch) {
    if (p.dtype == DType::kFloat32) rows_backward<float>(p, band, distinct, scratch);
    if (p.dtype == DType::kBFloat16) rows_backward<bfloat16>(p, band, distinct, scratch);
    if (p.dtype == DType::kFloat16) rows_backward<float16>(p, band, distinct, scratch);
}

void embedding_backward_projection(const EmbeddingParams& p, int64_t band, Range columns, void* scratch) {
    if (p.dtype == DType::kFloat32) projection_backward<float>(p, band, columns, scratch);
    if (p.dtype == DType::kBFloat16) projection_backward<bfloat16>(p, band, columns, scratch);
    if (p.dtype == DType::kFloat16) projection_backward<float16>(p, band, columns, scratch);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
