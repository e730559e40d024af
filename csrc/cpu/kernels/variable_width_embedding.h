// Between cpu/variable_width_embedding.cpp and its kernels. No torch headers.
#pragma once

#include "cpu/kernels/lib/kernel.h"

namespace sparse_attn {

// Variable-width embedding. N ids, D the model width; a band is a table of rows of one width. The host groups
// the ids: `distinct` are the rows that occur, each with the positions where it does.
struct EmbeddingBand {
    const void* table;       // [n, width], rows table_stride apart
    const void* projection;  // [D, width], contiguous, or null where the width is D
    int64_t table_stride, width;
    int64_t first, last;  // its distinct rows
    float* packed;     // scratch for the packed projection, or null where the rows are too few to be worth it
    void* grad_table;  // [n, width], zeros, or with grad_rows [last − first, width]; or null
    void* grad_projection;  // [D, width], or null
    float* sums;            // [last − first, D] scratch: grad_out summed over each row's positions
    float* rows;            // [padded width, last − first] scratch: the rows themselves, in panels
    bool grad_rows;         // a gradient row for each distinct row, not for each row of the table
};

struct EmbeddingParams {
    const EmbeddingBand* bands;
    const int64_t* row;        // [distinct] in its band's table
    const int64_t* starts;     // [distinct + 1] into positions
    const int64_t* positions;  // where each distinct row occurs, ascending
    void* out;                 // [N, D], contiguous
    const void* grad_out;      // [N, D], contiguous
    int64_t embedding_dim;     // D
    int64_t widest;            // the largest width of a band with a projection
    DType dtype;
};

// Distinct rows of one task; a multiple of every instruction set's tile rows.
constexpr int64_t kEmbeddingBlock = 48;

namespace cpu {

// Some distinct rows of one band.
struct RowsTask {
    int64_t band;
    Range distinct;
};

// Forward panels of a projection are its outputs, backward panels the columns of the table.
struct EmbeddingKernels {
    int64_t (*padded_width)(int64_t width);
    int64_t (*panels)(const EmbeddingParams&, int64_t band, bool backward);
    int64_t (*packed_bytes)(const EmbeddingParams&, int64_t band, bool backward);
    void (*pack)(const EmbeddingParams&, int64_t band, bool backward, Range panels);
    Kernel<EmbeddingParams, RowsTask> project;  // the output rows
};

struct EmbeddingBackwardKernels {
    Kernel<EmbeddingParams, RowsTask> rows;  // sums and table gradients
    void (*projection)(const EmbeddingParams&, int64_t band, Range columns,
                       void* scratch);  // the same scratch
};

}  // namespace cpu

}  // namespace sparse_attn
