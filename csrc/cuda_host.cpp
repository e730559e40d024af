// torch's stream, and fill_indices. Arguments are validated in Python first, with better words; the checks
// here keep a direct call of the op from writing out of bounds.
#include "cuda_host.h"

#ifdef SPARSE_ATTN_HAVE_CUDA

#include <dlfcn.h>

#include <limits>

#include "cuda/fill.h"
#include "cuda_launch.h"

namespace sparse_attn {

// libtorch_cuda is looked up among the libraries already loaded, never linked, so that this extension loads
// into a CPU-only torch as well.
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

void fill_indices_cuda(Tensor indices, int64_t value) {
    const char* op = "fill_indices.cuda";
    STD_TORCH_CHECK(indices.is_cuda() && indices.scalar_type() == ScalarType::Int && indices.is_contiguous(),
                    op, ": indices must be a contiguous int32 tensor on a CUDA device; got shape ",
                    shape_of(indices));
    STD_TORCH_CHECK(
        value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(), op,
        ": value must fit in int32; got ", value);
    const CudaCall call(op, {&indices});
    call.check(cuda::fill_words(indices.mutable_data_ptr(), indices.numel(), static_cast<uint32_t>(value),
                                call.device, call.stream),
               {&indices});
}

}  // namespace sparse_attn

#endif
