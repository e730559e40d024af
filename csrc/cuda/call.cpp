#include "cuda/call.h"

#include <dlfcn.h>

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

}  // namespace sparse_attn
