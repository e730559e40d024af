// Words and numbers about torch's tensors, for the host side of every op.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/params.h"

namespace sparse_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
    return text + "]";
}

inline std::string numbers_of(const std::vector<int64_t>& numbers) {
    std::string text = "[";
    for (int64_t n : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
    return text + "]";
}

inline DType dtype_of(const char* op, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return DType::kFloat32;
        case ScalarType::BFloat16:
            return DType::kBFloat16;
        case ScalarType::Half:
            return DType::kFloat16;
        default:
            STD_TORCH_CHECK(false, op, ": takes float32, bfloat16 and float16 tensors");
    }
}

inline Strides strides_of(const Tensor& t) {
    return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline int64_t blocks(int64_t n, int64_t size) {
    return (n + size - 1) / size;
}

}  // namespace sparse_attn
