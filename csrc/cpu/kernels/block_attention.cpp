// block_attention, forward: a tile of queries over whole blocks of keys, as matrix products with a running
// softmax.
//
// Keys and values are packed once, chunk by chunk, as the products want them. A task takes the rows (head,
// query) of one tile in groups of kTileRows: scores of a group and a chunk, their exponentials, and the
// weighted values are small enough for the first-level cache.
#include "lib/block_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {
namespace {

template <class T>
void pack_chunks(const BlockParams& p, int64_t b, int64_t kv_head, Range chunks) {
    const AttendParams& a = p.attend;
    const Strides &sk = a.key_strides, &sv = a.value_strides;
    const int64_t head = (b * a.kv_heads + kv_head) * p.block_count * p.chunks_per_block;
    const T* key = static_cast<const T*>(a.key) + b * sk.b + kv_head * sk.h;
    const T* value = static_cast<const T*>(a.value) + b * sv.b + kv_head * sv.h;
    for (int64_t n = chunks.begin; n < chunks.end; ++n) {
        const Chunk c = chunk_of(p, n);
        if (c.count == 0) continue;
        pack_cols(p.packed_key + (head + n) * packed_cols_size(a.head_dim, kChunk), key + c.first * sk.t,
                  a.head_dim, sk.d, c.count, sk.t);
        pack_cols(p.packed_value + (head + n) * packed_cols_size(kChunk, a.value_dim), value + c.first * sv.t,
                  c.count, sv.t, a.value_dim, sv.d);
        float unusual = 0.0f;
        for (int64_t j = 0; j < c.count; ++j)
            for (int64_t d = 0; d < a.value_dim; ++d) {
                const float x = to_float(value[(c.first + j) * sv.t + d * sv.d]);
                unusual += x - x;  // NaN from an infinity or a NaN, else 0
            }
        p.special[head + n] = unusual != 0.0f;
    }
}

// One group of rows between chunks: the largest score so far, the sum of the exponentials beside it, and the
// values weighted by them.
struct RowState {
    float peak[kTileRows], total[kTileRows];
    float* out;  // [kTileRows, stride]
    int64_t stride;
};

// scores [kTileRows, kChunk] → exponentials; columns that are not in seen[r] become 0. Rescales what is there
// already.
SPARSE_ATTN_INLINE void softmax_chunk(RowState& state, float* scores, int64_t count, const Range* seen) {
    const float nothing = -__builtin_inff();
    for (int r = 0; r < kTileRows; ++r) {
        float* row = scores + r * kChunk;
        Vec top = broadcast(nothing);
        for (int64_t j = 0; j < count; j += Vec::W) {
            Vec s = load(row + j);
            if (seen[r].end < j + Vec::W || seen[r].begin > j) {
                const uint32_t lanes = low_bits(clamp<int64_t>(seen[r].end - j, 0, Vec::W)) &
                                       ~low_bits(clamp<int64_t>(seen[r].begin - j, 0, Vec::W));
                s = where(lanes, s, broadcast(nothing));
                store(row + j, s);
            }
            top = max(s, top);  // skips NaN
        }
        const float peak = maximum(max_lane(top), state.peak[r]);
        Vec sum_of = zero();
        for (int64_t j = 0; j < count; j += Vec::W) {
            const Vec s = load(row + j);
            // With peak −inf every score is −inf or NaN, and −inf − −inf must not become NaN.
            const Vec e = peak == nothing ? where(is_nan(s), s, zero()) : exp(s - broadcast(peak));
            store(row + j, e);
            sum_of = sum_of + e;
        }
        if (peak > state.peak[r]) {
            // From −inf, where nothing has any weight yet, the factor is 0.
            const float factor = max_lane(exp(broadcast(state.peak[r] - peak)));
            state.total[r] *= factor;
            float* out = state.out + r * state.stride;
            for (int64_t d = 0; d < state.stride; d += Vec::W)
                store(out + d, load(out + d) * broadcast(factor));
            state.peak[r] = peak;
        }
        state.total[r] += sum(sum_of);
    }
}

// out += weights · values, with the rows' own keys alone: 0 · NaN of a key that a row does not see is no part
// of it. Summed as gemm_tile sums, so that a row's bits are the same on either way: which way it goes, other
// rows and empty keys of the chunk decide.
inline void add_visible(RowState& state, const float* weights, const float* packed, int64_t count,
                        const Range* seen) {
    for (int64_t d = 0; d < state.stride; d += kTileCols)
        for (int r = 0; r < kTileRows; ++r) {
            Vec acc[kTileVecs];
            for (int v = 0; v < kTileVecs; ++v) acc[v] = zero();
            for (int64_t j = seen[r].begin; j < minimum(count, seen[r].end); ++j)
                for (int v = 0; v < kTileVecs; ++v)
                    acc[v] = Singles::multiply_add(weights + r * kChunk + j,
                                                   packed + d * count + j * kTileCols + v * Vec::W, acc[v]);
            float* out = state.out + r * state.stride + d;
            for (int v = 0; v < kTileVecs; ++v) store(out + v * Vec::W, load(out + v * Vec::W) + acc[v]);
        }
}

template <class T>
void attend_tile(const BlockParams& p, int64_t b, Range heads, int64_t tile, void* memory) {
    const AttendParams& a = p.attend;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t begin = tile * p.query_tile, length = minimum(p.query_tile, a.query_length - begin);
    const int64_t rows = (heads.end - heads.begin) * length, stride = round_up(a.value_dim, kTileCols);
    const int64_t kv_head = heads.begin / (a.heads / a.kv_heads), group = heads.begin / (a.heads / a.groups);
    const int64_t first_chunk = (b * a.kv_heads + kv_head) * p.block_count * p.chunks_per_block;
    const int64_t key_size = packed_cols_size(a.head_dim, kChunk);
    const int64_t value_size = packed_cols_size(kChunk, a.value_dim);
    const int32_t* blocks =
        a.indices + b * a.indices_strides.b + group * a.indices_strides.h + tile * a.indices_strides.t;
    float* queries = scratch.take<float>(kTileRows * a.head_dim);
    float* scores = scratch.take<float>(kTileRows * kChunk);
    RowState state;
    state.out = scratch.take<float>(kTileRows * stride);
    state.stride = stride;

    for (int64_t start = 0; start < rows; start += kTileRows) {
        Range keys[kTileRows];         // visible to each row
        Range any{a.key_length, 0};    // to one of them at least
        Range every{0, a.key_length};  // and to all
        for (int r = 0; r < kTileRows; ++r) {
            const int64_t row = start + r, h = heads.begin + row / length, i = begin + row % length;
            const float sink = row < rows ? sink_of(a.sink_logits, h) : -__builtin_inff();
            state.peak[r] = sink;
            // e^0, or NaN of a logit that is no number.
            state.total[r] = sink == -__builtin_inff() ? 0.0f : 1.0f + (sink - sink);
            keys[r] = row < rows ? key_range(p.rule, b, i, a.key_length) : Range{0, 0};
            if (keys[r].begin < keys[r].end)
                any = {minimum(any.begin, keys[r].begin), maximum(any.end, keys[r].end)};
            every = {maximum(every.begin, keys[r].begin), minimum(every.end, keys[r].end)};
            if (row < rows) {
                const Strides& s = a.query_strides;
                const T* query = static_cast<const T*>(a.query) + b * s.b + h * s.h + i * s.t;
                for (int64_t d = 0; d < a.head_dim; ++d)
                    queries[d * kTileRows + r] = to_float(query[d * s.d]) * a.scale;
            } else {
                for (int64_t d = 0; d < a.head_dim; ++d) queries[d * kTileRows + r] = 0.0f;
            }
        }
        for (int64_t d = 0; d < kTileRows * stride; ++d) state.out[d] = 0.0f;

        for (int64_t m = 0; m < a.slots; ++m) {
            const int64_t block = blocks[m];
            if (block < 0 || block >= p.block_count) continue;
            for (int64_t part = 0; part < p.chunks_per_block; ++part) {
                const int64_t n = block * p.chunks_per_block + part;
                const Chunk c = chunk_of(p, n);
                if (c.count == 0 || c.first >= any.end) break;
                if (c.first + c.count <= any.begin) continue;
                Range seen[kTileRows];
                for (int r = 0; r < kTileRows; ++r) seen[r] = within(c, keys[r]);
                const float* key = p.packed_key + (first_chunk + n) * key_size;
                const float* value = p.packed_value + (first_chunk + n) * value_size;
                for (int64_t j = 0; j < c.count; j += kTileCols)
                    gemm_tile<1, kTileRows, false>(scores + j, kChunk, queries, key + j * a.head_dim,
                                                   a.head_dim);
                for (int r = 0; a.softcap > 0 && r < kTileRows; ++r)
                    soft_cap(scores + r * kChunk, c.count, 1.0f, a.softcap);
                softmax_chunk(state, scores, c.count, seen);
                const bool whole = every.begin <= c.first && c.first + c.count <= every.end;
                if (p.special[first_chunk + n] && !whole) {
                    add_visible(state, scores, value, c.count, seen);
                    continue;
                }
                for (int64_t d = 0; d < stride; d += kTileCols)
                    gemm_tile<kChunk, 1, true>(state.out + d, stride, scores, value + d * c.count, c.count);
            }
        }

        for (int64_t r = 0; r < minimum<int64_t>(kTileRows, rows - start); ++r) {
            const int64_t row = start + r, h = heads.begin + row / length, i = begin + row % length;
            const int64_t at = (b * a.heads + h) * a.query_length + i;
            const float total = state.total[r], inverse = total == 0.0f ? 0.0f : 1.0f / total;
            T* out = static_cast<T*>(a.out) + at * a.value_dim;
            for (int64_t d = 0; d < a.value_dim; ++d)
                convert(total == 0.0f ? 0.0f : state.out[r * stride + d] * inverse, out + d);
            a.lse[at] = total == 0.0f ? -__builtin_inff() : state.peak[r] + __builtin_logf(total);
        }
    }
}

}  // namespace

int64_t block_packed_key(const BlockParams& p) {
    return packed_cols_size(p.attend.head_dim, kChunk);
}
int64_t block_packed_value(const BlockParams& p) {
    return packed_cols_size(kChunk, p.attend.value_dim);
}

void block_pack(const BlockParams& p, int64_t b, int64_t kv_head, Range chunks) {
    if (p.attend.dtype == DType::kFloat32) pack_chunks<float>(p, b, kv_head, chunks);
    if (p.attend.dtype == DType::kBFloat16) pack_chunks<bfloat16>(p, b, kv_head, chunks);
    if (p.attend.dtype == DType::kFloat16) pack_chunks<float16>(p, b, kv_head, chunks);
}

int64_t block_scratch_bytes(const BlockParams& p) {
    return 4 * kTileRows * (p.attend.head_dim + kChunk + round_up(p.attend.value_dim, kTileCols)) + 256;
}

void block_attend(const BlockParams& p, TileTask task, void* scratch) {
    const auto [b, heads, tile] = task;
    if (p.attend.dtype == DType::kFloat32) attend_tile<float>(p, b, heads, tile, scratch);
    if (p.attend.dtype == DType::kBFloat16) attend_tile<bfloat16>(p, b, heads, tile, scratch);
    if (p.attend.dtype == DType::kFloat16) attend_tile<float16>(p, b, heads, tile, scratch);
}

SPARSE_ATTN_KERNELS(block_attention, BlockKernels) = {
    .packed_key = block_packed_key,
    .packed_value = block_packed_value,
    .pack = block_pack,
    .attend = {.scratch_bytes = block_scratch_bytes, .run = block_attend},
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
