// The keys of a few queries, panel by panel: where their rows lie, in pages or without, and the scores of
// each panel. Heads that lie side by side in a token are met together, so that memory is read in its own
// order.
#pragma once

#include "cpu/kernels/topk_decode.h"
#include "decode_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Rows of one key head: its query heads, and for each all queries.
SPARSE_ATTN_INLINE int64_t rows_of(const SelectParams& p) {
    return p.heads / p.kv_heads * p.query_length;
}

// Division by the size of pages, most of which are a power of two: a division costs more than a key's scores.
struct PageOf {
    int64_t size;
    int shift;  // -1: no power of two
    explicit SPARSE_ATTN_INLINE PageOf(int64_t n)
        : size(n), shift(n > 0 && (n & (n - 1)) == 0 ? __builtin_ctzll(static_cast<uint64_t>(n)) : -1) {}
    SPARSE_ATTN_INLINE int64_t page(int64_t at) const { return shift >= 0 ? at >> shift : at / size; }
    SPARSE_ATTN_INLINE int64_t place(int64_t at) const { return shift >= 0 ? at & (size - 1) : at % size; }
};

// The rows of the keys from one key head on.
template <class T>
struct KeyRows {
    const T* head;
    const int32_t* table;  // null: no pages
    int64_t first, page_step, step;
    PageOf of;

    KeyRows(const DecodeParams& d, int64_t b, int64_t kv_head)
        : head(static_cast<const T*>(d.select.key) + b * d.select.key_strides.b +
               kv_head * d.select.key_strides.h),
          table(d.pages.table),
          first(d.pages.first),
          page_step(d.select.key_strides.b),
          step(d.select.key_strides.t),
          of(d.pages.size) {}

    SPARSE_ATTN_INLINE const T* operator()(int64_t key) const {
        if (!table) return head + key * step;
        const int64_t at = first + key;
        return head + table[of.page(at)] * page_step + of.place(at) * step;
    }
    // Has the machine look up where the pages of the keys [key, end) lie in memory: a line at either end
    // brings what is known of all around it. Such searches go on side by side, and many of them cost little
    // more than one, which holds up the lines behind it.
    SPARSE_ATTN_INLINE void look_up(int64_t key, int64_t end) const {
        for (int64_t n = of.page(first + key); key < end && n <= of.page(first + end - 1); ++n) {
            const T* page = head + table[n] * page_step;
            __builtin_prefetch(page, 0, 2);
            __builtin_prefetch(page + (of.size - 1) * step, 0, 2);
        }
    }
    // The rows of the NR keys from `key` on; behind the last of [0, end) that one again.
    SPARSE_ATTN_INLINE void panel(int64_t key, int64_t end, const T** rows) const {
        const int64_t count = minimum<int64_t>(NR, end - key);
        for (int64_t j = 0; j < count;) {
            const T* row = (*this)(key + j);
            const int64_t left = table ? of.size - of.place(first + key + j) : count;
            for (const int64_t stop = minimum(count, j + left); j < stop; row += step) rows[j++] = row;
        }
        for (int64_t j = count; j < NR; ++j) rows[j] = rows[count - 1];
    }
};

// Queries of a key head in tiles of up to MR rows, [words][R] each.
template <class T, class Tile>
void pack_rows(const SelectParams& p, int64_t b, int64_t kv_head, float* to) {
    const int64_t rows = rows_of(p), per_kv = p.heads / p.kv_heads, column = words<Tile>(p);
    const Strides& s = p.query_strides;
    for (int64_t first = 0; first < rows; first += MR) {
        const int64_t width = tile_rows(minimum<int64_t>(MR, rows - first));
        float* tile = to + first * column;
        for (int64_t r = 0; r < width; ++r) {
            const int64_t row = first + r, h = kv_head * per_kv + row / p.query_length,
                          i = row % p.query_length;
            if (row < rows)
                Tile::template pack_column<true>(tile + r, width,
                                                 static_cast<const T*>(p.query) + b * s.b + h * s.h + i * s.t,
                                                 s.d, p.head_dim, words<Tile>(p), sign_of(p.rule.scale));
            else
                for (int64_t w = 0; w < column; ++w) tile[w * width + r] = 0.0f;
        }
    }
}

// The panels of a chunk that hold a key of [begin, end).
SPARSE_ATTN_INLINE Range panels_between(const DecodeParams& d, int64_t chunk, int64_t begin, int64_t end) {
    return {maximum(chunk * d.chunk, begin / NR), minimum((chunk + 1) * d.chunk, (end + NR - 1) / NR)};
}

SPARSE_ATTN_INLINE int64_t each_tile_bytes(const DecodeParams& d, int64_t column) {
    return (NR + d.heads * round_up(rows_of(d.select), MR)) * column * 4 + 128;
}

// Calls use(base, row, count, tile, beaten, beats) for each panel and each of its tiles of up to MR rows, of
// which `row` is the first: rows of the task's h-th key head are counted from h times the rows of one, in
// whole tiles.
template <class T, class Tile, bool kCompare, class F>
SPARSE_ATTN_INLINE void each_tile(const DecodeParams& d, DecodeChunk t, Range panels, Scratch& scratch,
                                  const float* threshold, const F& use) {
    const SelectParams& p = d.select;
    if (panels.begin >= panels.end) return;
    const int64_t rows = rows_of(p), padded = round_up(rows, MR), column = words<Tile>(p);
    float* panel = scratch.take<float>(column * NR);
    float* queries = scratch.take<float>(d.heads * padded * column);
    for (int64_t h = 0; h < d.heads; ++h)
        pack_rows<T, Tile>(p, t.b, t.kv_head + h, queries + h * padded * column);
    alignas(64) float tile[MR * NR];
    uint32_t beats[MR];

    // The rows of this panel and of those behind it, of which the last is asked for meanwhile. Where the
    // pages of later ones lie is looked up in good time, for many panels at once.
    constexpr int64_t kAheadBytes = 16384, kAheadInParts = 65536, kMost = 8, kLookedUp = 524288;
    const int64_t row_bytes = d.heads * p.head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t ahead_bytes = Ahead<T>::in_parts_of(row_bytes) ? kAheadInParts : kAheadBytes;
    const int64_t distance = clamp<int64_t>(ahead_bytes / (NR * row_bytes), 1, kMost);
    const int64_t together = clamp<int64_t>(kLookedUp / (NR * row_bytes), 1, 16);
    const int64_t ring = distance + 1;
    const T* found[kMost + 1][NR];
    const KeyRows<T> find(d, t.b, t.kv_head);
    const bool looks_up = find.table && find.of.size > 1;
    int64_t known = panels.begin;
    for (int64_t n = panels.begin; n < panels.end; ++n) {
        if (looks_up && (n - panels.begin) % together == 0)
            find.look_up((n == panels.begin ? n : n + together) * NR,
                         minimum(minimum(panels.end, n + 2 * together) * NR, p.key_length));
        for (; known < minimum(panels.end, n + ring); ++known)
            find.panel(known * NR, p.key_length, found[known % ring]);
        Ahead<T> ahead(found[(n + distance) % ring], n + distance < panels.end, row_bytes);
        for (int64_t h = 0; h < d.heads; ++h) {
            const KeyPanel<T, Tile> keys{found[n % ring], h * p.key_strides.h, p.head_dim, ahead};
            const bool streamed = rows <= kStreamedRows;
            if (!streamed) store_panel(keys, panel);
            for (int64_t first = h * padded; first < h * padded + rows; first += MR) {
                const int64_t count = minimum<int64_t>(MR, h * padded + rows - first);
                const uint32_t beaten = with_rows(count, [&]<int R>() {
                    const float* own = threshold + (kCompare ? first : 0);
                    if constexpr (R <= kStreamedRows)
                        if (streamed)
                            return streamed_tile<T, Tile, R, kCompare>(keys, tile, queries + first * column,
                                                                       own, beats);
                    return stored_tile<Tile, R, kCompare>(tile, queries + first * column, panel, column, own,
                                                          beats);
                });
                use(n * NR, first, count, tile, beaten & low_bits(count), beats);
            }
        }
    }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
