// topk_select: exact, with no score matrix in device memory.
//
// A block has 64 queries of one selection and goes over their keys several times, 64 at once: a product on
// the tensor cores (float32: on the others), then a digit of 7 bits of each score's rank into a histogram per
// query. After two rounds a query's threshold is known up to a few candidates; a last round writes the keys
// above it in ascending order and keeps the candidates in shared memory, where the best are found and merged
// in. Where too many keys agree in the digits so far there is another round, to the last bit if need be: keys
// that are still equal then are ties, and the first of them are taken. All counts are integers, so no order
// of threads shows in the result.
//
// Heads that share a selection rank a key by the sum of its softmax probabilities; their LSE come from a
// kernel before.
#include "topk_select.h"

#include "lib/attention.cuh"
#include "lib/gathered_gemm.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kRows = kGemmTile;  // queries of a block
constexpr int kPitch = kGemmTile + 1;
constexpr int kDigitBits = 7, kBins = 1 << kDigitBits,
              kBinPitch = kBins + 1;  // pitches are odd: no bank conflicts
constexpr int kCandidates = 64;       // of a query
constexpr int kWarpRows = kRows / (kGemmThreads / 32);
constexpr uint32_t kHidden = 0, kNan = 0xfffffffeu, kForced = 0xffffffffu;

struct Candidate {
    uint32_t rank;
    int32_t key;
};

// What is known of a query's threshold: of the keys whose rank begins with `prefix` (down to bit `shift`)
// `wanted` are to be taken, and there are `found`; keys above are all taken.
struct RowState {
    uint32_t prefix;
    int32_t wanted, found;
};

template <class T>
struct SelectShared {
    static constexpr int kTileBytes = GatheredGemm<T, false, false>::kShared;  // scores take the same place
    static constexpr int kCounts = kTileBytes;  // candidates take the same place
    static constexpr int kStates = kCounts + 4 * kRows * kBinPitch;
    static constexpr int kSize = kStates + static_cast<int>(sizeof(RowState)) * kRows;
    static_assert(kTileBytes >= 4 * kRows * kPitch);
    static_assert(static_cast<int>(sizeof(Candidate)) * kCandidates <= 4 * kBinPitch);
};

// The block's queries, [first, first + kRows) of selection (b, group), and which keys exist for them.
struct SelectTile {
    int64_t b, group, first;
    int64_t length, limit;  // keys of the batch entry; those that the last query may see
    int64_t begin;          // a multiple of kGemmTile: no query sees a key before it
};

// Where the keys of a query begin, in [0, Tk].
__device__ __forceinline__ int64_t first_key(const SelectParams& p, const SelectTile& tile, int64_t t) {
    const int64_t first = p.rule.starts.given() ? p.rule.starts.at(tile.b, t) : 0;
    return first < 0 ? 0 : first < p.key_length ? first : p.key_length;
}

// The block's threads are together.
__device__ __forceinline__ SelectTile select_tile(const SelectCall& call) {
    const SelectParams& p = call.select;
    SelectTile tile;
    tile.b = blockIdx.z, tile.group = blockIdx.y;
    tile.first = (gridDim.x - 1 - static_cast<int64_t>(blockIdx.x)) * kRows;  // the longest rows first
    int64_t length = p.key_length;
    if (p.rule.lengths) length = p.rule.lengths[tile.b];
    if (call.narrow_lengths) length = call.narrow_lengths[tile.b];
    tile.length = length < 0 ? 0 : length < p.key_length ? length : p.key_length;
    const int64_t last = tile.first + kRows < p.query_length ? tile.first + kRows : p.query_length;
    tile.limit = tile.length;
    if (p.rule.is_causal && last + p.rule.causal_offset < tile.limit)
        tile.limit = last + p.rule.causal_offset;
    tile.begin = 0;
    if (p.rule.starts.given()) {
        int least = static_cast<int>(p.key_length);
        for (int64_t t = tile.first + threadIdx.x % 32; t < last; t += 32) {
            const int first = static_cast<int>(first_key(p, tile, t));
            least = first < least ? first : least;
        }
        for (int step = 16; step > 0; step /= 2) {
            const int theirs = __shfl_xor_sync(kWarp, least, step);
            least = theirs < least ? theirs : least;
        }
        tile.begin = least / kGemmTile * kGemmTile;
    }
    return tile;
}

__device__ __forceinline__ bool visible(const SelectParams& p, const SelectTile& tile, int64_t t,
                                        int64_t key) {
    if (t >= p.query_length || key >= tile.length || (p.rule.is_causal && key > t + p.rule.causal_offset) ||
        key < first_key(p, tile, t))
        return false;
    const Strides& s = p.rule.mask_strides;
    return !p.rule.mask || p.rule.mask[tile.b * s.b + tile.group * s.h + t * s.t + key * s.d];
}

// An integer that orders keys: hidden < −inf < … < +inf < NaN < forced.
__device__ __forceinline__ uint32_t rank_of(const SelectParams& p, const SelectTile& tile, int64_t t,
                                            int64_t key, float score) {
    if (!visible(p, tile, t, key)) return kHidden;
    if (key < p.rule.sink_end(first_key(p, tile, t)) ||
        (p.rule.is_causal && key > t + p.rule.causal_offset - p.rule.window))
        return kForced;
    if (score != score) return kNan;
    const uint32_t bits = __float_as_uint(score + 0.f);  // −0 becomes 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// factor · q·k of 64 queries of head h and 64 keys from `key` on: each(i, j, product).
template <class T, class Each>
__device__ __forceinline__ void score_tile(const SelectParams& p, const SelectTile& tile, int64_t h,
                                           int64_t key, unsigned char* shared, bool aligned_query,
                                           bool aligned_key, float factor, const Each& each) {
    const T* queries = row_of<T>(p.query, p.query_strides, tile.b, h, 0);
    const T* keys = row_of<T>(p.key, p.key_strides, tile.b, h / (p.heads / p.kv_heads), 0);
    GatheredGemm<T, false, false> gemm;
    gemm.run(
        shared, 0, p.head_dim, queries, keys, aligned_query, aligned_key,
        [&](int64_t i) {
            const int64_t t = tile.first + i;
            return Line<T>{t < p.query_length ? queries + t * p.query_strides.t : nullptr, p.head_dim};
        },
        [&](int64_t j) {
            return Line<T>{key + j < tile.limit ? keys + (key + j) * p.key_strides.t : nullptr, p.head_dim};
        });
    gemm.each([&](int i, int j, float value) { each(i, j, value * factor); });
}

// Where order does not matter, a lane has one query of a tile and half of its keys: a warp's lanes then meet
// in no bank of shared memory, and seldom in a counter.
struct LaneKeys {
    __device__ static __forceinline__ int row() {
        return threadIdx.x / 32 * kWarpRows + threadIdx.x % kWarpRows;
    }
    __device__ static __forceinline__ int key(int c) {  // c in [0, 32)
        const int half = threadIdx.x % 32 / kWarpRows;
        return 32 * half + (c + 16 * half) % 32;
    }
};

// LSE of every head and query over its visible keys and the head's sink, NaN left out, in base 2. grid
// (tiles, Hq, B)
template <class T, bool kCapped>
__global__ void __launch_bounds__(kGemmThreads, 4)
    score_lse_kernel(const SelectCall call, const bool aligned_query, const bool aligned_key) {
    const SelectParams& p = call.select;
    SelectTile tile = select_tile(call);
    const int64_t h = tile.group;
    tile.group = h / (p.heads / p.rule.groups);
    unsigned char* shared = dynamic_shared();
    float* scores = reinterpret_cast<float*>(shared);  // [kRows, kPitch]
    const int i = LaneKeys::row();
    const Scoring<kCapped> scoring(p.rule.scale, p.rule.softcap);
    float maximum = -INFINITY, total = 0.f;
    for (int64_t key = tile.begin; key < tile.limit; key += kGemmTile) {
        score_tile<T>(p, tile, h, key, shared, aligned_query, aligned_key, 1.f,
                      [&](int row, int j, float product) {
                          scores[row * kPitch + j] = scoring.score(scoring.bend(product));
                      });
        __syncthreads();
#pragma unroll 4
        for (int c = 0; c < 32; ++c) {
            const int j = LaneKeys::key(c);
            const float score = scores[i * kPitch + j];
            if (score != score || !visible(p, tile, tile.first + i, key + j)) continue;
            const float most = fmaxf(maximum, score);
            total = total * exp2_below(maximum, most) + exp2_below(score, most);
            maximum = most;
        }
        __syncthreads();
    }
    const float theirs = __shfl_xor_sync(kWarp, maximum, kWarpRows), most = fmaxf(maximum, theirs);
    const float sum = __shfl_xor_sync(kWarp, total, kWarpRows);
    total = total * exp2_below(maximum, most) + sum * exp2_below(theirs, most);
    maximum = most;
    const float sink = p.rule.sink_logits ? p.rule.sink_logits[h] * kLog2E : -INFINITY;
    if (sink == sink) add_sink(sink, maximum, total);
    const int64_t t = tile.first + i;
    if (threadIdx.x % 32 < kWarpRows && t < p.query_length)
        call.lse[(tile.b * p.heads + h) * p.query_length + t] =
            maximum == INFINITY ? INFINITY : maximum + log2f(total);
}

// The scores of a tile of keys into shared memory [kRows, kPitch]: of the one head, or the summed
// probabilities of those that share. The block's threads are together before and after.
template <class T, bool kCapped>
__device__ __forceinline__ void rank_tile(const SelectCall& call, const SelectTile& tile, int64_t key,
                                          unsigned char* shared, bool aligned_query, bool aligned_key) {
    const SelectParams& p = call.select;
    float* scores = reinterpret_cast<float*>(shared);
    const int64_t share = p.heads / p.rule.groups;
    if (share == 1) {
        score_tile<T>(p, tile, tile.group, key, shared, aligned_query, aligned_key, p.rule.scale,
                      [&](int i, int j, float score) { scores[i * kPitch + j] = score; });
        __syncthreads();
        return;
    }
    const Scoring<kCapped> scoring(p.rule.scale, p.rule.softcap);
    float sum[8][4];  // of each of the thread's elements, in the order in which `each` comes to them
#pragma unroll
    for (int n = 0; n < 8; ++n)
        for (int e = 0; e < 4; ++e) sum[n][e] = 0.f;
    for (int64_t h = tile.group * share; h < (tile.group + 1) * share; ++h) {
        const float* lse = call.lse + (tile.b * p.heads + h) * p.query_length;
        int number = 0;
        score_tile<T>(p, tile, h, key, shared, aligned_query, aligned_key, 1.f,
                      [&](int i, int, float product) {
                          const float score = scoring.score(scoring.bend(product));
                          const int64_t t = tile.first + i;
                          const float most = t < p.query_length ? lse[t] : -INFINITY;
                          const float probability = score != score     ? score
                                                    : most > -INFINITY ? exp2f(score - most)
                                                                       : 0.f;
                          sum[number / 4][number % 4] += probability;
                          ++number;
                      });
    }
    GatheredGemm<T, false, false> places;
#pragma unroll
    for (int n = 0; n < 8; ++n)
        for (int e = 0; e < 4; ++e) places.sum[n][e] = sum[n][e];
    places.each([&](int i, int j, float value) { scores[i * kPitch + j] = value; });
    __syncthreads();
}

// Counts the next digit, from bit `shift` on, of the ranks in a tile that begin with their query's prefix.
__device__ __forceinline__ void count_digits(const SelectParams& p, const SelectTile& tile, int64_t key,
                                             const float* scores, const RowState* states, int32_t* counts,
                                             int above, int shift) {
    const int i = LaneKeys::row();
    const uint32_t prefix = states[i].prefix;
#pragma unroll 4
    for (int c = 0; c < 32; ++c) {
        const int j = LaneKeys::key(c);
        const uint32_t rank = rank_of(p, tile, tile.first + i, key + j, scores[i * kPitch + j]);
        if (rank != kHidden && (above == 32 || rank >> above == prefix >> above))
            atomicAdd(counts + i * kBinPitch + (rank >> shift & (kBins - 1)), 1);
    }
}

// From the highest bin down: the digit at which a query's wanted number is reached; a warp, a lane has four
// bins. Whether more candidates are left than can be kept.
__device__ __forceinline__ bool find_digit(RowState* state, const int32_t* counts, bool first_round,
                                           int shift) {
    constexpr int kOwn = kBins / 32;
    const int lane = threadIdx.x % 32, highest = kBins - 1 - lane * kOwn;
    const RowState before = *state;
    int bins[kOwn], sum = 0;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) sum += bins[n] = counts[highest - n];
    int up_to = sum;  // this lane's bins and all higher ones
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kWarp, up_to, step);
        if (lane >= step) up_to += other;
    }
    const int total = __shfl_sync(kWarp, up_to, 31);
    __syncwarp();
    if (first_round && total <= before.wanted) {  // every visible key is taken
        if (lane == 0) *state = RowState{0, total, total};
    } else {
        int higher = up_to - sum;
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
            if (higher < before.wanted && higher + bins[n] >= before.wanted)
                *state = RowState{before.prefix | static_cast<uint32_t>(highest - n) << shift,
                                  before.wanted - higher, bins[n]};
            higher += bins[n];
        }
    }
    __syncwarp();
    return state->found > state->wanted && state->found > kCandidates;
}

// Writes the keys of a tile that are above a query's threshold, ascending, and keeps its candidates; a warp,
// a lane has two keys. taken: keys written so far; kept: candidates, or at the last bit ties.
__device__ __forceinline__ void emit_keys(const SelectParams& p, const SelectTile& tile, int64_t key, int i,
                                          const float* scores, const RowState& state, int shift, int32_t* row,
                                          Candidate* candidates, int& taken, int& kept) {
    const int lane = threadIdx.x % 32;
    const unsigned below = (1u << lane) - 1;
    const bool whole = state.found == state.wanted;  // all keys of the prefix are taken
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int j = 32 * half + lane;
        const uint32_t rank = rank_of(p, tile, tile.first + i, key + j, scores[i * kPitch + j]);
        const uint32_t head = rank >> shift, threshold = state.prefix >> shift;
        const bool equal = rank != kHidden && head == threshold;
        const unsigned ties = __ballot_sync(kWarp, equal && !whole);
        const int number = kept + __popc(ties & below);
        bool takes = rank != kHidden && (head > threshold || (equal && whole));
        if (equal && !whole) {
            if (shift == 0) {
                takes = number < state.wanted;
            } else {
                candidates[number] = Candidate{rank, static_cast<int32_t>(key + j)};
            }
        }
        const unsigned all = __ballot_sync(kWarp, takes);
        if (takes) row[taken + __popc(all & below)] = static_cast<int32_t>(key + j);
        taken += __popc(all);
        kept += __popc(ties);
    }
}

// Merges the best `wanted` of `found` candidates (ascending by key) into `taken` ascending keys of a row; a
// warp.
__device__ __forceinline__ void merge_candidates(int32_t* row, int taken, const Candidate* candidates,
                                                 int found, int wanted) {
    const int lane = threadIdx.x % 32;
    constexpr int kOwn = kCandidates / 32;
    int place[kOwn];
    unsigned chosen[kOwn];
    int total = 0;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
        const int c = n * 32 + lane;
        const Candidate own = c < found ? candidates[c] : Candidate{0, 0};
        int better = 0;
        for (int other = 0; other < found; ++other) {
            const uint32_t rank = candidates[other].rank;
            better += rank > own.rank || (rank == own.rank && other < c);
        }
        const bool mine = c < found && better < wanted;
        chosen[n] = __ballot_sync(kWarp, mine);
        int low = 0, high = taken;  // of the keys taken already, those before this one
        while (mine && low < high) {
            const int middle = (low + high) / 2;
            if (row[middle] < own.key) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        place[n] = low + total + __popc(chosen[n] & ((1u << lane) - 1));
        total += __popc(chosen[n]);
    }
    __syncwarp();
    // Keys move up by the chosen ones before them, the last ones first: nothing is overwritten unread.
    for (int end = taken; end > 0; end -= 32) {
        const int at = end - 32 + lane;
        const int32_t key = at >= 0 ? row[at] : 0;
        int up = 0;
        for (int c = 0; c < found; ++c)
            up += ((c < 32 ? chosen[0] : chosen[1]) >> (c % 32) & 1) && candidates[c].key < key;
        __syncwarp();
        if (at >= 0) row[at + up] = key;
        __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < kOwn; ++n)
        if (chosen[n] >> lane & 1) row[place[n]] = candidates[n * 32 + lane].key;
}

// grid (tiles, G, B)
template <class T, bool kCapped>
__global__ void __launch_bounds__(kGemmThreads)
    select_kernel(const SelectCall call, const bool aligned_query, const bool aligned_key) {
    using Shared = SelectShared<T>;
    const SelectParams& p = call.select;
    const SelectTile tile = select_tile(call);
    unsigned char* shared = dynamic_shared();
    const float* scores = reinterpret_cast<const float*>(shared);
    int32_t* counts = reinterpret_cast<int32_t*>(shared + Shared::kCounts);    // [kRows, kBinPitch]
    RowState* states = reinterpret_cast<RowState*>(shared + Shared::kStates);  // [kRows]
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * kWarpRows;
    const int64_t left = p.query_length - tile.first;
    const int rows =
        left < first_row + kWarpRows ? static_cast<int>(left) - first_row : kWarpRows;  // of the warp
    int32_t* indices =
        p.indices +
        ((tile.b * p.rule.groups + tile.group) * p.query_length + tile.first + first_row) * p.top_k;
    auto candidates_of = [&](int i) { return reinterpret_cast<Candidate*>(counts + i * kBinPitch + i % 2); };

    if (threadIdx.x < kRows) states[threadIdx.x] = RowState{0, static_cast<int32_t>(p.top_k), 0};
    int above = 32, shift = 32 - kDigitBits;  // the digit is bits [shift, above)
    int taken = 0, kept = 0;                  // lane r has those of row first_row + r
    for (bool last = false;;) {
        if (!last)
            for (int i = threadIdx.x; i < kRows * kBinPitch; i += kGemmThreads) counts[i] = 0;
        __syncthreads();
        for (int64_t key = tile.begin; key < tile.limit; key += kGemmTile) {
            rank_tile<T, kCapped>(call, tile, key, shared, aligned_query, aligned_key);
            if (!last) {
                count_digits(p, tile, key, scores, states, counts, above, shift);
            } else {
#pragma unroll 1
                for (int r = 0; r < rows; ++r) {
                    const int i = first_row + r;
                    int row_taken = __shfl_sync(kWarp, taken, r), row_kept = __shfl_sync(kWarp, kept, r);
                    emit_keys(p, tile, key, i, scores, states[i], shift, indices + r * p.top_k,
                              candidates_of(i), row_taken, row_kept);
                    if (lane == r) taken = row_taken, kept = row_kept;
                }
            }
            __syncthreads();
        }
        if (last) break;
        bool open = false;
#pragma unroll 1
        for (int i = first_row; i < first_row + kWarpRows; ++i)
            open |= find_digit(states + i, counts + i * kBinPitch, above == 32, shift);
        __syncthreads();
        if (lane == 0) counts[threadIdx.x / 32] = open;
        __syncthreads();
        open = false;
        for (int w = 0; w < kGemmThreads / 32; ++w) open |= counts[w] != 0;
        __syncthreads();
        last = !open || shift == 0;
        if (last) continue;
        above = shift;
        shift = shift > kDigitBits ? shift - kDigitBits : 0;
    }
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
        const int i = first_row + r;
        int row_taken = __shfl_sync(kWarp, taken, r);
        const int row_kept = __shfl_sync(kWarp, kept, r);
        int32_t* row = indices + r * p.top_k;
        __syncwarp();
        if (shift > 0 && row_kept > 0) {
            merge_candidates(row, row_taken, candidates_of(i), row_kept, states[i].wanted);
            row_taken += states[i].wanted;
        }
        for (int64_t at = row_taken + lane; at < p.top_k; at += 32) row[at] = -1;
    }
}

template <class T>
const char* select(const SelectCall& call, int32_t device, void* stream) {
    const SelectParams& p = call.select;
    const bool aligned_query = aligned_rows(p.query, p.query_strides, p.head_dim, p.dtype);
    const bool aligned_key = aligned_rows(p.key, p.key_strides, p.head_dim, p.dtype);
    const unsigned tiles = static_cast<unsigned>(divide_up(p.query_length, kRows));
    const unsigned batch = static_cast<unsigned>(p.batch);
    const bool shared = p.rule.groups < p.heads;
    // A head's own selection is by the uncapped q·k.
    return with_cap(shared ? p.rule.softcap : 0.f, [&](auto capped) {
        const char* error = nullptr;
        if (shared)
            error = launch(score_lse_kernel<T, capped.value>,
                           dim3(tiles, static_cast<unsigned>(p.heads), batch), kGemmThreads,
                           SelectShared<T>::kTileBytes, device, stream, call, aligned_query, aligned_key);
        if (error) return error;
        return launch(select_kernel<T, capped.value>,
                      dim3(tiles, static_cast<unsigned>(p.rule.groups), batch), kGemmThreads,
                      SelectShared<T>::kSize, device, stream, call, aligned_query, aligned_key);
    });
}

}  // namespace

const char* topk_select(const SelectCall& call, int32_t device, void* stream) {
    const SelectParams& p = call.select;
    if (p.batch * p.rule.groups * p.query_length * p.top_k == 0) return nullptr;
    return with_type(p.dtype, [&](auto type) { return select<decltype(type)>(call, device, stream); });
}

}  // namespace sparse_attn::cuda
