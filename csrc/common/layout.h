// How tensors lie in memory, as kernels take them. No torch headers.
#pragma once

#include <cstdint>

namespace sparse_attn {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct Strides {
    int64_t b, h, t, d;
};

}  // namespace sparse_attn
