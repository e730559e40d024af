// The host functions of csrc/cuda/kernels under C names, for ctypes: a device and a stream mean nothing here.
#include "cuda/kernels/gathered_attention.h"
#include "cuda/kernels/topk_select.h"
#include "cuda/kernels/variable_width_embedding.h"

using namespace sparse_attn;

extern "C" {

// What tests/simt/params.py must agree with.
int64_t bytes_of_attend_gradients() {
    return sizeof(cuda::AttendGradients);
}
int64_t bytes_of_select_call() {
    return sizeof(cuda::SelectCall);
}
int64_t bytes_of_embed_params() {
    return sizeof(cuda::EmbedParams);
}

const char* run_gathered_attention(const AttendParams* p) {
    return cuda::gathered_attention(*p, 0, nullptr);
}
int64_t run_key_list_blocks(const AttendParams* p) {
    return cuda::key_list_blocks(*p);
}
int64_t run_key_list_range(const AttendParams* p, int64_t blocks) {
    return cuda::key_list_range(*p, blocks);
}
bool run_gradients_on_tiles(const AttendParams* p) {
    return cuda::gradients_on_tiles(*p);
}
int64_t run_gradient_chunk(const AttendParams* p) {
    return cuda::gradient_chunk(*p);
}
int64_t run_partial_floats(const AttendParams* p, int64_t chunk) {
    return cuda::partial_floats(*p, chunk);
}
const char* run_gathered_attention_backward(const cuda::AttendGradients* g) {
    return cuda::gathered_attention_backward(*g, 0, nullptr);
}

const char* run_variable_width_embedding(const cuda::EmbedParams* p) {
    return cuda::variable_width_embedding(*p, 0, nullptr);
}
const char* run_embedding_keys(const cuda::EmbedParams* p, int32_t* keys) {
    return cuda::embedding_keys(*p, keys, 0, nullptr);
}
const char* run_variable_width_embedding_backward(const cuda::EmbedParams* p) {
    return cuda::variable_width_embedding_backward(*p, 0, nullptr);
}

void run_select_plan(cuda::SelectCall* call) {
    call->plan = cuda::select_plan(call->select, 0);
}
const char* run_topk_select(const cuda::SelectCall* call) {
    return cuda::topk_select(*call, 0, nullptr);
}
}
