// What forward and backward of variable_width_cross_entropy share: the logits of one tile of classes and one
// block of tokens, recomputed wherever they are needed and never kept.
#pragma once

#include "cpu/kernels/variable_width_cross_entropy.h"
#include "elementary.h"
#include "gemm_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Floats from one token's logits to the next: off a power of two, so that rows share no cache set.
constexpr int kLogitStride = kClassTile + 16;

SPARSE_ATTN_INLINE int64_t padded_tokens(const CrossEntropyParams& p) {
    return round_up(p.tokens, kTokenBlock);
}
SPARSE_ATTN_INLINE int64_t block_rows(const CrossEntropyParams& p, int64_t block) {
    return minimum(kTokenBlock, p.tokens - block * kTokenBlock);
}
SPARSE_ATTN_INLINE int64_t widest(const CrossEntropyParams& p) {
    int64_t width = 1;
    for (int64_t b = 0; b < p.band_count; ++b) width = maximum(width, p.bands[b].width);
    return width;
}
// A wide tile's rows must stay in the second-level cache beside its gradient.
SPARSE_ATTN_INLINE int64_t classes_of(int64_t width) {
    return width <= 128 ? kClassTile : width <= 512 ? kClassTile / 2 : kClassTile / 4;
}
// The most that any tile takes: classes × width grows with the width within each of the three sizes.
SPARSE_ATTN_INLINE int64_t most_elements(const CrossEntropyParams& p) {
    int64_t most = 0;
    for (int64_t b = 0; b < p.band_count; ++b) {
        const int64_t width = round_up(p.bands[b].width, kTileCols);
        const int64_t classes = round_up(classes_of(p.bands[b].width), kTileCols) + kTileCols;
        most = maximum(most, width * classes);
    }
    return most;
}

// f<T, S>() for the dtype: T is what tensors hold, S how their products are taken. bfloat16 is multiplied as
// it is where the CPU does that; what was float32 on the way, projected hidden states and gradients of
// logits, is rounded to it, as everything is in PyTorch's own bfloat16.
template <class F>
SPARSE_ATTN_INLINE void with_types(const CrossEntropyParams& p, F&& f) {
    if (p.dtype == DType::kFloat32) f.template operator()<float, Singles>();
    if (p.dtype == DType::kBFloat16) f.template operator()<bfloat16, Pairs>();
    if (p.dtype == DType::kFloat16) f.template operator()<float16, Singles>();
}

template <class T>
SPARSE_ATTN_INLINE const T* table_rows(const CrossEntropyParams& p, ClassTile tile) {
    const CrossEntropyBand& band = p.bands[tile.band];
    return static_cast<const T*>(band.table) + tile.begin * band.width;
}

// logits [kTokenBlock, kLogitStride] of the block and tile; `rows` are the tile's packed rows, as columns of
// B. Columns behind the tile hold 0 up to whole tiles. A group of tokens is finished before the next begins:
// finish(first, last) works on its logits while they are in the first-level cache.
template <class S, class Finish>
inline void tile_logits(const CrossEntropyParams& p, ClassTile tile, int64_t block, const float* rows,
                        float* logits, Finish&& finish) {
    const CrossEntropyBand& band = p.bands[tile.band];
    const int64_t words = steps<S>(band.width), tokens = block_rows(p, block),
                  classes = tile.end - tile.begin;
    const float* a = band.projected + block * kTokenBlock * words;
    [[maybe_unused]] const Session<S> session;
    for (int64_t i = 0; i < tokens; i += S::kRows) {
        for (int64_t j = 0; j < classes; j += kTileCols)
            gemm_tile<1, kTileRows, false, S>(logits + i * kLogitStride + j, kLogitStride, a + i * words,
                                              rows + j * words, words);
        finish(i, minimum<int64_t>(i + S::kRows, tokens));
    }
}

// e^x as exactly as numbers multiplied by S are.
template <class S>
SPARSE_ATTN_INLINE Vec exp_for(Vec x) {
    return S::kDepth == 2 ? rough_exp(x) : exp(x);
}

// −inf behind the last class up to a whole vector: such a class weighs nothing.
SPARSE_ATTN_INLINE void close_row(float* row, int64_t classes) {
    for (int64_t j = classes; j % Vec::W != 0; ++j) row[j] = -__builtin_inff();
}

SPARSE_ATTN_INLINE float exp_of(float x) {
    float lanes[Vec::W];
    store(lanes, exp(broadcast(x)));
    return lanes[0];
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
