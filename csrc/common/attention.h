// The attention ops' tensors, checked and as the kernels' parameters: the same for every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "common/tensors.h"

namespace sparse_attn {

inline void check_qkv(const char* op, const Tensor& query, const Tensor& key, const Tensor* value) {
    bool ok = query.dim() == 4 && key.dim() == 4 && query.size(0) == key.size(0) &&
              query.size(3) == key.size(3) && query.size(3) > 0 && key.size(1) > 0 && query.size(1) > 0 &&
              query.size(1) % key.size(1) == 0 && query.scalar_type() == key.scalar_type() &&
              key.size(2) <= std::numeric_limits<int32_t>::max() - 64;
    if (ok && value != nullptr)
        ok = value->dim() == 4 && value->size(0) == key.size(0) && value->size(1) == key.size(1) &&
             value->size(2) == key.size(2) && value->size(3) > 0 && value->scalar_type() == key.scalar_type();
    STD_TORCH_CHECK(ok, op,
                    ": query [B, Hq, Tq, D], key [B, Hkv, Tk, D] and value [B, Hkv, Tk, Dv] must agree; got ",
                    shape_of(query), ", ", shape_of(key), value ? ", " + shape_of(*value) : std::string());
}

// Rows whose last dimension is contiguous: the kernels read them whole.
inline Tensor with_contiguous_rows(const Tensor& t) {
    return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t);
}

// The same words and checks for all who take them, with a rule or without. Null where there are none.
inline float soft_cap_of(const char* op, double softcap) {
    STD_TORCH_CHECK(softcap == 0.0 || (softcap >= 1e-30 && softcap <= 1e30), op,
                    ": softcap must be from 1e-30 to 1e30, or 0 for none; got ", softcap);
    return static_cast<float>(softcap);
}
inline const float* sink_logits_of(const char* op, const std::optional<Tensor>& sink_logits,
                                   const Tensor& query) {
    if (!sink_logits) return nullptr;
    const Tensor& s = *sink_logits;
    STD_TORCH_CHECK(s.scalar_type() == ScalarType::Float && s.dim() == 1 && s.size(0) == query.size(1) &&
                        (s.stride(0) == 1 || s.size(0) <= 1) && s.is_cuda() == query.is_cuda() &&
                        s.get_device_index() == query.get_device_index(),
                    op, ": sink_logits must be float32 [Hq], contiguous, on the query's device; got ",
                    shape_of(s));
    return static_cast<const float*>(s.const_data_ptr());
}

inline AttendParams attend_params(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                  double scale, double softcap, const std::optional<Tensor>& sink_logits) {
    AttendParams p{};
    p.query = query.const_data_ptr();
    p.key = key.const_data_ptr();
    p.value = value.const_data_ptr();
    p.query_strides = strides_of(query);
    p.key_strides = strides_of(key);
    p.value_strides = strides_of(value);
    p.batch = query.size(0), p.heads = query.size(1), p.kv_heads = key.size(1);
    p.query_length = query.size(2), p.key_length = key.size(2), p.head_dim = query.size(3),
    p.value_dim = value.size(3);
    p.scale = static_cast<float>(scale);
    p.softcap = soft_cap_of(op, softcap);
    p.sink_logits = sink_logits_of(op, sink_logits, query);
    p.dtype = dtype_of(op, query);
    return p;
}

inline void set_indices(AttendParams& p, const char* op, const Tensor& indices) {
    const int64_t groups = indices.dim() == 4 ? indices.size(1) : 0;
    STD_TORCH_CHECK(
        indices.scalar_type() == ScalarType::Int && indices.dim() == 4 && indices.size(0) == p.batch &&
            (groups == 1 || groups == p.kv_heads || groups == p.heads) && indices.size(2) == p.query_length,
        op, ": indices must be int32 [B, G, Tq, K] with G one of 1, Hkv, Hq; got ", shape_of(indices));
    p.indices = static_cast<const int32_t*>(indices.const_data_ptr());
    p.indices_strides = strides_of(indices);
    p.groups = groups;
    p.slots = indices.size(3);
}

inline Tensor new_lse(const Tensor& query) {
    return torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
}

// Throws unless grad_out [B, Hq, Tq, Dv], grad_lse and lse [B, Hq, Tq] fit the forward.
inline void check_gradients(const char* op, const AttendParams& f, const Tensor& grad_out,
                            const std::optional<Tensor>& grad_lse, const Tensor& lse) {
    const int64_t rows = f.batch * f.heads * f.query_length;
    STD_TORCH_CHECK(lse.numel() == rows && lse.scalar_type() == ScalarType::Float, op,
                    ": lse must be float32 [B, Hq, Tq]; got ", shape_of(lse));
    STD_TORCH_CHECK(grad_out.dim() == 4 && dtype_of(op, grad_out) == f.dtype && grad_out.size(0) == f.batch &&
                        grad_out.size(1) == f.heads && grad_out.size(2) == f.query_length &&
                        grad_out.size(3) == f.value_dim,
                    op, ": grad_out must be [B, Hq, Tq, Dv] in the query's dtype; got ", shape_of(grad_out));
    STD_TORCH_CHECK(!grad_lse || (grad_lse->numel() == rows && grad_lse->scalar_type() == ScalarType::Float),
                    op, ": grad_lse must be float32 [B, Hq, Tq]; got ",
                    grad_lse ? shape_of(*grad_lse) : std::string());
}

inline void check_out(const char* op, const AttendParams& f, const Tensor& query, const Tensor& out) {
    const bool has_out = out.dim() == 4 && out.scalar_type() == query.scalar_type() &&
                         out.size(0) == f.batch && out.size(1) == f.heads && out.size(2) == f.query_length &&
                         out.size(3) == f.value_dim;
    STD_TORCH_CHECK(has_out, op, ": out must be [B, Hq, Tq, Dv] in the query's dtype; got ", shape_of(out));
}

inline void check_key_lengths(const char* op, const Tensor& n, int64_t batch) {
    STD_TORCH_CHECK(n.dim() == 1 && n.size(0) == batch &&
                        (n.scalar_type() == ScalarType::Int || n.scalar_type() == ScalarType::Long),
                    op, ": key_lengths must be int32 or int64 [B]; got ", shape_of(n));
}

inline PerQuery per_query(const char* op, const char* name, const Tensor& t, const Tensor& query) {
    const bool narrow = t.scalar_type() == ScalarType::Int;
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == query.size(0) && t.size(1) == query.size(2) &&
                        (narrow || t.scalar_type() == ScalarType::Long) && t.is_cuda() == query.is_cuda() &&
                        t.get_device_index() == query.get_device_index(),
                    op, ": ", name, " must be int32 or int64 [B, Tq] on the query's device; got ",
                    shape_of(t));
    PerQuery numbers{nullptr, nullptr, t.stride(0), t.stride(1)};
    if (narrow)
        numbers.narrow = static_cast<const int32_t*>(t.const_data_ptr());
    else
        numbers.wide = static_cast<const int64_t*>(t.const_data_ptr());
    return numbers;
}

// What a schema carries of the rule: in the schema, among the parameters of an op's function, and passed on.
// The order is that of sparse_attn/rule.py, whose SCHEMA is compared with this one on import.
#define SPARSE_ATTN_RULE_SCHEMA                                                            \
    "Tensor? attn_mask, Tensor? key_lengths, Tensor? key_starts, Tensor? causal_offsets, " \
    "SymInt[] rule, float scale, float softcap, Tensor? sink_logits"
#define SPARSE_ATTN_RULE_PARAMETERS                                                                       \
    std::optional<Tensor> attn_mask, std::optional<Tensor> key_lengths, std::optional<Tensor> key_starts, \
        std::optional<Tensor> causal_offsets, std::vector<int64_t> rule, double scale, double softcap,    \
        std::optional<Tensor> sink_logits
#define SPARSE_ATTN_RULE_ARGUMENTS \
    attn_mask, key_lengths, key_starts, causal_offsets, rule, scale, softcap, sink_logits

// The same, by reference.
struct RuleArguments {
    const std::optional<Tensor>& attn_mask;       // bool [B, G, Tq, Tk]
    const std::optional<Tensor>& key_lengths;     // int32 or int64 [B]
    const std::optional<Tensor>& key_starts;      // int32 or int64 [B, Tq]
    const std::optional<Tensor>& causal_offsets;  // likewise
    const std::vector<int64_t>& numbers;          // read_rule() in rule.h
    double scale, softcap;
    const std::optional<Tensor>& sink_logits;  // float32 [Hq]
};

// Checked, all but `lengths`: each device has its own.
inline Rule rule_of(const char* op, const Tensor& query, const Tensor& key, const RuleArguments& given) {
    Rule rule{};
    STD_TORCH_CHECK(
        read_rule(rule, given.numbers.data(), static_cast<int64_t>(given.numbers.size())), op,
        ": rule must be [is_causal, causal_offset, last keys kept, first keys kept, groups], none of the "
        "kept negative; got ",
        numbers_of(given.numbers));
    const int64_t batch = query.size(0), heads = query.size(1), kv_heads = key.size(1);
    STD_TORCH_CHECK(rule.groups == heads || rule.groups == kv_heads || rule.groups == 1, op,
                    ": groups must be Hq, Hkv or 1; got ", rule.groups);
    rule.scale = static_cast<float>(given.scale);
    rule.softcap = soft_cap_of(op, given.softcap);
    rule.sink_logits = sink_logits_of(op, given.sink_logits, query);
    if (given.attn_mask) {
        const Tensor& m = *given.attn_mask;
        STD_TORCH_CHECK(m.scalar_type() == ScalarType::Bool && m.dim() == 4 && m.size(0) == batch &&
                            m.size(1) == rule.groups && m.size(2) == query.size(2) &&
                            m.size(3) == key.size(2),
                        op, ": attn_mask must be bool [B, G, Tq, Tk]; got ", shape_of(m));
        rule.mask = static_cast<const uint8_t*>(m.const_data_ptr());
        rule.mask_strides = strides_of(m);
    }
    if (given.key_lengths) check_key_lengths(op, *given.key_lengths, batch);
    if (given.key_starts) rule.starts = per_query(op, "key_starts", *given.key_starts, query);
    if (given.causal_offsets) rule.offsets = per_query(op, "causal_offsets", *given.causal_offsets, query);
    return rule;
}

// Everything but `rule.lengths`, `indices` and what blocks need.
inline SelectParams select_params(const char* op, const Tensor& query, const Tensor& key, int64_t top_k,
                                  const RuleArguments& given) {
    SelectParams p{};
    p.rule = rule_of(op, query, key, given);
    STD_TORCH_CHECK(top_k >= 1 && p.rule.kept() <= top_k, op,
                    ": top_k must be at least 1 and hold the keys that are always kept; got top_k=", top_k,
                    ", always kept: ", p.rule.kept());
    p.query = query.const_data_ptr();
    p.key = key.const_data_ptr();
    p.query_strides = strides_of(query);
    p.key_strides = strides_of(key);
    p.batch = query.size(0), p.heads = query.size(1), p.kv_heads = key.size(1);
    p.query_length = query.size(2), p.key_length = key.size(2), p.head_dim = query.size(3);
    p.top_k = std::min(top_k, p.key_length);
    p.dtype = dtype_of(op, query);
    return p;
}

}  // namespace sparse_attn
