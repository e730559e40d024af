// What the attention ops share on the host: their arguments as the kernels take them, and packed keys.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu_tasks.h"

namespace sparse_attn {

// Throws unless query [B, Hq, Tq, D], key [B, Hkv, Tk, D] and value [B, Hkv, Tk, Dv] (or null) agree.
void check_qkv(const char* op, const Tensor& query, const Tensor& key, const Tensor* value);

// Rows whose last dimension is contiguous: the kernels read them whole.
Tensor with_contiguous_rows(const Tensor& t);

// All but the results and the indices.
AttendParams attend_params(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                           double scale);
Tensor new_lse(const Tensor& query);

// Throws unless grad_out [B, Hq, Tq, Dv], grad_lse and lse [B, Hq, Tq] fit the forward.
void check_gradients(const char* op, const AttendParams& f, const Tensor& grad_out,
                     const std::optional<Tensor>& grad_lse, const Tensor& lse);

// key_lengths as int64 [B] within [0, Tk]; empty for none.
std::vector<int64_t> lengths_of(const char* op, const std::optional<Tensor>& key_lengths, int64_t batch,
                                int64_t key_length);

struct Selection {
    SelectParams params;
    std::vector<int64_t> lengths;
    Memory packed;
    int64_t block, per_head;
    bool parallel;
};

// Fills s.params, all but the result's pointer.
void prepare_selection(Selection& s, const char* op, const Tensor& query, const Tensor& key,
                       const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_lengths,
                       int64_t top_k, bool is_causal, int64_t causal_offset, double scale, int64_t window,
                       int64_t sinks, int64_t groups, bool rounded = false);

// Packs the keys, unless no query can see more keys than it may keep; `block` queries make one task.
void pack_keys(Selection& s, int64_t block);

// Task i of B·G·per_head: all queries of one head in turn, so that its keys stay in cache, the longest rows
// first.
struct Block {
    int64_t b, group;
    cpu::Range queries;
};
inline Block block_of(int64_t i, int64_t groups, int64_t per_head, int64_t block, int64_t query_length) {
    int64_t head = i / per_head, n = per_head - 1 - i % per_head;
    return {head / groups, head % groups, {n * block, std::min(query_length, (n + 1) * block)}};
}

}  // namespace sparse_attn
