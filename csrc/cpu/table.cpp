// The kernels of this instruction set, for the host to pick.
#include "kernels.h"
#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

int64_t packed_head_bytes(const SelectParams&);
int64_t panel_count(const SelectParams&);
void pack_keys(const SelectParams&, int64_t b, int64_t kv_head, Range panels, void* packed_head);
int64_t select_block_queries(const SelectParams&);
int64_t select_scratch_bytes(const SelectParams&);
void select(const SelectParams&, int64_t b, int64_t group, Range queries, const void* packed, void* scratch);
int64_t indexer_block_queries();
int64_t indexer_scratch_bytes(const IndexerParams&);
void indexer_select(const IndexerParams&, int64_t b, int64_t group, Range queries, const void* packed,
                    void* scratch);
int64_t attend_scratch_bytes(const AttendParams&);
void attend(const AttendParams&, int64_t b, Range heads, Range queries, void* scratch);
int64_t block_packed_key(const BlockParams&);
int64_t block_packed_value(const BlockParams&);
void block_pack(const BlockParams&, int64_t b, int64_t kv_head, Range chunks);
int64_t block_scratch_bytes(const BlockParams&);
void block_attend(const BlockParams&, int64_t b, Range heads, int64_t tile, void* scratch);
int64_t block_backward_query_scratch_bytes(const BlockBackwardParams&);
void block_backward_query(const BlockBackwardParams&, int64_t b, Range heads, int64_t tile, void* scratch);
int64_t block_backward_key_scratch_bytes(const BlockBackwardParams&);
void block_backward_key(const BlockBackwardParams&, int64_t b, int64_t kv_head, int64_t chunk, void* scratch);
int64_t backward_query_scratch_bytes(const AttendBackwardParams&);
void backward_query(const AttendBackwardParams&, int64_t b, Range heads, Range queries, void* scratch);
int64_t backward_key_scratch_bytes(const AttendBackwardParams&, int64_t block_keys);
void backward_key(const AttendBackwardParams&, int64_t b, int64_t kv_head, Range keys, void* scratch);
int64_t embedding_panels(const EmbeddingParams&, int64_t band, bool backward);
int64_t embedding_packed_bytes(const EmbeddingParams&, int64_t band, bool backward);
void embedding_pack(const EmbeddingParams&, int64_t band, bool backward, Range panels);
int64_t embedding_scratch_bytes(const EmbeddingParams&);
void embedding(const EmbeddingParams&, int64_t band, Range distinct, void* scratch);
int64_t embedding_padded_width(int64_t width);
void embedding_backward(const EmbeddingParams&, int64_t band, Range distinct, void* scratch);
void embedding_backward_projection(const EmbeddingParams&, int64_t band, Range columns, void* scratch);

extern const CrossEntropyKernels cross_entropy_table;
extern const KernelTable table;
const KernelTable table = {
    &cross_entropy_table,
    packed_head_bytes,
    panel_count,
    pack_keys,
    select_block_queries,
    select_scratch_bytes,
    select,
    indexer_block_queries,
    indexer_scratch_bytes,
    indexer_select,
    attend_scratch_bytes,
    attend,
    block_packed_key,
    block_packed_value,
    block_pack,
    block_scratch_bytes,
    block_attend,
    block_backward_query_scratch_bytes,
    block_backward_query,
    block_backward_key_scratch_bytes,
    block_backward_key,
    backward_query_scratch_bytes,
    backward_query,
    backward_key_scratch_bytes,
    backward_key,
    embedding_panels,
    embedding_packed_bytes,
    embedding_pack,
    embedding_scratch_bytes,
    embedding,
    embedding_padded_width,
    embedding_backward,
    embedding_backward_projection,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
