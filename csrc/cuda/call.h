// What every CUDA op needs on the host side: the device, torch's current stream on it, and CUDA's errors with
// the op and its shapes.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "common/tensors.h"

namespace sparse_attn {

// The stream that torch works on. Throws where torch has no CUDA support. Defined in call.cpp.
void* current_stream(const char* op, int32_t device);

// The device of a call, current for as long as this lives, and its stream.
struct CudaCall {
    const char* op;
    int32_t device;
    torch::stable::accelerator::DeviceGuard guard;
    void* stream;

    // All `tensors` must lie on the device of the first.
    CudaCall(const char* op, std::initializer_list<const Tensor*> tensors)
        : op(op),
          device((*tensors.begin())->get_device_index()),
          guard(checked(op, tensors)),
          stream(current_stream(op, device)) {}

    // Throws CUDA's own words, if there are any, after the op and the shapes of `tensors`.
    void check(const char* error, std::initializer_list<const Tensor*> tensors) const {
        if (!error) return;
        std::string shapes;
        for (const Tensor* t : tensors) shapes += (shapes.empty() ? "" : ", ") + shape_of(*t);
        STD_TORCH_CHECK(false, op, ": ", shapes, " on cuda:", device, ": CUDA reports: ", error);
    }

  private:
    static int32_t checked(const char* op, std::initializer_list<const Tensor*> tensors) {
        const Tensor& first = **tensors.begin();
        for (const Tensor* t : tensors)
            STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == first.get_device_index(), op,
                            ": all tensors must be on one CUDA device; got one of shape ", shape_of(*t),
                            " elsewhere");
        return first.get_device_index();
    }
};

}  // namespace sparse_attn
