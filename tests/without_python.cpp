// A program without Python: opens the library of kernels (argv[1]) beside libtorch, and calls an op through
// torch's dispatcher. Only torch's C functions are used. Exit status 0: the answer is right.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/version.h>

#include <cstdio>
#include <cstring>

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
    // is_causal, causal_offset, window, sinks, groups
    StableListHandle rule = nullptr;
    torch_new_list_reserve_size(5, &rule);
    for (int64_t number : {0, 0, 0, 0, 1}) torch_list_push_back(rule, value_of(number));
    StableIValue stack[] = {
        tensor_of(query, 2),
        tensor_of(key, 8),
        value_of(int64_t{3}),  // top_k
        none,
        none,
        none,  // attn_mask, key_lengths, key_starts
        value_of(rule),
        value_of(1.0),  // scale
        value_of(false),
        none,  // rounded, blocks
        value_of(int64_t{1}),
        value_of(int64_t{1}),  // block_size, query_tile
    };
    if (torch_call_dispatcher("sparse_attn::topk_select", "cpu", stack, TORCH_ABI_VERSION) !=
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
