// A tile of 64 queries of one selection: which keys they see, and their scores with a tile of 64 keys.
#pragma once

#include "candidates.cuh"
#include "cuda/kernels/topk_select.h"

namespace sparse_attn::cuda {

// Rows of the groups that are packed, one after the other.
__host__ __device__ inline int64_t packed_rows(const SelectCall& call) {
    return call.plan.packed * call.select.query_length;
}
__device__ __forceinline__ int64_t works(const SelectCall& call) {
    return call.select.batch * (call.select.rule.groups / call.plan.packed) * call.plan.splits *
           divide_up(packed_rows(call), kGemmTile);
}
// Of a persistent block: tile n of all, the longest rows first, as causal ones are.
__device__ __forceinline__ Work work_of(const SelectCall& call, int64_t n) {
    const int64_t packs = call.select.rule.groups / call.plan.packed, splits = call.plan.splits;
    const int64_t sets = call.select.batch * packs * splits, set = n % sets;
    const int64_t tile = divide_up(packed_rows(call), kGemmTile) - 1 - n / sets;
    return {n, static_cast<int>(set / splits / packs),
            static_cast<int>(set / splits % packs * call.plan.packed), static_cast<int>(set % splits),
            static_cast<int>(tile * kGemmTile)};
}

__device__ __forceinline__ RowSize row_size(const SelectCall& call, bool of_sample = false) {
    const int budget = static_cast<int>(of_sample ? call.plan.sample_budget : call.select.top_k);
    return {budget, budget / 8, static_cast<int>(call.plan.capacity)};
}
__device__ __forceinline__ Candidate* block_slots(const SelectCall& call) {
    return static_cast<Candidate*>(call.candidates) + blockIdx.x * kGemmTile * call.plan.capacity;
}

__device__ __forceinline__ int64_t keys_of(const SelectCall& call, int64_t b) {
    const SelectParams& p = call.select;
    int64_t length = p.key_length;
    if (p.rule.lengths) length = p.rule.lengths[b];
    if (call.narrow_lengths) length = call.narrow_lengths[b];
    return length < 0 ? 0 : length < p.key_length ? length : p.key_length;
}

// x in [0, most].
__device__ __forceinline__ int32_t within(int64_t x, int64_t most) {
    return static_cast<int32_t>(x < 0 ? 0 : x < most ? x : most);
}

// Of query t in batch entry b, which has `length` keys.
__device__ __forceinline__ RowRule row_rule(const SelectParams& p, int64_t b, int64_t t, int64_t length) {
    constexpr int64_t kNever = 2147483647;
    const int64_t begin = p.rule.starts.given() ? within(p.rule.starts.at(b, t), p.key_length) : 0;
    RowRule rule;
    rule.begin = static_cast<int32_t>(begin);
    rule.end = within(p.rule.is_causal ? t + p.rule.causal_offset + 1 : length, length);
    rule.sinks_end = within(p.rule.sink_end(begin), p.key_length);
    rule.window_start =
        p.rule.is_causal ? within(t + p.rule.causal_offset + 1 - p.rule.window, kNever) : kNever;
    return rule;
}

// Keys as a sample numbers them, every `stride`-th one from the middle of the first stride on: of how many of
// the first `end` keys it has.
__host__ __device__ inline int sampled(int end, int stride) {
    return (end + stride / 2) / stride;
}

// Of all keys, or of a sample of them, of which none is kept always. The block's threads are together before
// and after; fills `shared`.
__device__ __forceinline__ SelectTile select_tile(const SelectCall& call, const Work& work,
                                                  SelectShared& shared, int stride = 1) {
    const SelectParams& p = call.select;
    const int64_t length = keys_of(call, work.b), left = packed_rows(call) - work.first;
    const int rows = left < kGemmTile ? static_cast<int>(left) : kGemmTile;
    if (threadIdx.x < kGemmTile) {
        RowRule rule{0, 0, 0, 2147483647};
        if (static_cast<int>(threadIdx.x) < rows) {
            rule = row_rule(p, work.b, (work.first + threadIdx.x) % p.query_length, length);
            if (stride > 1) rule = {sampled(rule.begin, stride), sampled(rule.end, stride), 0, 2147483647};
        }
        shared.rules[threadIdx.x] = rule;
    }
    if (threadIdx.x == 0) {
        const Strides& strides = p.rule.mask_strides;
        shared.mask = {nullptr,   work.first, static_cast<int>(p.query_length),
                       strides.h, strides.t,  stride * strides.d};
        if (p.rule.mask)
            shared.mask.at =
                p.rule.mask + work.b * strides.b + work.group * strides.h + stride / 2 * strides.d;
    }
    __syncthreads();
    int begin = 2147483647, end = 0, plain_begin = 0, plain_end = 2147483647;
    for (int i = threadIdx.x % 32; i < rows; i += 32) {
        const RowRule rule = shared.rules[i];
        begin = min(begin, rule.begin), end = max(end, rule.end);
        plain_begin = max(plain_begin, max(rule.begin, rule.sinks_end));
        plain_end = min(plain_end, min(rule.end, rule.window_start));
    }
    const int64_t piece = work.split * call.plan.split_keys;
    SelectTile tile;
    tile.begin = max(__reduce_min_sync(kWarp, begin) / kGemmTile * kGemmTile, within(piece, p.key_length));
    tile.end = min(__reduce_max_sync(kWarp, end), within(piece + call.plan.split_keys, p.key_length));
    tile.plain_begin = (__reduce_max_sync(kWarp, plain_begin) + kGemmTile - 1) / kGemmTile * kGemmTile;
    tile.plain_end = __reduce_min_sync(kWarp, plain_end) / kGemmTile * kGemmTile;
    tile.apart = stride * p.key_strides.t;
    if (p.rule.mask) tile.plain_end = 0;
    if (threadIdx.x == 0) shared.tile = tile, shared.size = row_size(call, stride > 1);
    __syncthreads();
    return tile;
}

// Writes the best of each of the warp's rows: to the result, or where the keys are in pieces to the piece's
// part of it.
template <class T>
__device__ __forceinline__ void write_best(const SelectCall& call, const Work& work, const Candidate* slots,
                                           const Rows<T>& rows, SelectShared& shared) {
    const SelectParams& p = call.select;
    const int lane = threadIdx.x % 32, budget = static_cast<int>(p.top_k);
    rows.write_counts(shared);
#pragma unroll 1
    for (int i = 0; i < kWarpRows; ++i) {
        const int q = TileShape<T>::of_warp(i);
        if (work.first + q >= packed_rows(call)) break;
        const RowRule rule = shared.rules[q];
        const uint32_t first = q * static_cast<uint32_t>(call.plan.capacity);
        const CandidateRow row{slots, first, shared.counts[q], rule, rule.forces()};
        const int64_t place = (work.b * p.rule.groups + work.group) * p.query_length + work.first + q;
        Chunk chunk;
        const Cut cut = find_cut(chunk, row, budget, 0, shared.bins[threadIdx.x / 32]);
        if (call.plan.splits == 1) {
            int32_t* out = p.indices + place * p.top_k;
            keep(chunk, row, cut, [&](int at, uint32_t, int32_t key) { out[at] = key; });
            for (int64_t at = cut.kept + lane; at < p.top_k; at += 32) out[at] = -1;
        } else {
            Candidate* out =
                static_cast<Candidate*>(call.parts) + (place * call.plan.splits + work.split) * p.top_k;
            keep(chunk, row, cut,
                 [&](int at, uint32_t rank, int32_t key) { out[at] = Candidate{score_of(rank), key}; });
            for (int64_t at = cut.kept + lane; at < p.top_k; at += 32) out[at] = Candidate{0.f, -1};
        }
    }
}

}  // namespace sparse_attn::cuda
