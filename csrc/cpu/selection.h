// What the CPU ops that select share on the host: lengths within bounds, and packed keys.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "common/attention.h"
#include "cpu/bounds.h"
#include "cpu/isa.h"
#include "cpu/kernels/topk_bounds.h"
#include "cpu/memory.h"
#include "cpu/tasks.h"

SPARSE_ATTN_FIND_KERNELS(topk_select, SelectKernels)
SPARSE_ATTN_FIND_KERNELS(topk_bounds, BoundsKernels)

namespace sparse_attn {

// key_lengths as int64 [B] within [0, Tk]; empty for none.
std::vector<int64_t> lengths_of(const char* op, const std::optional<Tensor>& key_lengths, int64_t batch,
                                int64_t key_length);

// Some queries of one batch entry.
struct QueryPart {
    int64_t b;
    cpu::Range queries;
};

struct Selection {
    SelectParams params;
    std::vector<int64_t> lengths;
    // Of packed sequences: the queries of each task, and the panels of keys that they need; empty: all.
    std::vector<QueryPart> parts;
    std::vector<uint8_t> panels;
    Memory packed;
    int64_t block, per_head;
    bool parallel;
    // Whether logits are wanted of tasks (SelectTask); where in a thread's scratch they are, 0: nowhere.
    bool wants_logits = false;
    int64_t logits_at = 0;

    const float* logits(const char* scratch) const {
        return logits_at ? reinterpret_cast<const float*>(scratch + logits_at) : nullptr;
    }
};

// Fills s.params, all but the result's pointer and what blocks need.
void prepare_selection(Selection& s, const char* op, const Tensor& query, const Tensor& key, int64_t top_k,
                       const RuleArguments& given, bool rounded = false);

// int32 [B, G, Tq, K], and p.indices points to it.
inline Tensor new_indices(const Tensor& query, SelectParams& p) {
    Tensor indices =
        torch::stable::new_empty(query, {p.batch, p.rule.groups, p.query_length, p.top_k}, ScalarType::Int);
    prefer_large_pages(indices.mutable_data_ptr(), indices.numel() * 4);
    p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    return indices;
}

// Whether any query can see more keys than it may keep: if none can, no score is needed.
bool needs_scores(const SelectParams& p);

// Packs the keys, unless no query can see more keys than it may keep (or `always`); `block` queries make one
// task.
void pack_keys(Selection& s, int64_t block, bool always = false);

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

// Selects for all queries, by bounds where that is faster: then(block, scratch) for each block of queries, in
// the task that chose its keys and with as much scratch as was asked for. Only for blocks that are `wanted`,
// where that is given.
void select_all(Selection& s, int64_t scratch_bytes, const std::function<void(const Block&, char*)>& then,
                const std::function<bool(const Block&)>& wanted = nullptr);

}  // namespace sparse_attn
