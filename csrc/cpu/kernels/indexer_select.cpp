// indexer_select: Σ_h w_h · max(0, q_h·k) in tiles, streamed into each query's candidates as in topk_select.
#include "indexer_select.h"
#include "lib/select_stream.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {
namespace {

// The tile of one head's dot products is turned into its part of the score and added before the next head's.
// `queries` and `weights` hold one tile per head; scales of rounded queries are in the weights, those of
// rounded keys come last. Not inlined: the accumulators need all registers.
template <class Tile>
__attribute__((noinline)) uint32_t indexer_tile(float* tile, const float* queries, const float* weights,
                                                int64_t heads, int64_t column, const float* panel,
                                                int64_t word_count, const float* threshold, uint32_t* beats) {
    Vec acc[MR][NV];
    for (int64_t h = 0; h < heads; ++h) {
        accumulate<Tile>(acc, queries + h * MR * column, panel, word_count);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            const Vec weight = broadcast(weights[h * MR + r]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                float* to = tile + r * NR + v * W;
                const Vec part = max(zero(), acc[r][v]);  // keeps NaN
                acc[r][v] = h == 0 ? part * weight : fma(part, weight, load(to));
                if (Tile::kExtra > 0 && h + 1 == heads)
                    acc[r][v] = acc[r][v] * load(panel + word_count * NR + v * W);
                store(to, acc[r][v]);
            }
        }
        if (h + 1 == heads) return compare(acc, threshold, beats);
    }
    return 0;
}

template <class T, class Tile>
struct IndexerScorer {
    const IndexerParams& indexer;
    const T* query;        // [Hi, Tq, D] of the group
    const float* weights;  // [Hi, Tq] of the group
    const float* packed;   // the group's panels
    float* tile_queries;   // [kRowGroups][Hi] tiles
    float* tile_weights;   // [kRowGroups][Hi][MR]
    int64_t heads;         // Hi

    void prepare(int g, int64_t first, int64_t rows) {
        const SelectParams& p = indexer.select;
        const Strides& s = p.query_strides;
        const int64_t column = column_words<Tile>(p);
        for (int64_t h = 0; h < heads; ++h) {
            pack<Tile, true>(p, tile_queries + (g * heads + h) * MR * column, MR,
                             query + h * s.h + first * s.t, rows, s.t, s.d, 1.0f);
            float* to = tile_weights + (g * heads + h) * MR;
            const float* scale = tile_queries + (g * heads + h) * MR * column + words<Tile>(p) * MR;
            for (int64_t r = 0; r < MR; ++r) {
                to[r] = r < rows ? weights[h * indexer.weight_h + (first + r) * indexer.weight_t] : 0.0f;
                if (Tile::kExtra > 0) to[r] = to[r] * scale[r];
            }
        }
    }
    SPARSE_ATTN_INLINE uint32_t score(int g, int64_t panel, float* tile, const float* threshold,
                                      uint32_t* beats) {
        const SelectParams& p = indexer.select;
        const int64_t column = column_words<Tile>(p);
        return indexer_tile<Tile>(tile, tile_queries + g * heads * MR * column, tile_weights + g * heads * MR,
                                  heads, column, packed + panel * column * NR, words<Tile>(p), threshold,
                                  beats);
    }
};

}  // namespace

int64_t indexer_scratch_bytes(const IndexerParams& indexer) {
    const SelectParams& p = indexer.select;
    int64_t column = 0;
    with_tile(p, [&]<class T, class Tile>() { column = column_words<Tile>(p); });
    return stream_scratch_bytes(p) + kBlockRows * p.heads / p.rule.groups * (column + 1) * 4 + 1024;
}

void indexer_select(const IndexerParams& indexer, SelectTask task, void* memory) {
    const SelectParams& p = indexer.select;
    const int64_t b = task.b, group = task.group;
    with_tile(p, [&]<class T, class Tile>() {
        Scratch scratch{static_cast<char*>(memory)};
        const int64_t heads = p.heads / p.rule.groups, column = column_words<Tile>(p);
        IndexerScorer<T, Tile> scorer{
            indexer,
            static_cast<const T*>(p.query) + b * p.query_strides.b + group * heads * p.query_strides.h,
            indexer.weights + b * indexer.weight_b + group * heads * indexer.weight_h,
            static_cast<const float*>(task.packed) +
                (b * p.rule.groups + group) * panel_count(p) * column * NR,
            scratch.take<float>(kBlockRows * heads * column),
            scratch.take<float>(kBlockRows * heads),
            heads};
        stream_rows(p, b, group, task.queries, scratch, scorer);
    });
}

SPARSE_ATTN_KERNELS(indexer_select, IndexerKernels) = {
    .block_queries = kBlockRows,
    .select = {.scratch_bytes = indexer_scratch_bytes, .run = indexer_select},
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
