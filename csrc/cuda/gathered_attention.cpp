// gathered_attention on CUDA, forward and backward, from torch's tensors to the kernels. Arguments are
// validated in Python first, with better words; the checks here keep a direct call of an op from reading or
// writing out of bounds.
#include "cuda/kernels/gathered_attention.h"

#include <torch/csrc/stable/library.h>

#include "common/attention.h"
#include "cuda/call.h"

namespace sparse_attn {
namespace {

void check_dims(const char* op, const AttendParams& p) {
    STD_TORCH_CHECK(p.head_dim >= 1 && p.head_dim <= cuda::kMostDim && p.value_dim <= cuda::kMostDim, op,
                    ": takes head dimensions up to ", cuda::kMostDim, "; got ", p.head_dim, " and ",
                    p.value_dim);
    constexpr int64_t kMostBlocks = 2147483647;  // of a grid's first axis; the others take 65535
    STD_TORCH_CHECK(p.batch * p.heads * p.query_length <= kMostBlocks && p.batch * p.groups <= 65535 &&
                        p.batch <= 65535 && p.kv_heads <= 65535,
                    op, ": more rows than a launch takes; got B=", p.batch, ", Hq=", p.heads,
                    ", Tq=", p.query_length);
}

}  // namespace

std::tuple<Tensor, Tensor> gathered_attention_cuda(Tensor query, Tensor key, Tensor value, Tensor indices,
                                                   double scale, double softcap,
                                                   std::optional<Tensor> sink_logits) {
    const char* op = "gathered_attention.cuda";
    check_qkv(op, query, key, &value);
    const CudaCall call(op, {&query, &key, &value, &indices});
    query = with_contiguous_rows(query);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    indices = with_contiguous_rows(indices);
    AttendParams p = attend_params(op, query, key, value, scale, softcap, sink_logits);
    set_indices(p, op, indices);
    check_dims(op, p);
    Tensor out = torch::stable::new_empty(query, {p.batch, p.heads, p.query_length, p.value_dim});
    Tensor lse = new_lse(query);
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    call.check(cuda::gathered_attention(p, call.device, call.stream), {&query, &key, &value, &indices});
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> gathered_attention_backward_cuda(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor indices,
    Tensor out, Tensor lse, double scale, double softcap, std::optional<Tensor> sink_logits, bool atomics) {
    const char* op = "gathered_attention_backward.cuda";
    check_qkv(op, query, key, &value);
    const CudaCall call(op, {&query, &key, &value, &indices, &grad_out, &out, &lse});
    query = with_contiguous_rows(query);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    indices = with_contiguous_rows(indices);
    grad_out = torch::stable::contiguous(grad_out);
    out = torch::stable::contiguous(out);
    lse = torch::stable::contiguous(lse);
    cuda::AttendGradients g{};
    AttendParams& p = g.forward;
    p = attend_params(op, query, key, value, scale, softcap, sink_logits);
    set_indices(p, op, indices);
    check_dims(op, p);
    check_gradients(op, p, grad_out, grad_lse, lse);
    STD_TORCH_CHECK(out.scalar_type() == grad_out.scalar_type() && out.numel() == grad_out.numel(), op,
                    ": out must be [B, Hq, Tq, Dv] in the query's dtype; got ", shape_of(out));
    if (grad_lse) {
        STD_TORCH_CHECK(grad_lse->is_cuda() && grad_lse->get_device_index() == call.device, op,
                        ": grad_lse must be on the query's device");
        grad_lse = torch::stable::contiguous(*grad_lse);
    }
    Tensor grad_query = torch::stable::new_empty(query, {p.batch, p.heads, p.query_length, p.head_dim});
    Tensor grad_key = torch::stable::new_empty(key, {p.batch, p.kv_heads, p.key_length, p.head_dim});
    Tensor grad_value = torch::stable::new_empty(value, {p.batch, p.kv_heads, p.key_length, p.value_dim});
    const bool tiles = cuda::gradients_on_tiles(p);
    g.atomics = atomics && tiles;
    g.chunk = cuda::gradient_chunk(p);
    AttendParams part = p;
    part.query_length = g.chunk;
    const int64_t lists = g.atomics ? 0 : p.batch * p.groups, blocks = cuda::key_list_blocks(part);
    const int64_t range = cuda::key_list_range(part, blocks);
    const int64_t sums =
        g.atomics || g.chunk < p.query_length ? p.key_length * (p.head_dim + p.value_dim) : 0;
    auto scratch = [&](int64_t count, ScalarType type) {
        return torch::stable::new_empty(query, {count}, type);
    };
    Tensor rows = scratch(tiles ? 0 : p.batch * p.heads * p.query_length * 4, ScalarType::Float);
    Tensor starts = scratch(lists * (p.key_length + 1), ScalarType::Long);
    Tensor counts = scratch(lists * blocks * range, ScalarType::Long);
    Tensor queries = scratch(lists * g.chunk * p.slots, ScalarType::Int);
    Tensor partials = scratch(tiles && !g.atomics ? cuda::partial_floats(p, g.chunk) : 0, ScalarType::Float);
    Tensor all_sums = scratch(p.batch * p.kv_heads * sums, ScalarType::Float);
    p.out = out.mutable_data_ptr();
    g.grad_out = grad_out.const_data_ptr();
    g.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
    g.grad_query = grad_query.mutable_data_ptr();
    g.grad_key = grad_key.mutable_data_ptr();
    g.grad_value = grad_value.mutable_data_ptr();
    g.rows = static_cast<cuda::RowSoftmax*>(rows.mutable_data_ptr());
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    g.partials = static_cast<float*>(partials.mutable_data_ptr());
    g.sums = static_cast<float*>(all_sums.mutable_data_ptr());
    g.lists = {static_cast<int64_t*>(starts.mutable_data_ptr()),
               static_cast<int64_t*>(counts.mutable_data_ptr()),
               static_cast<int32_t*>(queries.mutable_data_ptr()), blocks, range};
    call.check(cuda::gathered_attention_backward(g, call.device, call.stream),
               {&query, &key, &value, &indices});
    return {grad_query, grad_key, grad_value};
}

}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "gathered_attention.cuda(Tensor query, Tensor key, Tensor value, Tensor indices, float scale, float "
        "softcap, Tensor? sink_logits) "
        "-> (Tensor out, Tensor lse)");
    m.def(
        "gathered_attention_backward.cuda(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor value, Tensor indices, Tensor out, Tensor lse, float scale, float softcap, Tensor? "
        "sink_logits, bool atomics) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, m) {
    m.impl("gathered_attention.cuda", TORCH_BOX(&sparse_attn::gathered_attention_cuda));
    m.impl("gathered_attention_backward.cuda", TORCH_BOX(&sparse_attn::gathered_attention_backward_cuda));
}
