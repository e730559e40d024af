// Between cpu/variable_width_cross_entropy.cpp and its kernels. No torch headers.
//
// Letters: N tokens whose target counts (the others are left out before any kernel runs), D embedding
// dimension, V classes, B bands; band b has n rows (classes) of width w. Classes are numbered in band order:
// class `first + row`. Tokens are worked on in blocks of kTokenBlock, classes in tiles of tile_classes(w).
#pragma once

#include "cpu/kernels/lib/kernel.h"

namespace sparse_attn {

constexpr int64_t kTokenBlock = 192;    // a multiple of every instruction set's tile rows (32, 12, 6, 4)
constexpr int64_t kClassTile = 256;     // classes of the widest tile
constexpr int64_t kVocabSegments = 64;  // at most so many partial log-sum-exps per token

struct CrossEntropyBand {
    const void* table;       // [n, w], contiguous
    const void* projection;  // [D, w], contiguous, or null: w = D and the hidden state itself is used
    int64_t rows, width;     // n, w
    int64_t first;           // class number of row 0
    float* projected;        // packed blocks of projected hidden states, as rows of A: N · w, both padded
    float* projected_cols;   // the same as columns of B (of tiles rows of A) for the backward, or null
    float* grad_projected;   // [N padded, w padded], backward
    void* grad_table;        // [n, w], backward
    void* grad_projection;   // [D, w], backward, or null
};

struct CrossEntropyParams {
    const void* hidden;         // [rows, D], contiguous
    const int64_t* token;       // [N]: the row of `hidden`
    const int64_t* target;      // [N]: class number in band order
    const float* class_weight;  // [V + padding] in band order, or null where neither smoothing nor weights
    const CrossEntropyBand* bands;
    int64_t tokens, embedding_dim, band_count;
    // forward
    float* partial_max;   // [segments, N padded]
    float* partial_sum;   // [segments, N padded]
    float* partial_dot;   // [segments, N padded]: Σ weight · logit, or null without smoothing
    float* target_logit;  // [N padded]
    // backward: d loss / d logit(n, v) = softmax_scale · P − target_scale · [v = target] − smooth_scale ·
    // weight(v); all [N padded], 0 behind N
    const float* lse;
    const float* softmax_scale;
    const float* target_scale;
    const float* smooth_scale;
    void* grad_hidden;  // [rows, D], contiguous; rows of `token` are written
    DType dtype;
};

namespace cpu {

// A tile of classes of one band, and one block of tokens.
struct ClassTile {
    int64_t band, begin, end;  // rows of the band's table
};

struct CrossEntropyKernels {
    int64_t (*padded_width)(int64_t width);  // columns of packed and padded buffers
    int64_t (*tile_classes)(int64_t width);  // classes of a tile
    int64_t (*project_scratch_bytes)(const CrossEntropyParams&);
    void (*project)(const CrossEntropyParams&, int64_t band, int64_t block, void* scratch);
    // A tile's scratch, with its packed rows: first begin, then each block in turn.
    int64_t (*scratch_bytes)(const CrossEntropyParams&);
    void (*begin)(const CrossEntropyParams&, ClassTile, void* scratch);
    void (*block)(const CrossEntropyParams&, ClassTile, int64_t segment, int64_t block, void* scratch);
};

struct CrossEntropyBackwardKernels {
    // Likewise. `scores` makes d loss / d logit of the tile and block and adds to the table's gradient;
    // `hidden` adds to grad_projected, which tiles of one band must do one after another.
    int64_t (*scratch_bytes)(const CrossEntropyParams&);
    void (*begin)(const CrossEntropyParams&, ClassTile, void* scratch);
    void (*scores)(const CrossEntropyParams&, ClassTile, int64_t block, void* scratch);
    void (*hidden)(const CrossEntropyParams&, ClassTile, int64_t block, void* scratch);
    void (*end)(const CrossEntropyParams&, ClassTile, void* scratch);
    // From grad_projected to the gradients of the hidden states and of the rows [begin, end) of a projection.
    int64_t (*unproject_scratch_bytes)(const CrossEntropyParams&);
    void (*grad_hidden)(const CrossEntropyParams&, int64_t block, void* scratch);
    void (*grad_projection)(const CrossEntropyParams&, int64_t band, int64_t begin, int64_t end,
                            void* scratch);
};

}  // namespace cpu
}  // namespace sparse_attn
