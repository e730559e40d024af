// variable_width_embedding: each distinct row is projected once and copied to the positions of its token.
//
// A band without a projection is copies alone. With one, a block of distinct rows is gathered into packed
// tiles and multiplied by the projection, packed in panels of kTileCols outputs; the block's results stay
// in the second-level cache until they are copied out.
#include "variable_width_embedding.h"
#include "lib/gemm_tile.h"
#include "lib/scratch.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

int64_t embedding_panels(const EmbeddingParams& p, int64_t band, bool backward) {
    return padded_cols(backward ? p.bands[band].width : p.embedding_dim) / kTileCols;
}
int64_t embedding_packed_bytes(const EmbeddingParams& p, int64_t band, bool backward) {
    int64_t depth = backward ? p.embedding_dim : p.bands[band].width;
    return embedding_panels(p, band, backward) * depth * kTileCols * 4;
}

// Packed rows, results, one converted row.
int64_t embedding_scratch_bytes(const EmbeddingParams& p) {
    const int64_t d = padded_cols(p.embedding_dim), w = padded_cols(p.widest);
    return (kEmbeddingBlock * (d + w) + d) * 4 + 1024;
}

namespace {

// Packed for the forward: panel[w][j] = projection[d0 + j][w]; for the backward: panel[d][j] =
// projection[d][w0 + j]; zeros past the edge.
template <class T>
void pack_projection(const EmbeddingParams& p, int64_t band, bool backward, Range panels) {
    const EmbeddingBand& e = p.bands[band];
    const T* projection = static_cast<const T*>(e.projection);
    const int64_t depth = backward ? p.embedding_dim : e.width;
    const int64_t columns = backward ? e.width : p.embedding_dim;
    for (int64_t n = panels.begin; n < panels.end; ++n) {
        const int64_t first = n * kTileCols;
        const int64_t count = minimum<int64_t>(kTileCols, columns - first);
        float* to = e.packed + n * depth * kTileCols;
        for (int64_t k = 0; k < depth; ++k, to += kTileCols) {
            const T* from = backward ? projection + k * e.width + first : projection + first * e.width + k;
            load_row(to, from, count, backward ? 1 : e.width);
            for (int64_t j = count; j < kTileCols; ++j) to[j] = 0.0f;
        }
    }
}

template <class T>
SPARSE_ATTN_INLINE const T* table_row(const EmbeddingParams& p, const EmbeddingBand& e, int64_t distinct) {
    return static_cast<const T*>(e.table) + p.row[distinct] * e.table_stride;
}

template <class T>
SPARSE_ATTN_INLINE void copy_out(const EmbeddingParams& p, int64_t distinct, const T* row) {
    T* out = static_cast<T*>(p.out);
    for (int64_t i = p.starts[distinct]; i < p.starts[distinct + 1]; ++i)
        memcpy(out + p.positions[i] * p.embedding_dim, row, static_cast<size_t>(p.embedding_dim) * sizeof(T));
}

// Few rows: their dot products with the projection's rows as they lie.
template <class T>
void project_by_dots(const EmbeddingParams& p, const EmbeddingBand& e, const T* row, float* out,
                     float* wide) {
    const T* projection = static_cast<const T*>(e.projection);
    load_row(wide, row, e.width);
    for (int64_t i = e.width; i < round_up(e.width, Vec::W); ++i) wide[i] = 0.0f;
    for (int64_t d = 0; d < p.embedding_dim; d += Vec::W) {
        Vec acc[Vec::W];
        for (int j = 0; j < Vec::W; ++j) {
            acc[j] = zero();
            if (d + j >= p.embedding_dim) continue;
            const T* from = projection + (d + j) * e.width;
            int64_t i = 0;
            for (; i + Vec::W <= e.width; i += Vec::W) acc[j] = fma(load(from + i), load(wide + i), acc[j]);
            if (i < e.width) acc[j] = fma(load_n(from + i, e.width - i), load(wide + i), acc[j]);
        }
        store(out + d, transpose_sum(acc));
    }
}

template <class T>
void project(const EmbeddingParams& p, int64_t band, Range distinct, void* memory) {
    const EmbeddingBand& e = p.bands[band];
    if (!e.projection) {
        for (int64_t u = distinct.begin; u < distinct.end; ++u) copy_out(p, u, table_row<T>(p, e, u));
        return;
    }
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t columns = padded_cols(p.embedding_dim), rows = distinct.end - distinct.begin;
    float* packed_rows = scratch.take<float>(kEmbeddingBlock * padded_cols(e.width));
    float* results = scratch.take<float>(kEmbeddingBlock * columns);
    T* converted = scratch.take<T>(p.embedding_dim);
    if (e.packed) {
        for (int64_t u = distinct.begin; u < distinct.end; ++u) {
            const char* from = reinterpret_cast<const char*>(table_row<T>(p, e, u));
            for (int64_t i = 0; i < e.width * static_cast<int64_t>(sizeof(T)); i += 64)
                __builtin_prefetch(from + i);
        }
        for (int64_t r = 0; r < round_up(rows, kTileRows); ++r) {
            float* to = packed_rows + r / kTileRows * kTileRows * e.width + r % kTileRows;
            if (r < rows) {
                const T* from = table_row<T>(p, e, distinct.begin + r);
                for (int64_t w = 0; w < e.width; ++w) to[w * kTileRows] = to_float(from[w]);
            } else {
                for (int64_t w = 0; w < e.width; ++w) to[w * kTileRows] = 0.0f;
            }
        }
        gemm_packed<false>(results, columns, packed_rows, e.packed, rows, columns, e.width);
    } else {
        for (int64_t r = 0; r < rows; ++r)
            project_by_dots(p, e, table_row<T>(p, e, distinct.begin + r), results + r * columns, packed_rows);
    }
    for (int64_t r = 0; r < rows; ++r) {
        if constexpr (sizeof(T) == 4) {
            copy_out(p, distinct.begin + r, results + r * columns);
        } else {
            store_row(converted, results + r * columns, p.embedding_dim);
            copy_out(p, distinct.begin + r, converted);
        }
    }
}

}  // namespace

void embedding_pack(const EmbeddingParams& p, int64_t band, bool backward, Range panels) {
    if (p.dtype == DType::kFloat32) pack_projection<float>(p, band, backward, panels);
    if (p.dtype == DType::kBFloat16) pack_projection<bfloat16>(p, band, backward, panels);
    if (p.dtype == DType::kFloat16) pack_projection<float16>(p, band, backward, panels);
}

void embedding(const EmbeddingParams& p, RowsTask task, void* scratch) {
    const auto [band, distinct] = task;
    if (p.dtype == DType::kFloat32) project<float>(p, band, distinct, scratch);
    if (p.dtype == DType::kBFloat16) project<bfloat16>(p, band, distinct, scratch);
    if (p.dtype == DType::kFloat16) project<float16>(p, band, distinct, scratch);
}

SPARSE_ATTN_KERNELS(variable_width_embedding, EmbeddingKernels) = {
    .padded_width = padded_cols,
    .panels = embedding_panels,
    .packed_bytes = embedding_packed_bytes,
    .pack = embedding_pack,
    .project = {.scratch_bytes = embedding_scratch_bytes, .run = embedding},
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
