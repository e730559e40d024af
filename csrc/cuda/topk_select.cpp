// topk_select on CUDA, from torch's tensors to the kernels. Arguments are validated in Python first, with
// better words; the checks here keep a direct call of an op from reading or writing out of bounds.
#include <torch/csrc/stable/library.h>

#include "common/attention.h"
#include "cuda/call.h"
#include "cuda/kernels/topk_select.h"

namespace sparse_attn {

Tensor topk_select_cuda(Tensor query, Tensor key, int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS, bool rounded,
                        std::optional<Tensor> blocks_of, int64_t block_size, int64_t query_tile) {
    const char* op = "topk_select.cuda";
    (void)block_size, (void)query_tile;  // of blocks
    STD_TORCH_CHECK(!rounded && !blocks_of, op, ": takes neither rounded nor blocks");
    check_qkv(op, query, key, nullptr);
    const CudaCall call(op, {&query, &key});
    for (const std::optional<Tensor>* t : {&attn_mask, &key_lengths})
        STD_TORCH_CHECK(!*t || ((*t)->is_cuda() && (*t)->get_device_index() == call.device), op,
                        ": attn_mask and key_lengths must be on the query's device");
    query = with_contiguous_rows(query);
    key = with_contiguous_rows(key);
    cuda::SelectCall c{};
    SelectParams& p = c.select;
    STD_TORCH_CHECK(!causal_offsets, op, ": has no causal_offsets");
    p = select_params(op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    constexpr int64_t kMostKeys = int64_t{1} << 30;
    STD_TORCH_CHECK(p.head_dim >= 1 && p.head_dim <= cuda::kMostSelectDim && p.batch <= 65535 &&
                        p.heads <= 65535 && p.query_length <= kMostKeys && p.key_length <= kMostKeys,
                    op, ": takes D from 1 to ", cuda::kMostSelectDim,
                    ", B and Hq up to 65535, Tq and Tk up to 2^30; got ", shape_of(query), " and ",
                    shape_of(key));
    if (key_lengths) {
        key_lengths = torch::stable::contiguous(*key_lengths);
        if (key_lengths->scalar_type() == ScalarType::Int) {
            c.narrow_lengths = static_cast<const int32_t*>(key_lengths->const_data_ptr());
        } else {
            p.rule.lengths = static_cast<const int64_t*>(key_lengths->const_data_ptr());
        }
    }
    Tensor indices =
        torch::stable::new_empty(query, {p.batch, p.rule.groups, p.query_length, p.top_k}, ScalarType::Int);
    p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    c.plan = cuda::select_plan(p, call.device);
    auto scratch = [&](int64_t bytes) { return torch::stable::new_empty(query, {bytes}, ScalarType::Byte); };
    Tensor candidates = scratch(c.plan.candidate_bytes), parts = scratch(c.plan.part_bytes);
    Tensor lse = scratch(c.plan.lse_bytes), lse_parts = scratch(c.plan.lse_part_bytes);
    c.candidates = candidates.mutable_data_ptr();
    c.parts = parts.mutable_data_ptr();
    c.lse = static_cast<float*>(lse.mutable_data_ptr());
    c.lse_parts = static_cast<float*>(lse_parts.mutable_data_ptr());
    call.check(cuda::topk_select(c, call.device, call.stream), {&query, &key});
    return indices;
}

}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def("topk_select.cuda(Tensor query, Tensor key, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
          ", bool rounded, Tensor? blocks, SymInt block_size, SymInt query_tile) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, m) {
    m.impl("topk_select.cuda", TORCH_BOX(&sparse_attn::topk_select_cuda));
}
