// What the kernels of variable_width_embedding share: where a token's row lies.
#pragma once

#include "attention.cuh"
#include "cuda/kernels/variable_width_embedding.h"
#include "gathered_gemm.cuh"

namespace sparse_attn::cuda {

struct TokenPlace {
    int band;  // −1: padding, or an id that does not exist
    int64_t row;
};
__device__ __forceinline__ TokenPlace place_of(const EmbedParams& p, int64_t position) {
    const int64_t id = p.wide_ids ? static_cast<const int64_t*>(p.ids)[position]
                                  : static_cast<const int32_t*>(p.ids)[position];
    const bool id_is_in_the_vocabulary = id >= 0 && id < p.vocabulary;
    assert(id_is_in_the_vocabulary);
    if (!id_is_in_the_vocabulary || id == p.padding_idx) return {-1, 0};
    const int band = p.token_band[id];
    const int64_t row = p.wide_rows ? static_cast<const int64_t*>(p.token_row)[id]
                                    : static_cast<const int32_t*>(p.token_row)[id];
    const bool token_names_a_row = band >= 0 && band < p.band_count && row >= 0 && row < p.bands[band].rows;
    assert(token_names_a_row);
    return token_names_a_row ? TokenPlace{band, row} : TokenPlace{-1, 0};
}

// Whether rows of `size` elements, `stride` apart, are made of whole 16 bytes.
__host__ __device__ inline bool whole_rows(const void* rows, int64_t stride, int64_t size, int64_t element) {
    return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride * element % 16 == 0 &&
           size * element % 16 == 0;
}

}  // namespace sparse_attn::cuda
