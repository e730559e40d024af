// index_keys: rows of a key index from keys, W keys at a time, component by component. What a row becomes
// does not depend on its neighbours. The bounds are those of wings/reference/index_keys.py, which says why
// they hold.
#include "index_keys.h"

#include "cpu/kernels/topk_decode.h"
#include "lib/decode_tile.h"
#include "lib/scratch.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

static_assert(kIndexKeys % W == 0);

int64_t index_keys_scratch_bytes(const IndexKeysParams& p) {
    return (round_up(p.head_dim, 4) * W + round_up(p.head_dim, 4) * kIndexKeys / 4) * 4 + 128;
}

SPARSE_ATTN_INLINE Vec absolute(Vec a) {
    return max(a, zero() - a);
}

// Four whole numbers of W keys to W words of four bytes, the first lowest.
SPARSE_ATTN_INLINE void store_words(int32_t* to, const Vec (&numbers)[4]) {
#if defined(__AVX512F__)
    const auto whole = [](Vec a) {
        return _mm512_and_si512(_mm512_maskz_cvtps_epi32(0xffff, a.v), _mm512_set1_epi32(0xff));
    };
    const __m512i low = _mm512_or_si512(whole(numbers[0]), _mm512_slli_epi32(whole(numbers[1]), 8)),
                  high = _mm512_or_si512(whole(numbers[2]), _mm512_slli_epi32(whole(numbers[3]), 8));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#elif defined(__AVX2__)
    const auto whole = [](Vec a) {
        return _mm256_and_si256(_mm256_cvtps_epi32(a.v), _mm256_set1_epi32(0xff));
    };
    const __m256i low = _mm256_or_si256(whole(numbers[0]), _mm256_slli_epi32(whole(numbers[1]), 8)),
                  high = _mm256_or_si256(whole(numbers[2]), _mm256_slli_epi32(whole(numbers[3]), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
#else
    float lanes[4][W];
    for (int i = 0; i < 4; ++i) store(lanes[i], numbers[i]);
    for (int j = 0; j < W; ++j) {
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i)
            word |= static_cast<uint32_t>(static_cast<int32_t>(lanes[i][j]) & 0xff) << (8 * i);
        to[j] = static_cast<int32_t>(word);
    }
#endif
}

// to[d][W] = (key j)[d] − shift[d]; keys that stand for none repeat another.
template <class T>
SPARSE_ATTN_INLINE void shifted_columns(float* to, const T* const (&rows)[W], int64_t head_dim,
                                        const float* shift) {
    for (int64_t d = 0; d < head_dim; d += W) {
        const int64_t n = minimum<int64_t>(W, head_dim - d);
        Vec block[W];
        if (n == W) {
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) block[j] = load(rows[j] + d);
        } else {
            for (int j = 0; j < W; ++j) block[j] = load_n(rows[j] + d, n);
        }
        transpose(block);
        if (n == W) {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store(to + (d + i) * W, block[i] - broadcast(shift[d + i]));
        } else {
            for (int64_t i = 0; i < n; ++i) store(to + (d + i) * W, block[i] - broadcast(shift[d + i]));
        }
    }
    for (int64_t d = head_dim; d < round_up(head_dim, 4); ++d) store(to + d * W, zero());
}

// The W keys in columns x[D][W] to words [⌈D/4⌉] at `codes`, 16 apart, and their three numbers.
SPARSE_ATTN_INLINE void round_keys(const float* x, int64_t head_dim, int32_t* codes, float (&numbers)[3][W]) {
    Vec most = zero(), squares = zero();
    for (int64_t d = 0; d < head_dim; ++d) {
        const Vec a = load(x + d * W);
        most = max(absolute(a), most);
        squares = fma(a, a, squares);
    }
    float largest[W], norm[W], scale[W], inverse[W];
    store(largest, most);
    store(norm, squares);
    for (int j = 0; j < W; ++j) {
        norm[j] = __builtin_sqrtf(norm[j]);
        const bool useful = norm[j] < 1e18f;  // not of NaN; products with larger keys could leave float32
        if (!useful) largest[j] = 0.0f;
        const bool something = useful && largest[j] >= 1e-30f;
        scale[j] = something ? largest[j] / 127.0f : 0.0f;
        inverse[j] = something ? 127.0f / largest[j] : 0.0f;
    }
    const Vec step = load(scale), factor = load(inverse), least = broadcast(-127.0f);
    Vec errors = zero();
    for (int64_t d = 0; d < head_dim; d += 4) {
        Vec whole[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Vec a = load(x + (d + i) * W);
            // max() gives its second operand for a NaN, of an infinity times 0.
            whole[i] = zero() - max(zero() - max(round_even(a * factor), least), least);
            const Vec error = a - step * whole[i];
            errors = fma(error, error, errors);
        }
        store_words(codes + d / 4 * kIndexKeys, whole);
    }
    const float dim = static_cast<float>(head_dim), unit = 0x1p-23f, more = 1.0f + 2.0f * dim * unit + 1e-6f;
    float error[W];
    store(error, errors);
    for (int j = 0; j < W; ++j) {
        const bool useful = norm[j] < 1e18f, tiny = largest[j] < 1e-10f;
        const float most_of_tiny = largest[j] * __builtin_sqrtf(dim);
        numbers[0][j] = scale[j];
        numbers[1][j] = (tiny ? most_of_tiny : __builtin_sqrtf(error[j]) + 4.0f * unit * norm[j]) * more;
        numbers[2][j] = useful ? (tiny ? most_of_tiny : norm[j]) * more : __builtin_inff();
    }
}

template <class T>
void index_keys_of(const IndexKeysParams& p, IndexKeysTask t, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t words = (p.head_dim + 3) / 4;
    float* x = scratch.take<float>(words * 4 * W);
    int32_t* some = scratch.take<int32_t>(words * kIndexKeys);
    const int64_t head = t.b * p.kv_heads + t.kv_head;
    const T* keys = static_cast<const T*>(p.key) + t.b * p.key_strides.b + t.kv_head * p.key_strides.h;
    const float* shift = p.shift + head * p.head_dim;
    for (int64_t n = t.first; n < t.last; ++n) {
        int32_t* codes = reinterpret_cast<int32_t*>(p.codes) + (head * p.blocks + n) * words * kIndexKeys;
        float* bounds = p.bounds + (head * p.blocks + n) * 3 * kIndexKeys;
        for (int64_t lane = 0; lane < kIndexKeys; lane += W) {
            const int64_t first = n * kIndexKeys + lane - p.begin;  // of the keys that are given
            if (first + W <= 0 || first >= p.length) continue;
            const T* rows[W];
            for (int64_t j = 0; j < W; ++j)
                rows[j] = keys + clamp<int64_t>(first + j, 0, p.length - 1) * p.key_strides.t;
            for (int64_t j = 0; j < W && first + 3 * W < p.length; ++j)
                for (int64_t d = 0; d < p.head_dim; d += 64 / static_cast<int64_t>(sizeof(T)))
                    __builtin_prefetch(rows[j] + 2 * W * p.key_strides.t + d);
            shifted_columns(x, rows, p.head_dim, shift);
            const bool all = first >= 0 && first + W <= p.length;  // else some are not new, or not there
            float numbers[3][W];
            round_keys(x, p.head_dim, all ? codes + lane : some, numbers);
            const int64_t from = maximum<int64_t>(0, -first), to = minimum<int64_t>(W, p.length - first);
            for (int i = 0; i < 3; ++i)
                for (int64_t j = from; j < to; ++j) bounds[i * kIndexKeys + lane + j] = numbers[i][j];
            for (int64_t w = 0; !all && w < words; ++w)
                for (int64_t j = from; j < to; ++j)
                    codes[w * kIndexKeys + lane + j] = some[w * kIndexKeys + j];
        }
    }
}

void index_keys(const IndexKeysParams& p, IndexKeysTask t, void* scratch) {
    if (p.dtype == DType::kFloat32) index_keys_of<float>(p, t, scratch);
    if (p.dtype == DType::kBFloat16) index_keys_of<bfloat16>(p, t, scratch);
    if (p.dtype == DType::kFloat16) index_keys_of<float16>(p, t, scratch);
}

SPARSE_ATTN_KERNELS(index_keys, IndexKeysKernel) = {.scratch_bytes = index_keys_scratch_bytes,
                                                    .run = index_keys};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
