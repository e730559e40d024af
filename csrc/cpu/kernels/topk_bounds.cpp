// topk_select by bounds: the selection of topk_select.cpp, most of it at the price of products of
// 16-bit numbers, or of bytes (lib/bounds.h has the proof).
#include "topk_bounds.h"

#include "lib/bounds.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// ---- rounded keys: the shift of the head's keys, then the panels

SPARSE_ATTN_INLINE int64_t shift_words(const SelectParams& p) {
    return round_up(p.head_dim, 16);
}

// Calls f.template operator()<Kind>() for what rows are rounded to.
template <class F>
SPARSE_ATTN_INLINE void with_kind(const SelectParams& p, const F& f) {
#if defined(SPARSE_ATTN_BYTE_TILES)
    if (p.bounds_bits == kByteBits) return f.template operator()<ByBytes>();
#endif
#if defined(SPARSE_ATTN_AMX)
    if (p.bounds_bits == kTileBits) return f.template operator()<ByTiles>();
#endif
    f.template operator()<ByPairs>();
    (void)p;
}

int64_t bounds_head_bytes(const SelectParams& p) {
    int64_t words = 0;
    with_kind(p, [&]<class Kind>() { words = rounded_panel_words<Kind>(p.head_dim); });
    return (shift_words(p) + panel_count(p) * words) * 4;
}

SPARSE_ATTN_INLINE int64_t visible_keys(const SelectParams& p, int64_t b) {
    return p.rule.lengths ? p.rule.lengths[b] : p.key_length;
}

template <class T>
SPARSE_ATTN_INLINE const T* head_keys(const SelectParams& p, int64_t b, int64_t kv_head) {
    return static_cast<const T*>(p.key) + b * p.key_strides.b + kv_head * p.key_strides.h;
}

template <class F>
SPARSE_ATTN_INLINE void with_dtype(DType dtype, const F& f) {
    if (dtype == DType::kFloat32) f(float{});
    if (dtype == DType::kBFloat16) f(bfloat16{});
    if (dtype == DType::kFloat16) f(float16{});
}

// The mean of a sample of the keys. Any shift is right; this one makes what is rounded small.
void find_shift(const SelectParams& p, int64_t b, int64_t kv_head, void* packed_head) {
    float* shift = static_cast<float*>(packed_head);
    const Strides& s = p.key_strides;
    for (int64_t d = 0; d < p.head_dim; ++d) shift[d] = 0.0f;
#if defined(SPARSE_ATTN_AMX)
    if (p.dtype == DType::kBFloat16 && p.bounds_bits == kTileBits)
        return;  // as they are they round to themselves
#endif
    with_dtype(p.dtype, [&](auto type) __attribute__((always_inline)) {
        using T = decltype(type);
        const T* keys = head_keys<T>(p, b, kv_head);
        const int64_t length = visible_keys(p, b), step = maximum<int64_t>(1, length / 256);
        int64_t count = 0;
        for (int64_t j = 0; j < length; j += step) {
            const T* row = keys + j * s.t;
            float largest = 0.0f;
            bool usable = true;
            for (int64_t d = 0; d < p.head_dim; ++d) {
                const float x = __builtin_fabsf(to_float(row[d]));
                usable &= x <= kLargest / 1024;  // not a NaN
                largest = maximum(largest, x);
            }
            if (!usable) continue;
            ++count;
            for (int64_t d = 0; d < p.head_dim; ++d)
                shift[d] += to_float(row[d]);  // as bounds_take has it, they lie side by side
        }
        for (int64_t d = 0; d < p.head_dim && count > 0; ++d) shift[d] /= static_cast<float>(count);
    });
}

// Behind a panel of bytes: each key's scale, a part of the panel's in 2⁻¹⁵ that leaves its numbers within
// bounds, …
SPARSE_ATTN_INLINE void set_factors(uint32_t* behind, int v, Vec sizes, int32_t exponent, Vec& scale,
                                    Vec& inverse) {
    int16_t* factors = reinterpret_cast<int16_t*>(behind + NR) + v * W;
    const float panel = power_of_two(exponent);
    float size[W], scales[W], inverses[W];
    store(size, sizes);
    for (int j = 0; j < W; ++j) {
        const float part = size[j] / (panel * ByBytes::kMost) * 32768.0f;  // of a key without bounds anything
        factors[j] = static_cast<int16_t>(part >= 1.0f && part < 32766.0f ? static_cast<int32_t>(part) + 1
                                          : part < 1.0f                   ? 1
                                                                          : 32767);
        scales[j] = panel * static_cast<float>(factors[j]) * 0x1p-15f;
        inverses[j] = 1.0f / scales[j];
    }
    scale = load(scales);
    inverse = load(inverses);
}
// … and where its sums start.
SPARSE_ATTN_INLINE void set_starts(uint32_t* behind, int v, Vec total) {
    float totals[W];
    store(totals, total);
    for (int j = 0; j < W; ++j)
        behind[v * W + j] =
            totals[j] == totals[j] ? static_cast<uint32_t>(-128 * static_cast<int32_t>(totals[j])) : 0u;
}

template <class Kind>
void pack_rounded(const SelectParams& p, int64_t b, int64_t kv_head, Range panels, void* packed_head) {
    const float* shift = static_cast<const float*>(packed_head);
    uint32_t* first_panel = static_cast<uint32_t*>(packed_head) + shift_words(p);
    const int64_t word_count = rounded_words<Kind>(p.head_dim), length = visible_keys(p, b);
    const Strides& s = p.key_strides;
    const float slack = slack_of(p.head_dim);
    alignas(64) float columns[NV][kWidest * W];
    with_dtype(p.dtype, [&](auto type) __attribute__((always_inline)) {
        using T = decltype(type);
        const T* keys = head_keys<T>(p, b, kv_head);
        for (int64_t n = panels.begin; n < panels.end; ++n) {
            uint32_t* panel = first_panel + n * rounded_panel_words<Kind>(p.head_dim);
            Vec as_is[NV], sizes[NV], shifted = zero();
            for (int v = 0; v < NV; ++v) {
                const int64_t first = n * NR + v * W;
                as_is[v] =
                    load_columns(columns[v], keys + minimum(first, p.key_length) * s.t,
                                 clamp<int64_t>(length - first, 0, W), s.t, s.d, p.head_dim, 1.0f, shift);
                if constexpr (!kFloats<Kind>) rotate(columns[v], p.head_dim);
                sizes[v] = Kind::kBits == kPairBits ? norms_of(columns[v], p.head_dim)
                                                    : largest_of_columns(columns[v], p.head_dim);
                shifted = max(sizes[v], shifted);
            }
            float norms[W];
            bool usable = true;
            for (int v = 0; v < NV; ++v) {
                store(norms, as_is[v]);
                for (int j = 0; j < W; ++j) usable &= norms[j] <= kLargest;  // not a NaN
            }
            PanelFacts facts{};
            // The least power of two that keeps the norms, or the numbers, within bounds.
            constexpr float kWhole = Kind::kBits == kPairBits ? kWholeNorm : Kind::kMost;
            if (usable && !kFloats<Kind>)
                __builtin_frexpf(maximum(max_lane(shifted), kSmallest) / kWhole, &facts.exponent);
            Vec norm = zero(), error = zero();
            for (int v = 0; v < NV; ++v) {
                Vec scale = broadcast(power_of_two(facts.exponent)),
                    inverse = broadcast(power_of_two(-facts.exponent));
                if constexpr (Kind::kBits == kByteBits)
                    set_factors(panel + word_count * NR, v, sizes[v], facts.exponent, scale, inverse);
                const RoundedNorms x =
                    round_columns<Kind>(panel + v * W, NR, columns[v], p.head_dim, scale, inverse);
                if constexpr (Kind::kBits == kByteBits) set_starts(panel + word_count * NR, v, x.total);
                norm = max(x.norm, norm);
                error = max(fma(max(max(as_is[v], x.norm), broadcast(kSmallest)), broadcast(slack), x.error),
                            error);
            }
            if constexpr (Kind::kBits == kByteBits) pair_words(panel, NR, word_count);
            facts.plain_norm = usable ? max_lane(max(as_is[0], as_is[NV - 1])) : 0.0f;
            facts.norm = usable ? max_lane(norm) : __builtin_inff();  // no bounds
            facts.error = usable ? max_lane(error) : 0.0f;
            *facts_of<Kind>(panel, word_count) = facts;
        }
    });
}

void bounds_pack_keys(const SelectParams& p, int64_t b, int64_t kv_head, Range panels, void* packed_head) {
    with_kind(p, [&]<class Kind>() { pack_rounded<Kind>(p, b, kv_head, panels, packed_head); });
}

// ---- where it can be done, and where it is faster

bool bounds_take(const SelectParams& p) {
    return shared_heads(p) == 1 && !p.rounded && !p.blocks && p.rule.scale != 0.0f && p.head_dim >= 1 &&
           p.head_dim <= kWidest && (p.key_strides.d == 1 || p.head_dim == 1);
}

// Bytes leave more keys to be scored again, some 1.4·K: the shorter products must gain that.
constexpr int64_t kBytesOfBudget = 96;

// The products cost half of float32's, and bytes' a quarter; in return each row is rounded, keys at some
// hundred times the price of a product.
bool bounds_pay(const SelectParams& p) {
#if defined(SPARSE_ATTN_AMX)
    const bool tiles = p.dtype == DType::kBFloat16;
    const int64_t long_from = tiles ? 256 : 512, of_budget = tiles ? 2 : 4;
#elif defined(__AVX512BF16__)
    // The full product multiplies pairs too.
    const bool pairs = p.dtype == DType::kBFloat16;
    const int64_t long_from = pairs ? 2048 : 512, of_budget = pairs ? 8 : 4;
#elif defined(__AVX512F__)
    constexpr int64_t long_from = 512, of_budget = 4;
#elif defined(__AVX2__)
    constexpr int64_t long_from = 384, of_budget = 4;
#endif
#if defined(SPARSE_ATTN_NEON_BYTES)
    // Pairs gain nothing here. Where bytes gain is AVX-512's: nobody has measured it on such a machine.
    constexpr int64_t long_from = 512, of_budget = kBytesOfBudget;
#endif
#if defined(__AVX2__) || defined(SPARSE_ATTN_NEON_BYTES)
    return bounds_take(p) && p.head_dim >= 32 && p.query_length >= 256 && p.key_length >= long_from &&
           p.key_length >= of_budget * p.top_k;
#else
    (void)p;
    return false;
#endif
}

int bounds_bits(const SelectParams& p) {
#if defined(SPARSE_ATTN_AMX)
    // bfloat16 itself is not rounded; of other numbers tiles leave some keys more than pairs.
    const bool much = p.key_length >= 1024 && p.key_length >= 32 * p.top_k;
    return p.dtype == DType::kBFloat16 || much ? kTileBits : kPairBits;
#elif defined(SPARSE_ATTN_NEON_BYTES)
    (void)p;
    return kByteBits;
#elif defined(__AVX512VNNI__)
    return p.key_length >= kBytesOfBudget * p.top_k ? kByteBits : kPairBits;
#else
    (void)p;
    return kPairBits;
#endif
}

int64_t bounds_scratch(const SelectParams& p) {
    int64_t column = 0;
    with_tile(p, [&]<class T, class Tile>() { column = column_words<Tile>(p); });
    int64_t bytes = 0;
    with_kind(p, [&]<class Kind>() { bytes = bounds_scratch_bytes<Kind>(p, column); });
    return bytes;
}

bool select_by_bounds(const SelectParams& p, SelectTask task, void* scratch, Survivors* survivors) {
    const int64_t kv_head = task.group / (p.heads / p.kv_heads);
    const char* packed =
        static_cast<const char*>(task.packed) + (task.b * p.kv_heads + kv_head) * bounds_head_bytes(p);
    const uint32_t* panels = reinterpret_cast<const uint32_t*>(packed) + shift_words(p);
    bool done = false;
    with_kind(p, [&]<class Kind>() {
        with_tile(p, [&]<class T, class Tile>() {
            done = select_rows_by_bounds<T, Tile, Kind>(p, task.b, task.group, task.queries, panels, scratch,
                                                        task.logits, *survivors);
        });
    });
    return done;
}

SPARSE_ATTN_KERNELS(topk_bounds, BoundsKernels) = {
    .takes = bounds_take,
    .pays = bounds_pay,
    .bits = bounds_bits,
    .packed_head_bytes = bounds_head_bytes,
    .find_shift = find_shift,
    .pack_keys = bounds_pack_keys,
    .scratch_bytes = bounds_scratch,
    .select = select_by_bounds,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
