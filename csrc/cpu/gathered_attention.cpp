// gathered_attention on the CPU, forward and backward, from torch's tensors to the kernels.
#include "cpu/kernels/gathered_attention.h"

#include <torch/csrc/stable/library.h>

#include "cpu/masked_attention.h"

SPARSE_ATTN_FIND_KERNELS(gathered_attention_backward, AttendBackwardKernels)

namespace sparse_attn {
namespace {

// Query heads that one task works on: those of a key head, which share its rows in cache.
constexpr int64_t kAttendQueries = 64;

bool attend_worth_threads(const AttendParams& p) {
    return worth_threads(static_cast<double>(p.batch * p.heads) * p.query_length * p.slots *
                         (p.head_dim + p.value_dim));
}

std::tuple<Tensor, Tensor> gathered_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor indices,
                                                  double scale, double softcap,
                                                  std::optional<Tensor> sink_logits) {
    const char* op = "gathered_attention.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    indices = with_contiguous_rows(indices);
    AttendParams p = attend_params(op, query, key, value, scale, softcap, sink_logits);
    set_indices(p, op, indices);
    Tensor out = torch::stable::new_empty(query, {p.batch, p.heads, p.query_length, p.value_dim});
    Tensor lse = new_lse(query);
    if (out.numel() == 0) return {out, lse};
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    attend_to_indices(p);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> gathered_attention_backward_cpu(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor indices,
    Tensor out, Tensor lse, double scale, double softcap, std::optional<Tensor> sink_logits,
    bool /* atomics */) {
    const char* op = "gathered_attention_backward.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    indices = with_contiguous_rows(indices);
    MaskedBackwardParams m{};
    AttendParams& f = m.forward;
    f = attend_params(op, query, key, value, scale, softcap, sink_logits);
    set_indices(f, op, indices);
    const Gradients made = new_gradients(m, op, query, key, value, grad_out, grad_lse, out, lse);
    if (f.batch > 0) gradients_of_indices(m, false);
    return made.all();
}

}  // namespace

void gradients_of_indices(MaskedBackwardParams& m, bool of_more) {
    const AttendParams& f = m.forward;
    if (backward_by_tiles(m, f.indices)) return;
    AttendBackwardParams p{};
    p.forward = f;
    p.out = m.out, p.out_strides = m.out_strides;
    p.grad_out = m.grad_out, p.grad_out_strides = m.grad_out_strides, p.grad_lse = m.grad_lse;
    p.grad_query = m.grad_query, p.grad_key = m.grad_key, p.grad_value = m.grad_value;
    // Without vector instructions the query pass goes first, too: of the other order's products in plain
    // floats GCC 12's vectoriser makes wrong code (clang's is right, and neither finds a fault in the
    // source).
    const bool whole = f.dtype == DType::kFloat32 && cpu::isa() != cpu::Isa::generic;
    const int64_t rows = f.batch * f.heads * f.query_length, slots = rows * f.slots;
    // Σ P∘dP is dO·out, but taken over the slots where `out` is a half type: more exact.
    Memory probability, grad_score = allocate(slots * 4);
    Memory centre;
    if (!whole) probability = allocate(slots * 4);
    if (whole || of_more) centre = allocate(rows * 4);
    p.centre = reinterpret_cast<float*>(centre.get());
    p.probability = reinterpret_cast<float*>(probability.get());
    p.grad_score = reinterpret_cast<float*>(grad_score.get());

    const cpu::AttendBackwardKernels& k = cpu::gathered_attention_backward_kernels();
    const bool parallel = attend_worth_threads(f);
    const int64_t per_kv = f.heads / f.kv_heads, per_head = blocks(f.query_length, kAttendQueries);
    const auto query_pass = [&] {
        for_each_task(f.batch * f.kv_heads * per_head, k.query.scratch_bytes(p), parallel,
                      [&](int64_t i, char* scratch) {
                          Block t = block_of(i, f.kv_heads, per_head, kAttendQueries, f.query_length);
                          k.query.run(p, {t.b, {t.group * per_kv, (t.group + 1) * per_kv}, t.queries},
                                      scratch);
                      });
    };
    if (p.centre)
        for_each_task(f.batch * f.heads * per_head, 64, parallel, [&](int64_t i, char*) {
            Block t = block_of(i, f.heads, per_head, kAttendQueries, f.query_length);
            k.centre(p, t.b, t.group, t.queries);
        });
    if (!whole) query_pass();

    // The size changes no result, since each key sums in query order. Sums of half types are made in scratch,
    // which is to stay in the second-level cache; each block reads all queries' indices.
    const int64_t row_bytes = 4 * (f.head_dim + f.value_dim),
                  threads = parallel ? torch::stable::get_num_threads() : 1;
    int64_t block = std::max<int64_t>(64, (int64_t{1} << (whole ? 21 : 19)) / row_bytes);
    const int64_t wanted =
        blocks(4 * threads, f.batch * f.kv_heads);  // blocks per head that keep all threads busy
    block = std::clamp<int64_t>(blocks(f.key_length, wanted), 1, block);
    const int64_t key_blocks = blocks(f.key_length, block);
    for_each_task(f.batch * f.kv_heads * key_blocks, k.key_scratch_bytes(p, block), parallel,
                  [&](int64_t i, char* scratch) {
                      Block t = block_of(i, f.kv_heads, key_blocks, block, f.key_length);
                      k.key(p, t.b, t.group, t.queries, scratch);
                  });
    if (whole) query_pass();
}

}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "gathered_attention.cpu(Tensor query, Tensor key, Tensor value, Tensor indices, float scale, float "
        "softcap, Tensor? sink_logits) "
        "-> (Tensor out, Tensor lse)");
    m.def(
        "gathered_attention_backward.cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor value, Tensor indices, Tensor out, Tensor lse, float scale, float softcap, Tensor? "
        "sink_logits, bool atomics) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("gathered_attention.cpu", TORCH_BOX(&sparse_attn::gathered_attention_cpu));
    m.impl("gathered_attention_backward.cpu", TORCH_BOX(&sparse_attn::gathered_attention_backward_cpu));
}
