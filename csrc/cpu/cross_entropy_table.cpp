// The kernels of variable_width_cross_entropy of this instruction set, as one entry of its table.
#include "../cross_entropy_params.h"
#include "kernels.h"
#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

int64_t cross_entropy_padded_width(int64_t width);
int64_t cross_entropy_tile_classes(int64_t width);
int64_t cross_entropy_project_scratch_bytes(const CrossEntropyParams&);
void cross_entropy_project(const CrossEntropyParams&, int64_t band, int64_t block, void* scratch);
int64_t cross_entropy_forward_scratch_bytes(const CrossEntropyParams&);
void cross_entropy_forward_begin(const CrossEntropyParams&, ClassTile, void* scratch);
void cross_entropy_forward_block(const CrossEntropyParams&, ClassTile, int64_t segment, int64_t block,
                                 void* scratch);
int64_t cross_entropy_backward_scratch_bytes(const CrossEntropyParams&);
void cross_entropy_backward_begin(const CrossEntropyParams&, ClassTile, void* scratch);
void cross_entropy_backward_scores(const CrossEntropyParams&, ClassTile, int64_t block, void* scratch);
void cross_entropy_backward_hidden(const CrossEntropyParams&, ClassTile, int64_t block, void* scratch);
void cross_entropy_backward_end(const CrossEntropyParams&, ClassTile, void* scratch);
int64_t cross_entropy_unproject_scratch_bytes(const CrossEntropyParams&);
void cross_entropy_grad_hidden(const CrossEntropyParams&, int64_t block, void* scratch);
void cross_entropy_grad_projection(const CrossEntropyParams&, int64_t band, int64_t begin, int64_t end,
                                   void* scratch);

extern const CrossEntropyKernels cross_entropy_table;
const CrossEntropyKernels cross_entropy_table = {
    cross_entropy_padded_width,
    cross_entropy_tile_classes,
    cross_entropy_project_scratch_bytes,
    cross_entropy_project,
    cross_entropy_forward_scratch_bytes,
    cross_entropy_forward_begin,
    cross_entropy_forward_block,
    cross_entropy_backward_scratch_bytes,
    cross_entropy_backward_begin,
    cross_entropy_backward_scores,
    cross_entropy_backward_hidden,
    cross_entropy_backward_end,
    cross_entropy_unproject_scratch_bytes,
    cross_entropy_grad_hidden,
    cross_entropy_grad_projection,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
