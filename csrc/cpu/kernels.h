// The CPU kernels of one instruction set, as a table. Every file in this folder is compiled once per
// instruction set with SPARSE_ATTN_ISA naming it; the host picks a table at load time.
//
// Files here use no inline function or template of the standard library: the linker keeps one copy of such
// code, and it could be the copy that was compiled for an instruction set which this machine lacks.
#pragma once

#include <cstdint>

#include "../params.h"

namespace sparse_attn::cpu {

struct Range {
    int64_t begin, end;
};

struct CrossEntropyKernels;  // cross_entropy_params.h

struct KernelTable {
    const CrossEntropyKernels* cross_entropy;

    // Keys in panels for the score tiles: bytes of one (batch, key head), and the packing of some of its
    // panels.
    int64_t (*packed_head_bytes)(const SelectParams&);
    int64_t (*panel_count)(const SelectParams&);
    void (*pack_keys)(const SelectParams&, int64_t b, int64_t kv_head, Range panels, void* packed_head);

    // Selection for a block of queries of one group; `packed` holds all heads, scratch_bytes is per thread.
    int64_t (*select_block_queries)(const SelectParams&);
    int64_t (*select_scratch_bytes)(const SelectParams&);
    void (*select)(const SelectParams&, int64_t b, int64_t group, Range queries, const void* packed,
                   void* scratch);

    // The same by an indexer's scores.
    int64_t (*indexer_block_queries)();
    int64_t (*indexer_scratch_bytes)(const IndexerParams&);
    void (*indexer_select)(const IndexerParams&, int64_t b, int64_t group, Range queries, const void* packed,
                           void* scratch);

    // Attention to given indices for a block of queries of some query heads.
    int64_t (*attend_scratch_bytes)(const AttendParams&);
    void (*attend)(const AttendParams&, int64_t b, Range heads, Range queries, void* scratch);

    // Attention to whole blocks: floats of one packed chunk, the packing, one tile of queries of some heads
    // that share a key head and a row of blocks.
    int64_t (*block_packed_key)(const BlockParams&);
    int64_t (*block_packed_value)(const BlockParams&);
    void (*block_pack)(const BlockParams&, int64_t b, int64_t kv_head, Range chunks);
    int64_t (*block_scratch_bytes)(const BlockParams&);
    void (*block_attend)(const BlockParams&, int64_t b, Range heads, int64_t tile, void* scratch);

    // Its backward: dQ of one tile of such heads, then dK and dV of one chunk of keys.
    int64_t (*block_backward_query_scratch_bytes)(const BlockBackwardParams&);
    void (*block_backward_query)(const BlockBackwardParams&, int64_t b, Range heads, int64_t tile,
                                 void* scratch);
    int64_t (*block_backward_key_scratch_bytes)(const BlockBackwardParams&);
    void (*block_backward_key)(const BlockBackwardParams&, int64_t b, int64_t kv_head, int64_t chunk,
                               void* scratch);

    // Backward: P, dS and dQ for a block of queries, then dK and dV for a block of keys.
    int64_t (*backward_query_scratch_bytes)(const AttendBackwardParams&);
    void (*backward_query)(const AttendBackwardParams&, int64_t b, Range heads, Range queries, void* scratch);
    int64_t (*backward_key_scratch_bytes)(const AttendBackwardParams&, int64_t block_keys);
    void (*backward_key)(const AttendBackwardParams&, int64_t b, int64_t kv_head, Range keys, void* scratch);

    // Variable-width embedding: the packing of a projection, the output rows of some distinct rows; backward:
    // sums and table gradients of some distinct rows, then some rows of a projection's gradient.
    int64_t (*embedding_panels)(const EmbeddingParams&, int64_t band, bool backward);
    int64_t (*embedding_packed_bytes)(const EmbeddingParams&, int64_t band, bool backward);
    void (*embedding_pack)(const EmbeddingParams&, int64_t band, bool backward, Range panels);
    int64_t (*embedding_scratch_bytes)(const EmbeddingParams&);
    void (*embedding)(const EmbeddingParams&, int64_t band, Range distinct, void* scratch);
    int64_t (*embedding_padded_width)(int64_t width);
    void (*embedding_backward)(const EmbeddingParams&, int64_t band, Range distinct, void* scratch);
    void (*embedding_backward_projection)(const EmbeddingParams&, int64_t band, Range columns, void* scratch);
};

}  // namespace sparse_attn::cpu
