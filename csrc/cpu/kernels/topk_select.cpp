// topk_select: scores in tiles, compared with each query's running threshold while they are hot.
//
// Where the heads have their own selections (R = 1) a tile never leaves the first-level cache: what beats the
// threshold goes to the query's candidates. Where R heads share one, see select_shared.h.
#include "lib/select_shared.h"
#include "lib/select_stream.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// ---- packed keys

int64_t packed_head_bytes(const SelectParams& p) {
    int64_t bytes = 0;
    with_tile(p, [&]<class T, class Tile>() { bytes = panel_count(p) * column_words<Tile>(p) * NR * 4; });
    return bytes;
}

void pack_keys(const SelectParams& p, int64_t b, int64_t kv_head, Range panels, void* packed_head) {
    float* packed = static_cast<float*>(packed_head);
    const Strides& s = p.key_strides;
    with_tile(p, [&]<class T, class Tile>() {
        const T* key = static_cast<const T*>(p.key) + b * s.b + kv_head * s.h;
        for (int64_t n = panels.begin; n < panels.end; ++n) {
            int64_t first = n * NR;
            pack<Tile, false>(p, packed + n * column_words<Tile>(p) * NR, NR, key + first * s.t,
                              minimum<int64_t>(NR, p.key_length - first), s.t, s.d, 1.0f);
        }
    });
}

// ---- a selection per head

int64_t select_block_queries(const SelectParams& p) {
    const int64_t most = shared_heads(p) == 1 ? kBlockRows : shared_queries(p);
    if (!p.blocks) return most;
    const int64_t parts = (p.query_tile + most - 1) / most;  // of a tile
    return (p.query_tile + parts - 1) / parts;
}

int64_t select_scratch_bytes(const SelectParams& p) {
    int64_t column = 0;
    with_tile(p, [&]<class T, class Tile>() { column = column_words<Tile>(p); });
    if (shared_heads(p) == 1) return stream_scratch_bytes(p) + kBlockRows * column * 4 + 1024;
    return shared_scratch_bytes(p, column);
}

template <class T, class Tile>
struct HeadScorer {
    const SelectParams& p;
    const T* query;       // [Tq, D] of the head
    const float* packed;  // its key head's panels
    float* tile_queries;  // [kRowGroups] tiles

    void prepare(int g, int64_t first, int64_t rows) {
        const Strides& s = p.query_strides;
        pack<Tile, true>(p, tile_queries + g * MR * column_words<Tile>(p), MR, query + first * s.t, rows, s.t,
                         s.d, sign_of(p.rule.scale));
    }
    SPARSE_ATTN_INLINE uint32_t score(int g, int64_t panel, float* tile, const float* threshold,
                                      uint32_t* beats) {
        const int64_t column = column_words<Tile>(p);
        return score_tile<Tile, true>(tile, tile_queries + g * MR * column, packed + panel * column * NR,
                                      words<Tile>(p), threshold, beats);
    }
};

template <class T, class Tile>
void select_rows(const SelectParams& p, int64_t b, int64_t head, Range queries, const float* packed,
                 void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t kv_head = head / (p.heads / p.kv_heads);
    HeadScorer<T, Tile> scorer{
        p, static_cast<const T*>(p.query) + b * p.query_strides.b + head * p.query_strides.h,
        packed + (b * p.kv_heads + kv_head) * panel_count(p) * column_words<Tile>(p) * NR,
        scratch.take<float>(kBlockRows * column_words<Tile>(p))};
    stream_rows(p, b, head, queries, scratch, scorer);
}

void select(const SelectParams& p, SelectTask task, void* scratch) {
    const float* keys = static_cast<const float*>(task.packed);
    with_tile(p, [&]<class T, class Tile>() {
        if (shared_heads(p) > 1)
            select_shared<T, Tile>(p, task.b, task.group, task.queries, keys, scratch);
        else
            select_rows<T, Tile>(p, task.b, task.group, task.queries, keys, scratch);
    });
}

SPARSE_ATTN_KERNELS(topk_select, SelectKernels) = {
    .packed_head_bytes = packed_head_bytes,
    .panel_count = panel_count,
    .pack_keys = pack_keys,
    .block_queries = select_block_queries,
    .select = {.scratch_bytes = select_scratch_bytes, .run = select},
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
