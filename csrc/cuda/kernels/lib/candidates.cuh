// The candidates of a query while its keys stream past: what beats the threshold is appended, and a row that
// runs full is cut to its best, exactly. Rows lie in scratch memory of the block, in ascending order of the
// keys throughout, so that ties fall to the smaller key and the result ascends; no order of threads shows in
// it.
//
// Of n keys in random order a row of capacity 2 K is cut log2(n / K) times; each cut raises the threshold. A
// first threshold from a sample of the keys spares most cuts. It is a guess, set low: a row that it leaves
// with too few candidates is done again without.
#pragma once

#include "attention.cuh"
#include "gathered_gemm.cuh"

namespace sparse_attn::cuda {

constexpr int kWarpRows = kGemmTile / (kGemmThreads / 32);  // queries of a warp

struct alignas(8) Candidate {
    float score;
    int32_t key;  // −1: none
};

// Which keys a query sees, and which of them it always keeps; positions are within [0, 2^31).
struct RowRule {
    int32_t begin, end;    // sees keys in [begin, end)
    int32_t sinks_end;     // keeps those before
    int32_t window_start;  // and from there on

    __device__ __forceinline__ bool forces() const { return sinks_end > begin || window_start < end; }
};

// An integer that orders candidates: none < −inf < … < +inf < NaN < kept always.
constexpr uint32_t kNone = 0, kInfinity = 0xff800000u, kNan = 0xfffffffeu, kForced = 0xffffffffu;

__device__ __forceinline__ uint32_t rank_of(float score) {
    const uint32_t bits = __float_as_uint(one_zero_one_nan(score));
    const uint32_t rank = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
    return rank < kNan ? rank : kNan;
}
// A score of that rank; of what is always kept any will do.
__device__ __forceinline__ float score_of(uint32_t rank) {
    return __uint_as_float(rank ^ (~static_cast<uint32_t>(static_cast<int32_t>(rank) >> 31) | 0x80000000u));
}

// The float before, of those that scores can be (no −0); NaN before −inf, which every score beats.
__device__ __forceinline__ float float_before(float score) {
    constexpr uint32_t kMinusZero = 0x7fffffffu;
    const uint32_t rank = rank_of(score) - 1;
    return score_of(rank == kMinusZero ? rank - 1 : rank);
}

// A row as it is cut. special: some are always kept, or there may be some that are none.
struct CandidateRow {
    const Candidate* slots;
    uint32_t first;  // slot
    int count;
    RowRule rule;
    bool special;
};

// A warp's view of a row: 256 candidates in registers, which a short row never leaves.
struct Chunk {
    static constexpr int kOwn = 8, kSize = 32 * kOwn;
    uint32_t rank[kOwn];
    int32_t key[kOwn];

    __device__ __forceinline__ void load(const CandidateRow& row, int first) {
        first += static_cast<int>(threadIdx.x % 32);
        const int left = row.count - first;
        const Candidate* at = row.slots + (row.first + first);
        Candidate own[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            own[i] = Candidate{0.f, -1};  // else the registers would be kept from the load before
            if (32 * i < left) own[i] = at[32 * i];
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            rank[i] = 32 * i < left ? rank_of(own[i].score) : kNone;
            key[i] = own[i].key;
        }
        if (!row.special) return;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (32 * i >= left) continue;
            if (key[i] < row.rule.sinks_end || key[i] >= row.rule.window_start) rank[i] = kForced;
            if (key[i] < 0) rank[i] = kNone;
        }
    }
};

// Ranks above `high` are kept, and of those from `low` to `high` the first `equal`: `kept` in all.
struct Cut {
    static constexpr int kAll = 2147483647;
    uint32_t low, high;
    int equal, kept;
};

// The best `budget` of a row, or up to `slack` more where that is found sooner; a warp, with kBins of shared
// memory. Each round looks at five more bits of the ranks between those that are still open.
constexpr int kBins = 36;  // 32, then one for what is not open
__device__ __forceinline__ Cut find_cut(Chunk& chunk, const CandidateRow& row, int budget, int slack,
                                        int32_t* bins) {
    const int lane = threadIdx.x % 32;
    uint32_t low = ~0u, high = kNone;
    int filled = 0, forced = 0;
    for (int first = 0; first < row.count; first += Chunk::kSize) {
        chunk.load(row, first);
#pragma unroll
        for (int i = 0; i < Chunk::kOwn; ++i) {
            const uint32_t rank = chunk.rank[i];
            low = min(low, rank - 1);  // the least but kNone
            high = max(high, row.special && rank == kForced ? kNone : rank);
        }
        if (!row.special) continue;
#pragma unroll
        for (int i = 0; i < Chunk::kOwn; ++i)
            filled += chunk.rank[i] != kNone, forced += chunk.rank[i] == kForced;
    }
    low = __reduce_min_sync(kWarp, low) + 1, high = __reduce_max_sync(kWarp, high);
    if (row.special) {
        filled = __reduce_add_sync(kWarp, filled), forced = __reduce_add_sync(kWarp, forced);
    } else {
        filled = row.count;
    }
    if (filled <= budget) return {kNone + 1, kForced, Cut::kAll, filled};
    if (forced >= budget) return {kForced, kForced, budget, budget};
    int wanted = budget - forced;
    for (;;) {
        const uint32_t width = high - low;
        const int bits = 32 - __clz(static_cast<int>(width)), shift = bits > 5 ? bits - 5 : 0;
        __syncwarp();
        bins[lane] = 0;
        if (lane == 0) bins[32] = 0;
        __syncwarp();
        for (int first = 0; first < row.count; first += Chunk::kSize) {
            if (row.count > Chunk::kSize) chunk.load(row, first);
#pragma unroll
            for (int i = 0; i < Chunk::kOwn; ++i) {
                const uint32_t at = chunk.rank[i] - low;
                atomicAdd(bins + (at <= width ? at >> shift : 32u), 1);
            }
        }
        __syncwarp();
        const int mine = bins[31 - lane];  // from the highest bin down
        int up_to = mine;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(kWarp, up_to, step);
            if (lane >= step) up_to += other;
        }
        const int at = __ffs(static_cast<int>(__ballot_sync(kWarp, up_to >= wanted))) - 1;
        const int inside = __shfl_sync(kWarp, mine, at);
        wanted -= __shfl_sync(kWarp, up_to, at) - inside;
        low += static_cast<uint32_t>(31 - at) << shift;
        if (high - low >= 1u << shift) high = low + (1u << shift) - 1;
        const int more = inside - wanted;
        if (more <= slack) return {low, high, Cut::kAll, budget + more};
        if (low == high) return {low, high, wanted, budget};
    }
}

// put(place, rank, key) for each candidate that a cut keeps, in order; a warp, with the chunk that found the
// cut. What is put may overwrite the row.
template <class Put>
__device__ __forceinline__ void keep(Chunk& chunk, const CandidateRow& row, const Cut& cut, const Put& put) {
    const unsigned below = (1u << threadIdx.x % 32) - 1;
    int written = 0, seen = 0;
    for (int first = 0; first < row.count; first += Chunk::kSize) {
        if (row.count > Chunk::kSize) chunk.load(row, first);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < Chunk::kOwn; ++i) {
            const uint32_t rank = chunk.rank[i];
            bool takes = rank >= cut.low;
            if (cut.equal != Cut::kAll) {
                const unsigned ties = __ballot_sync(kWarp, takes && rank <= cut.high);
                takes = rank > cut.high || (takes && seen + __popc(ties & below) < cut.equal);
                seen += __popc(ties);
            }
            const unsigned all = __ballot_sync(kWarp, takes);
            if (takes) put(written + __popc(all & below), rank, chunk.key[i]);
            written += __popc(all);
        }
    }
    __syncwarp();
}

// The mask of a tile's rows: `length` queries of one head after the other; null: none.
struct MaskTile {
    const uint8_t* at;  // of the first head and query
    int first, length;  // the tile's first row
    int64_t of_head, of_query, of_key;
};

// How a tile of 64 queries and 64 keys lies in a thread, as GatheredGemm has it: some queries, and of each as
// many keys in a row, if key j of the tile is the product's column column_of(j). A query is one warp's.
template <class T>
struct TileShape {
    static constexpr int kQueries = sizeof(T) == 2 ? 2 : 8, kKeys = 32 / kQueries, kLanes = kGemmTile / kKeys;

    __device__ static __forceinline__ int query(int r) {
        return sizeof(T) == 2 ? threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r
                              : threadIdx.x / 16 + 8 * r;
    }
    __device__ static __forceinline__ int first_key() { return threadIdx.x % kLanes * kKeys; }
    // The product of its query r and key c.
    template <class Sum>
    __device__ static __forceinline__ auto& value(Sum& sum, int r, int c) {
        if constexpr (sizeof(T) == 2) {
            return sum[c / 2][2 * r + c % 2];
        } else {
            return sum[r][c];
        }
    }
    // The 16 queries of a warp.
    __device__ static __forceinline__ int of_warp(int i) {
        const int warp = threadIdx.x / 32;
        return sizeof(T) == 2 ? 16 * warp + i : 2 * warp + i % 2 + i / 2 * 8;
    }
    // Which key of the tile stands in a column of the product.
    __device__ static __forceinline__ int key_of_column(int j) {
        return sizeof(T) == 2 ? j % 8 / 2 * kKeys + j / 8 * 2 + j % 2 : j % 16 * kKeys + j / 16;
    }
    // A bit for each of its keys, whose first is `first`: those from that key on.
    __device__ static __forceinline__ uint32_t from(int key, int first) {
        constexpr uint32_t kAll = (1u << kKeys) - 1;
        const int at = key - first;
        return at <= 0 ? kAll : at >= kKeys ? 0 : kAll << at & kAll;
    }
    // Those that its query r sees.
    __device__ static __forceinline__ uint32_t seen(const RowRule& rule, const MaskTile& mask, int r,
                                                    int first) {
        uint32_t keys = from(rule.begin, first) & ~from(rule.end, first);
        if (mask.at == nullptr || keys == 0) return keys;
        const int row = mask.first + query(r);
        const uint8_t* at = mask.at + row / mask.length * mask.of_head + row % mask.length * mask.of_query +
                            first * mask.of_key;
#pragma unroll 1
        for (uint32_t key = 1; key < 1u << kKeys; key <<= 1, at += mask.of_key)
            if ((keys & key) != 0 && *at == 0) keys &= ~key;
        return keys;
    }
};

struct SelectTile {
    int begin, end;              // keys of the piece that some of the queries see; begin is a multiple of 64
    int plain_begin, plain_end;  // keys that all of them see, and none keeps always; multiples of 64
    int64_t apart;               // from a key to the next in memory

    __device__ __forceinline__ bool plain(int key) const { return key >= plain_begin && key < plain_end; }
};

// Of a row: how many are wanted, how many more a cut may leave, and how many it holds.
struct RowSize {
    int budget, slack, capacity;
};

// A tile of queries and a piece of the keys.
struct Work {
    int64_t n;     // which tile
    int b, group;  // the first of those that are packed
    int split;     // which piece
    int first;     // row: the queries of a group, then of the next
};

// What a block keeps in shared memory beside its tiles.
struct alignas(16) SelectShared {
    RowRule rules[kGemmTile];
    MaskTile mask;
    SelectTile tile;
    Work work;
    RowSize size;
    int32_t counts[kGemmTile];
    float bars[kGemmTile];  // what a later score must beat; NaN: nothing yet
    int32_t bins[kGemmThreads / 32][kBins];
};

// A thread's share of the block's candidates.
template <class T>
struct Rows {
    using Shape = TileShape<T>;
    static constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys, kLanes = Shape::kLanes;

    int count[kQueries];
    float bar[kQueries];

    __device__ __forceinline__ void start(SelectShared& shared) {
#pragma unroll
        for (int r = 0; r < kQueries; ++r) count[r] = 0, bar[r] = NAN;
        if (threadIdx.x < kGemmTile) shared.bars[threadIdx.x] = NAN;
    }

    // Appends what passes of a tile of keys from `first` on; `plain`: every query sees all of them and none
    // is kept always. A warp's lanes are together, and its rows have room.
    __device__ __forceinline__ void add(const float (&sum)[8][4], int first, bool plain, Candidate* slots,
                                        int capacity, const SelectShared& shared) {
        const int lane = threadIdx.x % 32;
        first += Shape::first_key();
        uint32_t passes[kQueries];
#pragma unroll
        for (int r = 0; r < kQueries; ++r) {
            passes[r] = 0;
#pragma unroll
            for (int c = 0; c < kKeys; ++c)
                if (!(Shape::value(sum, r, c) <= bar[r])) passes[r] |= 1u << c;
        }
        if (!plain) {
#pragma unroll
            for (int r = 0; r < kQueries; ++r) {
                const RowRule rule = shared.rules[Shape::query(r)];
                passes[r] |= ~Shape::from(rule.sinks_end, first) | Shape::from(rule.window_start, first);
                passes[r] &= Shape::seen(rule, shared.mask, r, first);
            }
        }
        // How many pass before this lane, and in all: a byte for each query.
        constexpr int kWords = (kQueries + 3) / 4;
        uint32_t before[kWords], all[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            uint32_t own = 0;
#pragma unroll
            for (int r = 4 * w; r < 4 * w + 4 && r < kQueries; ++r)
                own |= static_cast<uint32_t>(__popc(passes[r])) << 8 * (r % 4);
            all[w] = own;
            for (int step = 1; step < kLanes; step *= 2) {
                const uint32_t other = __shfl_up_sync(kWarp, all[w], step);
                if (lane % kLanes >= step) all[w] += other;
            }
            before[w] = all[w] - own;
            all[w] = __shfl_sync(kWarp, all[w], lane | (kLanes - 1));
        }
#pragma unroll
        for (int r = 0; r < kQueries; ++r) {
            uint32_t to = Shape::query(r) * capacity + count[r] + (before[r / 4] >> 8 * (r % 4) & 255);
            count[r] += all[r / 4] >> 8 * (r % 4) & 255;
#pragma unroll
            for (int group = 0; group < kKeys;
                 group += 4) {  // most of them are empty once the threshold is high
                if (!__any_sync(kWarp, passes[r] >> group & 15)) continue;
#pragma unroll
                for (int c = group; c < group + 4; ++c)
                    append_if(passes[r] & 1u << c, slots, to, __float_as_uint(Shape::value(sum, r, c)),
                              first + c);
            }
        }
    }

    // Cuts the warp's rows that hold more than `most`: all but a tile of their slots, or with to_go_on false
    // what a sample is cut to at its end, of which the threshold alone is wanted.
    __device__ __forceinline__ void cut_rows(Candidate* slots, int most, bool to_go_on,
                                             SelectShared& shared) {
        int longest = 0;
#pragma unroll
        for (int r = 0; r < kQueries; ++r) longest = count[r] > longest ? count[r] : longest;
        if (!__any_sync(kWarp, longest > most)) return;
        write_counts(shared);
#pragma unroll 1
        for (int i = 0; i < kWarpRows; ++i) {
            const int q = Shape::of_warp(i), full = shared.counts[q];
            if (full <= most) continue;
            const RowSize size = shared.size;
            const uint32_t to = q * size.capacity;
            const CandidateRow row{slots, to, full, shared.rules[q], shared.rules[q].forces()};
            Chunk chunk;
            const Cut cut = find_cut(chunk, row, size.budget, size.slack, shared.bins[threadIdx.x / 32]);
            if (to_go_on)
                keep(chunk, row, cut, [&](int at, uint32_t rank, int32_t key) {
                    slots[to + at] = Candidate{score_of(rank), key};
                });
            if (threadIdx.x % 32 == 0) {
                shared.counts[q] = cut.kept;
                shared.bars[q] = score_of(cut.low < kInfinity ? cut.low : kInfinity);
            }
        }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < kQueries; ++r)
            count[r] = shared.counts[Shape::query(r)], bar[r] = shared.bars[Shape::query(r)];
    }

    // After a sample, whose rows are cut to the budget of one: the keys begin anew, with a guess.
    __device__ __forceinline__ void guess(SelectShared& shared) {
        __syncwarp();
#pragma unroll
        for (int r = 0; r < kQueries; ++r) {
            count[r] = 0, bar[r] = float_before(bar[r]);
            if (threadIdx.x % kLanes == 0) shared.bars[Shape::query(r)] = bar[r];
        }
    }
    // Whether a guess has left one of the block's rows with less than the budget; the block's threads
    // together.
    __device__ __forceinline__ bool guessed_too_high(SelectShared& shared) const {
        write_counts(shared);
        __syncthreads();
        bool found = false;
#pragma unroll
        for (int q = threadIdx.x % 32; q < kGemmTile; q += 32)
            found |= shared.counts[q] < shared.size.budget && shared.bars[q] == shared.bars[q];
        __syncthreads();
        return __any_sync(kWarp, found);
    }

    // For the other lanes of the warp.
    __device__ __forceinline__ void write_counts(SelectShared& shared) const {
        __syncwarp();
#pragma unroll
        for (int r = 0; r < kQueries; ++r)
            if (threadIdx.x % kLanes == 0) shared.counts[Shape::query(r)] = count[r];
        __syncwarp();
    }
};

}  // namespace sparse_attn::cuda
