// A program without Python: opens the library of kernels (argv[1]) beside libtorch, and calls an op through
// torch's dispatcher. Only torch's C functions are used. Exit status 0: the answer is right.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/version.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

template <class T>
StableIValue value_of(T x) {
    StableIValue value = 0;
    std::memcpy(&value, &x, sizeof(x));
    return value;
}

StableIValue tensor_of(float* data, int64_t length) {  // [1, 1, length, 1]
    const int64_t sizes[] = {1, 1, length, 1}, strides[] = {length, length, 1, 1};
    AtenTensorHandle tensor = nullptr;
    aoti_torch_create_tensor_from_blob(data, 4, sizes, strides, 0, aoti_torch_dtype_float32(),
                                       aoti_torch_device_type_cpu(), 0, &tensor);
    return value_of(tensor);
}

int fail(const char* what, const char* why) {
    std::fprintf(stderr, "%s: %s\n", what, why ? why : "");
    return 1;
}

}  // namespace

int main(int, char** argv) {
    if (!dlopen(argv[1], RTLD_NOW)) return fail("dlopen", dlerror());
    if (dlsym(RTLD_DEFAULT, "Py_Initialize")) return fail("Python", "is loaded");
    float query[] = {1, -1}, key[] = {3, 1, 4, 1, 5, 9, 2, 6};
    const StableIValue none = 0;
    std::vector<StableIValue> stack = {tensor_of(query, 2), tensor_of(key, 8), none,
                                       none};  // no mask, no lengths
    // top_k, is_causal, causal_offset, scale, window, sinks, groups
    for (StableIValue v : {value_of(int64_t{3}), value_of(false), value_of(int64_t{0}), value_of(1.0),
                           value_of(int64_t{0}), value_of(int64_t{0}), value_of(int64_t{1})})
        stack.push_back(v);
    if (torch_call_dispatcher("sparse_attn::topk_select", "cpu", stack.data(), TORCH_ABI_VERSION) !=
        AOTI_TORCH_SUCCESS)
        return fail("topk_select", "the call failed");
    AtenTensorHandle indices = nullptr;
    std::memcpy(&indices, &stack[0], sizeof(indices));
    void* data = nullptr;
    int64_t count = 0;
    aoti_torch_get_data_ptr(indices, &data);
    aoti_torch_get_numel(indices, &count);
    const int32_t right[] = {4, 5, 7, 1, 3, 6};  // the largest of key, then the smallest
    if (count != 6 || std::memcmp(data, right, sizeof(right)) != 0)
        return fail("topk_select", "another answer");
    aoti_torch_delete_tensor_object(indices);
    return 0;
}
