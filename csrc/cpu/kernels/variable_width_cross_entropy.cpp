// variable_width_cross_entropy: hidden states projected once per band, then narrow products in tiles of
// classes and blocks of tokens. Each tile leaves a running maximum and sum per token; the host merges them.
#include "lib/cross_entropy_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// ---- hidden · projection

int64_t cross_entropy_project_scratch_bytes(const CrossEntropyParams& p) {
    const int64_t width = round_up(widest(p), kTileCols);
    return 4 * kTokenBlock * (p.embedding_dim + width) +
           gemm_scratch_bytes(kTokenBlock, width, p.embedding_dim) + 256;
}

template <class T, class S>
void project_of(const CrossEntropyParams& p, int64_t b, int64_t block, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const CrossEntropyBand& band = p.bands[b];
    const int64_t dim = p.embedding_dim, tokens = block_rows(p, block), width = band.width;
    const int64_t padded = round_up(width, kTileCols);
    float* hidden = scratch.take<float>(kTokenBlock * dim);
    for (int64_t i = 0; i < tokens; ++i)
        load_row(hidden + i * dim, static_cast<const T*>(p.hidden) + p.token[block * kTokenBlock + i] * dim,
                 dim);
    const float* projected = hidden;
    int64_t stride = dim;
    if (band.projection) {
        float* product = scratch.take<float>(kTokenBlock * padded);
        gemm(product, padded, tokens, width, dim, hidden, dim, int64_t{1},
             static_cast<const T*>(band.projection), width, int64_t{1}, scratch);
        projected = product, stride = padded;
    }
    pack_rows<S>(band.projected + block * kTokenBlock * steps<S>(width), projected, tokens, stride, width,
                 int64_t{1});
    if (!band.projected_cols) return;
    float* cols = band.projected_cols + block * steps<S>(kTokenBlock) * padded;
    if constexpr (kTiled<S>)
        pack_rows<S>(cols, projected, width, int64_t{1}, tokens, stride);
    else
        pack_cols<S>(cols, projected, tokens, stride, width, int64_t{1});
}

void cross_entropy_project(const CrossEntropyParams& p, int64_t band, int64_t block, void* scratch) {
    with_types(p, [&]<class T, class S>() { project_of<T, S>(p, band, block, scratch); });
}

// ---- forward

struct ForwardScratch {
    float* logits;  // [kTokenBlock, kLogitStride]
    float* rows;    // the tile's rows as columns of B
};
SPARSE_ATTN_INLINE ForwardScratch forward_scratch(void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    ForwardScratch s;
    s.logits = scratch.take<float>(kTokenBlock * kLogitStride);
    s.rows = reinterpret_cast<float*>(scratch.next);
    return s;
}
int64_t cross_entropy_forward_scratch_bytes(const CrossEntropyParams& p) {
    return 4 * (kTokenBlock * kLogitStride + most_elements(p)) + 128;
}

void cross_entropy_forward_begin(const CrossEntropyParams& p, ClassTile tile, void* scratch) {
    const int64_t width = p.bands[tile.band].width, classes = tile.end - tile.begin;
    float* rows = forward_scratch(scratch).rows;
    with_types(p, [&]<class T, class S>() {
        pack_cols<S>(rows, table_rows<T>(p, tile), width, int64_t{1}, classes, width);
    });
}

template <class S>
void forward_block(const CrossEntropyParams& p, ClassTile tile, int64_t segment, int64_t block,
                   void* scratch) {
    constexpr int W = Vec::W;
    const ForwardScratch s = forward_scratch(scratch);
    const int64_t classes = tile.end - tile.begin, first = p.bands[tile.band].first + tile.begin;
    const int64_t at = segment * padded_tokens(p) + block * kTokenBlock;
    tile_logits<S>(p, tile, block, s.rows, s.logits, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            float* row = s.logits + i * kLogitStride;
            const int64_t n = block * kTokenBlock + i, target = p.target[n] - first;
            if (target >= 0 && target < classes) p.target_logit[n] = row[target];
            if (p.partial_dot) {
                Vec dot = zero();
                int64_t j = 0;
                for (; j + W <= classes; j += W)
                    dot = fma(load(row + j), load(p.class_weight + first + j), dot);
                float rest = sum(dot);
                for (; j < classes; ++j) rest += row[j] * p.class_weight[first + j];
                p.partial_dot[at + i] += rest;
            }
            close_row(row, classes);
            const float before = p.partial_max[at + i];
            Vec top = broadcast(before);
            for (int64_t j = 0; j < classes; j += W) top = max(load(row + j), top);  // skips NaN
            const float peak = max_lane(top);
            Vec total[2] = {zero(), zero()};
            int64_t j = 0;
            for (; j + W < classes; j += 2 * W) {
                total[0] = total[0] + exp_for<S>(load(row + j) - broadcast(peak));
                total[1] = total[1] + exp_for<S>(load(row + j + W) - broadcast(peak));
            }
            if (j < classes) total[0] = total[0] + exp_for<S>(load(row + j) - broadcast(peak));
            p.partial_sum[at + i] = p.partial_sum[at + i] * exp_of(before - peak) + sum(total[0] + total[1]);
            p.partial_max[at + i] = peak;
        }
    });
}

void cross_entropy_forward_block(const CrossEntropyParams& p, ClassTile tile, int64_t segment, int64_t block,
                                 void* scratch) {
    with_types(p, [&]<class T, class S>() { forward_block<S>(p, tile, segment, block, scratch); });
}

SPARSE_ATTN_KERNELS(variable_width_cross_entropy, CrossEntropyKernels) = {
    .padded_width = padded_cols,
    .tile_classes = classes_of,
    .project_scratch_bytes = cross_entropy_project_scratch_bytes,
    .project = cross_entropy_project,
    .scratch_bytes = cross_entropy_forward_scratch_bytes,
    .begin = cross_entropy_forward_begin,
    .block = cross_entropy_forward_block,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
