// Between cuda/variable_width_embedding.cpp and the kernels of variable_width_embedding: no torch and no CUDA
// header. Each function works in order on `stream` of GPU `device`, never waits for it, and returns nullptr
// or CUDA's own message. An id outside of the vocabulary fails an assertion on the device, as in
// torch.nn.Embedding.
#pragma once

#include "common/params.h"

namespace sparse_attn::cuda {

constexpr int kMostBands = 16;
constexpr int kProjectionParts = 16;  // sums into which the gradient of a projection is divided

struct EmbedBand {
    const void* table;       // [rows, width], rows `stride` elements apart
    const void* projection;  // [D, width], contiguous, or null where the width is D
    int64_t rows, stride, width;
    int64_t first;          // of its rows among those of all bands
    void* grad_table;       // [rows, width], contiguous, or null
    void* grad_projection;  // [D, width], contiguous, or null
    float* back;            // [N, width] scratch, with grad_table and a projection: its gradients, by place
    float* parts;           // [kProjectionParts, D, width] scratch, with grad_projection
};

struct EmbedParams {
    EmbedBand bands[kMostBands];
    const void* ids;                                        // int32 or int64 [N]
    const int32_t* token_band;                              // [V]
    const void* token_row;                                  // int32 or int64 [V]
    bool wide_ids, wide_rows;                               // int64
    int64_t count, vocabulary, padding_idx, embedding_dim;  // N, V, −1 for none, D
    int64_t all_rows;                                       // of all bands; below 2^31
    int32_t band_count;
    DType dtype;
    void* out;             // [N, D], contiguous
    const void* grad_out;  // [N, D], contiguous
    const int32_t* keys;   // [N]: rows among those of all bands, ascending, all_rows for padding
    const int64_t* order;  // [N]: the position of each key
};

const char* variable_width_embedding(const EmbedParams& p, int32_t device, void* stream);
// keys [N], in the order of the positions
const char* embedding_keys(const EmbedParams& p, int32_t* keys, int32_t device, void* stream);
const char* variable_width_embedding_backward(const EmbedParams& p, int32_t device, void* stream);

}  // namespace sparse_attn::cuda
