#include "cpu/selection.h"

namespace sparse_attn {

std::vector<int64_t> lengths_of(const char* op, const std::optional<Tensor>& key_lengths, int64_t batch,
                                int64_t key_length) {
    std::vector<int64_t> lengths;
    if (!key_lengths) return lengths;
    const Tensor& n = *key_lengths;
    check_key_lengths(op, n, batch);
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t at = b * n.stride(0);
        const int64_t length = n.scalar_type() == ScalarType::Int
                                   ? static_cast<const int32_t*>(n.const_data_ptr())[at]
                                   : static_cast<const int64_t*>(n.const_data_ptr())[at];
        lengths.push_back(std::clamp<int64_t>(length, 0, key_length));
    }
    return lengths;
}

void prepare_selection(Selection& s, const char* op, const Tensor& query, const Tensor& key, int64_t top_k,
                       const RuleArguments& given, bool rounded) {
    s.params = select_params(op, query, key, top_k, given);
    s.params.rounded = rounded;
    s.lengths = lengths_of(op, given.key_lengths, s.params.batch, s.params.key_length);
    if (!s.lengths.empty()) s.params.rule.lengths = s.lengths.data();
}

bool needs_scores(const SelectParams& p) {
    int64_t most = p.key_length;
    if (p.rule.is_causal && !p.rule.offsets.given())
        most = std::min(most, p.query_length + p.rule.causal_offset);
    return most > p.top_k || p.rule.mask != nullptr || p.blocks != nullptr;
}

void pack_keys(Selection& s, int64_t block) {
    const SelectParams& p = s.params;
    const cpu::SelectKernels& k = cpu::topk_select_kernels();
    s.block = block;
    s.per_head = blocks(p.query_length, s.block);
    double pairs = static_cast<double>(p.batch * p.heads) * p.query_length * p.key_length;
    s.parallel = worth_threads(pairs * p.head_dim);
    if (!needs_scores(p)) return;
    const int64_t head_bytes = k.packed_head_bytes(p), panels = k.panel_count(p), chunk = 64;
    s.packed = allocate(head_bytes * p.batch * p.kv_heads);
    const int64_t chunks = blocks(panels, chunk);
    for_each_task(p.batch * p.kv_heads * chunks, 64, s.parallel, [&](int64_t i, char*) {
        int64_t head = i / chunks, c = i % chunks;
        k.pack_keys(p, head / p.kv_heads, head % p.kv_heads, {c * chunk, std::min(panels, (c + 1) * chunk)},
                    s.packed.get() + head * head_bytes);
    });
}

}  // namespace sparse_attn
