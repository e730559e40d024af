// The attention ops' tensors, checked and as the kernels' parameters: the same for every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "tensors.h"

namespace sparse_attn {

inline void check_qkv(const char* op, const Tensor& query, const Tensor& key, const Tensor* value) {
    bool ok = query.dim() == 4 && key.dim() == 4 && query.size(0) == key.size(0) &&
              query.size(3) == key.size(3) && key.size(1) > 0 && query.size(1) % key.size(1) == 0 &&
              query.scalar_type() == key.scalar_type() &&
              key.size(2) <= std::numeric_limits<int32_t>::max() - 64;
    if (ok && value != nullptr)
        ok = value->dim() == 4 && value->size(0) == key.size(0) && value->size(1) == key.size(1) &&
             value->size(2) == key.size(2) && value->scalar_type() == key.scalar_type();
    STD_TORCH_CHECK(ok, op,
                    ": query [B, Hq, Tq, D], key [B, Hkv, Tk, D] and value [B, Hkv, Tk, Dv] must agree; got ",
                    shape_of(query), ", ", shape_of(key), value ? ", " + shape_of(*value) : std::string());
}

// Rows whose last dimension is contiguous: the kernels read them whole.
inline Tensor with_contiguous_rows(const Tensor& t) {
    return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t);
}

inline AttendParams attend_params(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                  double scale) {
    AttendParams p{};
    p.query = query.const_data_ptr();
    p.key = key.const_data_ptr();
    p.value = value.const_data_ptr();
    p.query_strides = strides_of(query);
    p.key_strides = strides_of(key);
    p.value_strides = strides_of(value);
    p.batch = query.size(0), p.heads = query.size(1), p.kv_heads = key.size(1);
    p.query_length = query.size(2), p.key_length = key.size(2), p.head_dim = query.size(3),
    p.value_dim = value.size(3);
    p.scale = static_cast<float>(scale);
    p.dtype = dtype_of(op, query);
    return p;
}

inline void set_indices(AttendParams& p, const char* op, const Tensor& indices) {
    const int64_t groups = indices.dim() == 4 ? indices.size(1) : 0;
    STD_TORCH_CHECK(
        indices.scalar_type() == ScalarType::Int && indices.dim() == 4 && indices.size(0) == p.batch &&
            (groups == 1 || groups == p.kv_heads || groups == p.heads) && indices.size(2) == p.query_length,
        op, ": indices must be int32 [B, G, Tq, K] with G one of 1, Hkv, Hq; got ", shape_of(indices));
    p.indices = static_cast<const int32_t*>(indices.const_data_ptr());
    p.indices_strides = strides_of(indices);
    p.groups = groups;
    p.slots = indices.size(3);
}

inline Tensor new_lse(const Tensor& query) {
    return torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
}

}  // namespace sparse_attn
