// indexed_select on the CPU: topk_select's selection, found through 8-bit rows of the keys.
#include <torch/csrc/stable/library.h>

#include "cpu/topk_decode.h"

namespace sparse_attn {
namespace {

Tensor indexed_select_cpu(Tensor query, Tensor key, int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS, Tensor codes,
                          Tensor bounds, Tensor shift) {
    const char* op = "indexed_select.cpu";
    check_qkv(op, query, key, nullptr);
    key = with_contiguous_rows(key);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    const int64_t n = codes.dim() == 6 ? codes.size(2) : 0;
    STD_TORCH_CHECK(n * cpu::kIndexKeys >= key.size(2), op, ": the index must be of at least the keys ",
                    shape_of(key), "; got ", shape_of(codes));
    const KeyIndexParams index = key_index_of(op, key.size(0), key.size(1), n, key.size(3), codes, bounds,
                                              shift, {key.size(0), key.size(1), key.size(3)});
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
