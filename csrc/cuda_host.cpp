// From torch's tensors to the raw pointers of csrc/cuda. Arguments are validated in Python first, with better
// words; the checks here keep a direct call of the op from writing out of bounds.
#include "cuda_host.h"

#ifdef SPARSE_ATTN_HAVE_CUDA

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <string>

#include "cuda/fill.h"

namespace sparse_attn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
    return text + "]";
}

// The stream that torch works on. libtorch_cuda is looked up among the libraries already loaded, never
// linked, so that this extension loads into a CPU-only torch as well.
void* current_stream(const char* op, int32_t device) {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter getter = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                       : nullptr;
    }();
    STD_TORCH_CHECK(getter, op, ": this torch has no CUDA support (libtorch_cuda.so is not loaded)");
    void* stream = nullptr;
    STD_TORCH_CHECK(getter(device, &stream) == AOTI_TORCH_SUCCESS, op,
                    ": torch gave no current stream for cuda:", device);
    return stream;
}

}  // namespace

void fill_indices_cuda(Tensor indices, int64_t value) {
    const char* op = "fill_indices.cuda";
    STD_TORCH_CHECK(indices.is_cuda() && indices.scalar_type() == ScalarType::Int && indices.is_contiguous(),
                    op, ": indices must be a contiguous int32 tensor on a CUDA device; got shape ",
                    shape_of(indices));
    STD_TORCH_CHECK(
        value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(), op,
        ": value must fit in int32; got ", value);
    const int32_t device = indices.get_device_index();
    torch::stable::accelerator::DeviceGuard guard(device);
    const char* error = cuda::fill_words(indices.mutable_data_ptr(), indices.numel(),
                                         static_cast<uint32_t>(value), device, current_stream(op, device));
    STD_TORCH_CHECK(!error, op, ": indices ", shape_of(indices), " on cuda:", device,
                    ": CUDA reports: ", error);
}

}  // namespace sparse_attn

#endif
