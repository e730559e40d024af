// topk_select by bounds: the selection of topk_select.cpp, most of it at the price of products of
// 16-bit numbers (lib/bounds.h has the proof).
#include "topk_bounds.h"

#include "lib/bounds.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// ---- rounded keys: the shift of the head's keys, then the panels

SPARSE_ATTN_INLINE int64_t shift_words(const SelectParams& p) {
    return round_up(p.head_dim, 16);
}

int64_t bounds_head_bytes(const SelectParams& p) {
    return (shift_words(p) + panel_count(p) * rounded_panel_words(p.head_dim)) * 4;
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

void bounds_pack_keys(const SelectParams& p, int64_t b, int64_t kv_head, Range panels, void* packed_head) {
    const float* shift = static_cast<const float*>(packed_head);
    uint32_t* first_panel = static_cast<uint32_t*>(packed_head) + shift_words(p);
    const int64_t word_count = pair_words(p.head_dim), length = visible_keys(p, b);
    const Strides& s = p.key_strides;
    const float slack = slack_of(p.head_dim);
    alignas(64) float columns[NV][kWidest * W];
    with_dtype(p.dtype, [&](auto type) __attribute__((always_inline)) {
        using T = decltype(type);
        const T* keys = head_keys<T>(p, b, kv_head);
        for (int64_t n = panels.begin; n < panels.end; ++n) {
            uint32_t* panel = first_panel + n * rounded_panel_words(p.head_dim);
            Vec as_is[NV], shifted = zero();
            for (int v = 0; v < NV; ++v) {
                const int64_t first = n * NR + v * W;
                as_is[v] =
                    load_columns(columns[v], keys + minimum(first, p.key_length) * s.t,
                                 clamp<int64_t>(length - first, 0, W), s.t, s.d, p.head_dim, 1.0f, shift);
                rotate(columns[v], p.head_dim);
                shifted = max(norms_of(columns[v], p.head_dim), shifted);
            }
            float norms[W];
            bool usable = true;
            for (int v = 0; v < NV; ++v) {
                store(norms, as_is[v]);
                for (int j = 0; j < W; ++j) usable &= norms[j] <= kLargest;  // not a NaN
            }
            PanelFacts facts{};
            // The least power of two that keeps the norms of whole numbers within bounds.
            if (usable) __builtin_frexpf(maximum(max_lane(shifted), kSmallest) / kWholeNorm, &facts.exponent);
            const Vec scale = broadcast(power_of_two(facts.exponent)),
                      inverse = broadcast(power_of_two(-facts.exponent));
            Vec norm = zero(), error = zero();
            for (int v = 0; v < NV; ++v) {
                const RoundedNorms x =
                    round_columns(panel + v * W, NR, columns[v], p.head_dim, scale, inverse);
                norm = max(x.norm, norm);
                error = max(fma(max(max(as_is[v], x.norm), broadcast(kSmallest)), broadcast(slack), x.error),
                            error);
            }
            facts.norm = usable ? max_lane(norm) : __builtin_inff();  // no bounds
            facts.error = usable ? max_lane(error) : 0.0f;
            *facts_of(panel, word_count) = facts;
        }
    });
}

// ---- where it can be done, and where it is faster

bool bounds_take(const SelectParams& p) {
    return shared_heads(p) == 1 && !p.rounded && !p.blocks && p.rule.scale != 0.0f && p.head_dim >= 1 &&
           p.head_dim <= kWidest && (p.key_strides.d == 1 || p.head_dim == 1);
}

// The products cost half of float32's, and no less than bfloat16's where the CPU multiplies pairs of those;
// in return each row is rounded, keys at some hundred times the price of a product.
bool bounds_pay(const SelectParams& p) {
#if defined(__AVX512BF16__)
    if (p.dtype == DType::kBFloat16) return false;
#endif
#if defined(__AVX512F__)
    constexpr int64_t kLong = 1024, kOfBudget = 8;
#elif defined(__AVX2__)
    constexpr int64_t kLong = 384, kOfBudget = 4;
#endif
#if defined(__AVX2__)
    return bounds_take(p) && p.head_dim >= 32 && p.query_length >= 256 && p.key_length >= kLong &&
           p.key_length >= kOfBudget * p.top_k;
#else
    (void)p;
    return false;
#endif
}

int64_t bounds_scratch(const SelectParams& p) {
    int64_t column = 0;
    with_tile(p, [&]<class T, class Tile>() { column = column_words<Tile>(p); });
    return bounds_scratch_bytes(p, column);
}

bool select_by_bounds(const SelectParams& p, SelectTask task, void* scratch, Survivors* survivors) {
    const int64_t kv_head = task.group / (p.heads / p.kv_heads);
    const char* packed =
        static_cast<const char*>(task.packed) + (task.b * p.kv_heads + kv_head) * bounds_head_bytes(p);
    const uint32_t* panels = reinterpret_cast<const uint32_t*>(packed) + shift_words(p);
    bool done = false;
    with_tile(p, [&]<class T, class Tile>() {
        done =
            select_rows_by_bounds<T, Tile>(p, task.b, task.group, task.queries, panels, scratch, *survivors);
    });
    return done;
}

SPARSE_ATTN_KERNELS(topk_bounds, BoundsKernels) = {
    .takes = bounds_take,
    .pays = bounds_pay,
    .packed_head_bytes = bounds_head_bytes,
    .find_shift = find_shift,
    .pack_keys = bounds_pack_keys,
    .scratch_bytes = bounds_scratch,
    .select = select_by_bounds,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
