// variable_width_embedding on CUDA, from torch's tensors to the kernels. Arguments are validated in Python
// first, with better words; the checks here keep a direct call of an op from reading or writing out of
// bounds. Dense gradients alone: the number of rows of a sparse one would have to come back from the GPU.
#include "cuda/kernels/variable_width_embedding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <limits>
#include <tuple>
#include <vector>

#include "cuda/call.h"

namespace sparse_attn {
namespace {

using Tensors = std::vector<Tensor>;

bool is_index(const Tensor& t) {
    return t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long;
}

// The parameters, and the contiguous tensors that they point into.
struct Call {
    cuda::EmbedParams params{};
    Tensor ids, token_band, token_row;
    Tensors tables, projections, scratch;
    CudaCall cuda;

    Call(const char* op, const Tensor& ids_, const Tensors& tables_, const Tensors& projections_,
         const Tensor& token_band_, const Tensor& token_row_, int64_t padding_idx, bool sparse)
        : ids(torch::stable::contiguous(ids_)),
          token_band(torch::stable::contiguous(token_band_)),
          token_row(torch::stable::contiguous(token_row_)),
          cuda(op, {&ids, &token_band, &token_row}) {
        STD_TORCH_CHECK(
            !tables_.empty() && tables_.size() == projections_.size() && tables_.size() <= cuda::kMostBands,
            op, ": takes 1 to ", cuda::kMostBands,
            " tables and a projection (possibly without elements) for each; got ", tables_.size(), " and ",
            projections_.size());
        STD_TORCH_CHECK(!sparse, op, ": its gradients are dense");
        STD_TORCH_CHECK(is_index(ids) && is_index(token_row) && token_band.scalar_type() == ScalarType::Int &&
                            token_band.numel() == token_row.numel(),
                        op, ": takes int32 or int64 ids and token_row, and int32 token_band; got token_band ",
                        shape_of(token_band), " and token_row ", shape_of(token_row));
        cuda::EmbedParams& p = params;
        p.ids = ids.const_data_ptr();
        p.token_band = static_cast<const int32_t*>(token_band.const_data_ptr());
        p.token_row = token_row.const_data_ptr();
        p.wide_ids = ids.scalar_type() == ScalarType::Long;
        p.wide_rows = token_row.scalar_type() == ScalarType::Long;
        p.count = ids.numel(), p.vocabulary = token_band.numel(), p.padding_idx = padding_idx;
        p.dtype = dtype_of(op, tables_[0]);
        p.embedding_dim = projections_[0].numel() ? projections_[0].size(0) : tables_[0].size(1);
        p.band_count = static_cast<int32_t>(tables_.size());
        for (size_t b = 0; b < tables_.size(); ++b) {
            const Tensor &table = tables_[b], &projection = projections_[b];
            const bool projected = projection.numel() > 0;
            STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == tables_[0].scalar_type() &&
                                table.is_cuda() && table.get_device_index() == cuda.device &&
                                projection.is_cuda() && projection.get_device_index() == cuda.device &&
                                projection.scalar_type() == tables_[0].scalar_type() &&
                                (projected ? projection.dim() == 2 && projection.size(0) == p.embedding_dim &&
                                                 projection.size(1) == table.size(1)
                                           : table.size(1) == p.embedding_dim),
                            op, ": table ", b, " [n, width] and its projection [D, width] do not agree; got ",
                            shape_of(table), " and ", shape_of(projection));
            tables.push_back(table.stride(1) == 1 ? table : torch::stable::contiguous(table));
            projections.push_back(torch::stable::contiguous(projection));
            cuda::EmbedBand& band = p.bands[b];
            band.table = tables[b].const_data_ptr();
            band.projection = projected ? projections[b].const_data_ptr() : nullptr;
            band.rows = table.size(0), band.stride = tables[b].stride(0), band.width = table.size(1);
            band.first = p.all_rows;
            p.all_rows += band.rows;
        }
        STD_TORCH_CHECK(p.all_rows < std::numeric_limits<int32_t>::max() &&
                            p.count < std::numeric_limits<int32_t>::max() && p.embedding_dim <= (1 << 20),
                        op, ": takes less than 2^31 ids and rows in all, and D up to 2^20; got ", p.count,
                        ", ", p.all_rows, " and ", p.embedding_dim);
    }
    float* floats(int64_t count) {
        scratch.push_back(torch::stable::new_empty(tables[0], {count}, ScalarType::Float));
        return static_cast<float*>(scratch.back().mutable_data_ptr());
    }
    void check(const char* error) const { cuda.check(error, {&ids, &tables[0]}); }
};

// (ascending, where each came from) of keys [N]; equal ones keep their order.
std::pair<Tensor, Tensor> stable_sort(const Tensor& keys) {
    std::array<StableIValue, 4> stack{
        torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
        torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// out [*ids.shape, D]. A projection without elements stands for none.
Tensor variable_width_embedding_cuda(Tensor ids, Tensors tables, Tensors projections, Tensor token_band,
                                     Tensor token_row, int64_t padding_idx, bool sparse) {
    (void)sparse;  // of the gradients
    Call c("variable_width_embedding.cuda", ids, tables, projections, token_band, token_row, padding_idx,
           false);
    std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
    shape.push_back(c.params.embedding_dim);
    Tensor out = torch::stable::new_empty(tables[0], shape);
    c.params.out = out.mutable_data_ptr();
    c.check(cuda::variable_width_embedding(c.params, c.cuda.device, c.cuda.stream));
    return out;
}

// (grad_tables, grad_projections, no rows): each B tensors or none.
std::tuple<Tensors, Tensors, Tensors> variable_width_embedding_backward_cuda(
    Tensor grad_out, Tensor ids, Tensors tables, Tensors projections, Tensor token_band, Tensor token_row,
    int64_t padding_idx, bool sparse, bool need_tables, bool need_projections) {
    const char* op = "variable_width_embedding_backward.cuda";
    Call c(op, ids, tables, projections, token_band, token_row, padding_idx, sparse);
    cuda::EmbedParams& p = c.params;
    STD_TORCH_CHECK(grad_out.is_cuda() && grad_out.get_device_index() == c.cuda.device &&
                        grad_out.scalar_type() == tables[0].scalar_type() &&
                        grad_out.numel() == p.count * p.embedding_dim,
                    op, ": grad_out must be [*ids.shape, D] in the tables' dtype; got ", shape_of(grad_out));
    grad_out = torch::stable::contiguous(grad_out);
    p.grad_out = grad_out.const_data_ptr();
    Tensor keys = torch::stable::new_empty(c.ids, {p.count}, ScalarType::Int);
    c.check(cuda::embedding_keys(p, static_cast<int32_t*>(keys.mutable_data_ptr()), c.cuda.device,
                                 c.cuda.stream));
    const auto [ascending, order] = stable_sort(keys);
    p.keys = static_cast<const int32_t*>(ascending.const_data_ptr());
    p.order = static_cast<const int64_t*>(order.const_data_ptr());
    Tensors grad_tables, grad_projections;
    for (size_t b = 0; b < tables.size(); ++b) {
        cuda::EmbedBand& band = p.bands[b];
        if (need_tables) {
            grad_tables.push_back(torch::stable::new_empty(tables[b], {band.rows, band.width}));
            band.grad_table = grad_tables.back().mutable_data_ptr();
            if (band.projection) band.back = c.floats(p.count * band.width);
        }
        if (need_projections) {
            grad_projections.push_back(
                torch::stable::new_empty(projections[b], {projections[b].size(0), projections[b].size(1)}));
            if (!band.projection) continue;
            band.grad_projection = grad_projections.back().mutable_data_ptr();
            band.parts = c.floats(cuda::kProjectionParts * p.embedding_dim * band.width);
        }
    }
    c.check(cuda::variable_width_embedding_backward(p, c.cuda.device, c.cuda.stream));
    return {grad_tables, grad_projections, Tensors{}};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "variable_width_embedding.cuda(Tensor ids, Tensor[] tables, Tensor[] projections, Tensor token_band, "
        "Tensor token_row, int padding_idx, bool sparse) -> Tensor out");
    m.def(
        "variable_width_embedding_backward.cuda(Tensor grad_out, Tensor ids, Tensor[] tables, "
        "Tensor[] projections, Tensor token_band, Tensor token_row, int padding_idx, bool sparse, "
        "bool need_tables, bool need_projections) "
        "-> (Tensor[] grad_tables, Tensor[] grad_projections, Tensor[] rows)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, m) {
    m.impl("variable_width_embedding.cuda", TORCH_BOX(&sparse_attn::variable_width_embedding_cuda));
    m.impl("variable_width_embedding_backward.cuda",
           TORCH_BOX(&sparse_attn::variable_width_embedding_backward_cuda));
}
