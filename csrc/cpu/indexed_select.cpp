// indexed_select on the CPU: topk_select's selection, found through 8-bit rows of the keys.
#include <torch/csrc/stable/library.h>

#include "cpu/topk_decode.h"

namespace sparse_attn {
namespace {

KeyIndexParams key_index_of(const char* op, const Tensor& key, const Tensor& codes, const Tensor& bounds,
                            const Tensor& shift) {
    const int64_t batch = key.size(0), heads = key.size(1), dim = key.size(3), keys = cpu::kIndexKeys;
    const auto fits = [&](const Tensor& t, ScalarType type, const std::vector<int64_t>& shape) {
        bool ok =
            t.scalar_type() == type && t.is_contiguous() && t.dim() == static_cast<int64_t>(shape.size());
        for (size_t d = 0; ok && d < shape.size(); ++d) ok = t.size(static_cast<int64_t>(d)) == shape[d];
        return ok;
    };
    const int64_t n = codes.dim() == 6 ? codes.size(2) : 0;
    STD_TORCH_CHECK(
        n * keys >= key.size(2) &&
            fits(codes, ScalarType::Char, {batch, heads, n, blocks(dim, 4), keys, 4}) &&
            fits(bounds, ScalarType::Float, {batch, heads, n, 3, keys}) &&
            fits(shift, ScalarType::Float, {batch, heads, dim}),
        op, ": the index must be int8 [B, Hkv, N, ⌈D/4⌉, 16, 4], float32 [B, Hkv, N, 3, 16] and float32 ",
        "[B, Hkv, D], contiguous, of at least the keys ", shape_of(key), "; got ", shape_of(codes), ", ",
        shape_of(bounds), ", ", shape_of(shift));
    return {static_cast<const int8_t*>(codes.const_data_ptr()),
            static_cast<const float*>(bounds.const_data_ptr()),
            static_cast<const float*>(shift.const_data_ptr()), n};
}

Tensor indexed_select_cpu(Tensor query, Tensor key, int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS, Tensor codes,
                          Tensor bounds, Tensor shift) {
    const char* op = "indexed_select.cpu";
    check_qkv(op, query, key, nullptr);
    key = with_contiguous_rows(key);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    const KeyIndexParams index = key_index_of(op, key, codes, bounds, shift);
    Tensor indices = new_indices(query, s.params);
    if (indices.numel() > 0) decode(s.params, 0, [](int64_t, int64_t, int64_t, char*) {}, index);
    return indices;
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def("indexed_select.cpu(Tensor query, Tensor key, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
          ", Tensor codes, Tensor bounds, Tensor shift) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("indexed_select.cpu", TORCH_BOX(&sparse_attn::indexed_select_cpu));
}
