// Gradients of variable_width_cross_entropy. A tile of classes goes through all blocks of tokens: its logits
// are recomputed, turned into d loss / d logit where they stand, and multiplied twice: with the projected
// hidden states (the tile's own rows of the table's gradient, summed in scratch) and with the tile's rows
// (the gradient of the projected hidden states, to which the tiles of a band add one after another).
#include "lib/cross_entropy_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

struct BackwardScratch {
    float* logits;      // [kTokenBlock, kLogitStride]
    float* by_token;    // Pairs: gradients of the logits, [kTokenBlock, kLogitStride / 2] pairs of classes
    float* by_class;    // Pairs: and again, [kTokenBlock / 2, kLogitStride] pairs of tokens
    float* rows;        // the tile's rows as columns of B: depth is the width
    float* rows_deep;   // and again: depth is the class
    float* grad_table;  // [classes padded, width padded]; of tiles [width padded, classes padded]
};
SPARSE_ATTN_INLINE BackwardScratch backward_scratch(const CrossEntropyParams& p, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t most = most_elements(p);
    BackwardScratch s;
    s.logits = scratch.take<float>(kTokenBlock * kLogitStride);
    s.by_token = scratch.take<float>(kTokenBlock * kLogitStride / 2);
    s.by_class = scratch.take<float>(kTokenBlock * kLogitStride / 2);
    s.rows = scratch.take<float>(most);
    s.rows_deep = scratch.take<float>(most);
    s.grad_table = scratch.take<float>(most);
    return s;
}
int64_t cross_entropy_backward_scratch_bytes(const CrossEntropyParams& p) {
    return 4 * (2 * kTokenBlock * kLogitStride + 3 * most_elements(p)) + 384;
}

void cross_entropy_backward_begin(const CrossEntropyParams& p, ClassTile tile, void* scratch) {
    const BackwardScratch s = backward_scratch(p, scratch);
    const int64_t width = p.bands[tile.band].width, classes = tile.end - tile.begin;
    with_types(p, [&]<class T, class S>() {
        const T* rows = table_rows<T>(p, tile);
        pack_cols<S>(s.rows, rows, width, int64_t{1}, classes, width);
        pack_cols<S>(s.rows_deep, rows, classes, width, width, int64_t{1});
    });
}

// logits → d loss / d logit, in place. What stands behind the tile's tokens and classes reaches no result.
template <class S>
inline void differentiate(const CrossEntropyParams& p, ClassTile tile, int64_t block, float* logits,
                          int64_t begin, int64_t end) {
    constexpr int W = Vec::W;
    const int64_t classes = tile.end - tile.begin, first = p.bands[tile.band].first + tile.begin;
    for (int64_t i = begin; i < end; ++i) {
        float* row = logits + i * kLogitStride;
        const int64_t n = block * kTokenBlock + i, target = p.target[n] - first;
        const Vec lse = broadcast(p.lse[n]), scale = broadcast(p.softmax_scale[n]);
        close_row(row, classes);
        for (int64_t j = 0; j < classes; j += W) store(row + j, exp_for<S>(load(row + j) - lse) * scale);
        // Not the scale alone: 0 times an incoming gradient of NaN is NaN, and there are no weights then.
        if (p.class_weight != nullptr && p.smooth_scale[n] != 0.0f) {
            const Vec smooth = broadcast(-p.smooth_scale[n]);
            for (int64_t j = 0; j < classes; j += W)
                store(row + j, fma(load(p.class_weight + first + j), smooth, load(row + j)));
        }
        if (target >= 0 && target < classes) row[target] -= p.target_scale[n];
    }
}

#if defined(SPARSE_ATTN_PAIRS)
// The gradients of the logits of tokens [begin, end), from float32, as pairs along either axis. begin is
// even; behind the last token and the last class stands what the other operand's zeros meet: a number, never
// NaN of another token.
inline void pair_up(const BackwardScratch& s, int64_t classes, int64_t begin, int64_t end) {
    if constexpr (kTiled<Pairs>) {  // whole tiles
        for (int64_t i = end; i < round_up(end, Pairs::kRows); ++i)
            for (int64_t j = 0; j < round_up(classes, kTileCols); ++j) s.logits[i * kLogitStride + j] = 0.0f;
        end = round_up(end, Pairs::kRows), classes = round_up(classes, kTileCols);
    }
    for (int64_t i = begin; i < end; i += 2) {
        const float *even = s.logits + i * kLogitStride, *odd = even + kLogitStride;
        uint16_t* by_token = reinterpret_cast<uint16_t*>(s.by_token) + i * kLogitStride;
        for (int64_t j = 0; j < round_up(classes, Vec::W); j += Vec::W) {
#if defined(SPARSE_ATTN_NEON)
            const uint16x4_t low = to_bfloat16(load(even + j));
            const uint16x4_t high = i + 1 < end ? to_bfloat16(load(odd + j)) : vdup_n_u16(0);
            vst1_u16(by_token + j, low);
            vst1_u16(by_token + kLogitStride + j, high);
            const uint32x4_t pair = vorrq_u32(vmovl_u16(low), vshll_n_u16(high, 16));
            store(s.by_class + i / 2 * kLogitStride + j, Vec{vreinterpretq_f32_u32(pair)});
#else
            const __m256i low = (__m256i)_mm512_cvtneps_pbh(load(even + j).v);
            const __m256i high = i + 1 < end ? (__m256i)_mm512_cvtneps_pbh(load(odd + j).v) : __m256i{};
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_token + j), low);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_token + kLogitStride + j), high);
            const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            store(s.by_class + i / 2 * kLogitStride + j, Vec{_mm512_castsi512_ps(pair)});
#endif
        }
    }
}
#else
inline void pair_up(const BackwardScratch&, int64_t, int64_t, int64_t) {}
#endif

template <bool kAdd, class S>
inline void add_table_gradient(const BackwardScratch& s, const float* projected, int64_t classes,
                               int64_t padded, int64_t words) {
#if defined(SPARSE_ATTN_AMX)
    // What stands by class is a right operand: the gradient's transpose.
    if constexpr (kTiled<S>) {
        const int64_t stride = round_up(classes, kTileCols);
        const Session<S> session;
        for (int64_t i = 0; i < padded; i += S::kRows)
            for (int64_t v = 0; v < classes; v += kTileCols)
                multiply_tiles<kAdd>(s.grad_table + i * stride + v, stride, projected + i * words, words,
                                     s.by_class + v, words, kLogitStride);
        return;
    }
#endif
    const float* from = S::kDepth == 1 ? s.logits : s.by_class;
    for (int64_t j = 0; j < padded; j += kTileCols)
        for (int64_t v = 0; v < classes; v += kTileRows)
            gemm_tile<1, kLogitStride, kAdd, S>(s.grad_table + v * padded + j, padded, from + v,
                                                projected + j * words, words);
}

template <class S>
void backward_scores(const CrossEntropyParams& p, ClassTile tile, int64_t block, const BackwardScratch& s) {
    const CrossEntropyBand& band = p.bands[tile.band];
    const int64_t padded = round_up(band.width, kTileCols), classes = tile.end - tile.begin;
    tile_logits<S>(p, tile, block, s.rows, s.logits, [&](int64_t begin, int64_t end) {
        differentiate<S>(p, tile, block, s.logits, begin, end);
        if (S::kDepth == 2) pair_up(s, classes, begin, end);
    });
    const float* projected = band.projected_cols + block * steps<S>(kTokenBlock) * padded;
    const int64_t words = steps<S>(block_rows(p, block));
    if (block == 0)
        add_table_gradient<false, S>(s, projected, classes, padded, words);
    else
        add_table_gradient<true, S>(s, projected, classes, padded, words);
}

void cross_entropy_backward_scores(const CrossEntropyParams& p, ClassTile tile, int64_t block,
                                   void* scratch) {
    const BackwardScratch s = backward_scratch(p, scratch);
    with_types(p, [&]<class T, class S>() { backward_scores<S>(p, tile, block, s); });
}

template <bool kAdd, class S>
inline void add_hidden_gradient(const BackwardScratch& s, float* grad, int64_t tokens, int64_t padded,
                                int64_t words) {
    constexpr int kStride = kLogitStride / S::kDepth;
    const float* from = S::kDepth == 1 ? s.logits : s.by_token;
    [[maybe_unused]] const Session<S> session;
    for (int64_t j = 0; j < padded; j += kTileCols)
        for (int64_t i = 0; i < tokens; i += S::kRows)
            gemm_tile<kStride, 1, kAdd, S>(grad + i * padded + j, padded, from + i * kStride,
                                           s.rows_deep + j * words, words);
}

void cross_entropy_backward_hidden(const CrossEntropyParams& p, ClassTile tile, int64_t block,
                                   void* scratch) {
    const BackwardScratch s = backward_scratch(p, scratch);
    const CrossEntropyBand& band = p.bands[tile.band];
    const int64_t padded = round_up(band.width, kTileCols), tokens = block_rows(p, block);
    float* grad = band.grad_projected + block * kTokenBlock * padded;
    with_types(p, [&]<class T, class S>() {
        const int64_t words = steps<S>(tile.end - tile.begin);
        if (tile.begin == 0)
            add_hidden_gradient<false, S>(s, grad, tokens, padded, words);
        else
            add_hidden_gradient<true, S>(s, grad, tokens, padded, words);
    });
}

template <class T, class S>
void end_of(const CrossEntropyParams& p, ClassTile tile, const BackwardScratch& s) {
    const CrossEntropyBand& band = p.bands[tile.band];
    const int64_t padded = round_up(band.width, kTileCols),
                  stride = round_up(tile.end - tile.begin, kTileCols);
    for (int64_t v = tile.begin; v < tile.end; ++v) {
        const float* grad = s.grad_table + (v - tile.begin) * padded;
        if constexpr (kTiled<S>) {
            for (int64_t i = 0; i < band.width; ++i) s.rows[i] = s.grad_table[i * stride + v - tile.begin];
            grad = s.rows;
        }
        store_row(static_cast<T*>(band.grad_table) + v * band.width, grad, band.width);
    }
}

void cross_entropy_backward_end(const CrossEntropyParams& p, ClassTile tile, void* scratch) {
    const BackwardScratch s = backward_scratch(p, scratch);
    with_types(p, [&]<class T, class S>() { end_of<T, S>(p, tile, s); });
}

// ---- from the projected hidden states back

int64_t cross_entropy_unproject_scratch_bytes(const CrossEntropyParams& p) {
    const int64_t dim = round_up(p.embedding_dim, kTileCols), width = round_up(widest(p), kTileCols);
    const int64_t hidden = 4 * 2 * kTokenBlock * dim + gemm_scratch_bytes(kTokenBlock, dim, width);
    const int64_t projection = 4 * (3 * kTokenBlock * kTokenBlock + 2 * kTokenBlock * width);
    return maximum(hidden, projection) + 512;
}

// Rows of one block: Σ over the bands of grad_projected · projectionᵀ.
template <class T>
void grad_hidden_of(const CrossEntropyParams& p, int64_t block, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t dim = p.embedding_dim, padded_dim = round_up(dim, kTileCols), tokens = block_rows(p, block);
    float* total = scratch.take<float>(kTokenBlock * padded_dim);
    float* product = scratch.take<float>(kTokenBlock * padded_dim);
    for (int64_t i = 0; i < kTokenBlock * padded_dim; ++i) total[i] = 0.0f;
    for (int64_t b = 0; b < p.band_count; ++b) {
        const CrossEntropyBand& band = p.bands[b];
        if (band.rows == 0) continue;
        const int64_t padded = round_up(band.width, kTileCols);
        const float* grad = band.grad_projected + block * kTokenBlock * padded;
        int64_t stride = padded;
        if (band.projection) {
            gemm(product, padded_dim, tokens, dim, band.width, grad, padded, int64_t{1},
                 static_cast<const T*>(band.projection), int64_t{1}, band.width, scratch);
            grad = product, stride = padded_dim;
        }
        for (int64_t i = 0; i < tokens; ++i)
            for (int64_t d = 0; d < dim; ++d) total[i * padded_dim + d] += grad[i * stride + d];
    }
    for (int64_t i = 0; i < tokens; ++i)
        store_row(static_cast<T*>(p.grad_hidden) + p.token[block * kTokenBlock + i] * dim,
                  total + i * padded_dim, dim);
}

// Rows [begin, end) of hiddenᵀ · grad_projected; at most kTokenBlock of them.
template <class T>
void grad_projection_of(const CrossEntropyParams& p, int64_t b, int64_t begin, int64_t end, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const CrossEntropyBand& band = p.bands[b];
    const int64_t count = end - begin, padded = round_up(band.width, kTileCols);
    float* total = scratch.take<float>(kTokenBlock * padded);
    float* hidden = scratch.take<float>(kTokenBlock * kTokenBlock);
    float* packed_hidden = scratch.take<float>(kTokenBlock * kTokenBlock);
    float* packed_grad = scratch.take<float>(kTokenBlock * padded);
    for (int64_t i = 0; i < kTokenBlock * padded; ++i) total[i] = 0.0f;
    for (int64_t block = 0; block * kTokenBlock < p.tokens && band.rows > 0; ++block) {
        const int64_t tokens = block_rows(p, block);
        for (int64_t i = 0; i < tokens; ++i)
            load_row(
                hidden + i * count,
                static_cast<const T*>(p.hidden) + p.token[block * kTokenBlock + i] * p.embedding_dim + begin,
                count);
        pack_rows(packed_hidden, hidden, count, int64_t{1}, tokens, count);
        pack_cols(packed_grad, band.grad_projected + block * kTokenBlock * padded, tokens, padded, band.width,
                  int64_t{1});
        gemm_packed<true>(total, padded, packed_hidden, packed_grad, count, band.width, tokens);
    }
    for (int64_t d = begin; d < end; ++d)
        store_row(static_cast<T*>(band.grad_projection) + d * band.width, total + (d - begin) * padded,
                  band.width);
}

void cross_entropy_grad_hidden(const CrossEntropyParams& p, int64_t block, void* scratch) {
    with_types(p, [&]<class T, class S>() { grad_hidden_of<T>(p, block, scratch); });
}

void cross_entropy_grad_projection(const CrossEntropyParams& p, int64_t band, int64_t begin, int64_t end,
                                   void* scratch) {
    with_types(p, [&]<class T, class S>() { grad_projection_of<T>(p, band, begin, end, scratch); });
}

SPARSE_ATTN_KERNELS(variable_width_cross_entropy_backward, CrossEntropyBackwardKernels) = {
    .scratch_bytes = cross_entropy_backward_scratch_bytes,
    .begin = cross_entropy_backward_begin,
    .scores = cross_entropy_backward_scores,
    .hidden = cross_entropy_backward_hidden,
    .end = cross_entropy_backward_end,
    .unproject_scratch_bytes = cross_entropy_unproject_scratch_bytes,
    .grad_hidden = cross_entropy_grad_hidden,
    .grad_projection = cross_entropy_grad_projection,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
