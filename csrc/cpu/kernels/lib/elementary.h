// e^x, tanh, and the soft cap of scores that is made of it.
#pragma once

#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// (e^r − 1) / r for |r| <= ln(2)/2. Minimax with the last two coefficients fixed: e^r to a relative 3e-9.
SPARSE_ATTN_INLINE Vec exp_series(Vec r) {
    Vec p = broadcast(1.38145e-3f);
    p = fma(p, r, broadcast(8.36875e-3f));
    p = fma(p, r, broadcast(4.166839e-2f));
    p = fma(p, r, broadcast(1.666652e-1f));
    p = fma(p, r, broadcast(0.49999993f));
    return fma(p, r, broadcast(1.0f));
}

// x = n ln(2) + r with a whole n and |r| <= ln(2)/2.
SPARSE_ATTN_INLINE Vec reduced(Vec x, Vec* n) {
    *n = round_even(x * broadcast(1.44269504f));
    Vec r = fma(*n, broadcast(-0.693145752f), x);
    return fma(*n, broadcast(-1.42860677e-6f), r);
}

// e^x to about one unit in the last place for x <= 88; 0 below −87.3; NaN stays NaN.
SPARSE_ATTN_INLINE Vec exp(Vec x) {
    const float kLowest = -87.33654f;
    Vec n;
    const Vec r = reduced(max(broadcast(kLowest), x), &n);
    const Vec p = fma(exp_series(r), r, broadcast(1.0f));
    // Keeps x > lowest, and NaN.
    return where(not_le(x, broadcast(kLowest)), scale_by_power(p, n), zero());
}

// e^x to a relative 2e-7 and |x| · 1e-7, in fewer steps: for what is rounded to bfloat16 afterwards. x as
// small as −inf; NaN stays NaN.
SPARSE_ATTN_INLINE Vec rough_exp(Vec x) {
#if defined(__AVX512F__)
    // 2^t = 2^⌊t⌋ · 2^r with r in [0, 1); minimax.
    const Vec t = x * broadcast(1.44269504f), r = {_mm512_maskz_reduce_ps(0xffff, t.v, 0x09)};
    Vec p = broadcast(0.0018671298f);
    p = fma(p, r, broadcast(0.0090170307f));
    p = fma(p, r, broadcast(0.055799913f));
    p = fma(p, r, broadcast(0.24016444f));
    p = fma(p, r, broadcast(0.6931513f));
    p = fma(p, r, broadcast(1.0f));
    return scale_by_power(p, t);  // of a power its whole part counts
#else
    return exp(x);
#endif
}

// tanh x to about two units in the last place, near 0 too; ±1 from ±10 on; NaN stays NaN.
SPARSE_ATTN_INLINE Vec tanh(Vec x) {
    // With m = e^y − 1, y = −2|x|: m / (m + 2) = −tanh |x|; m near 0 is not a difference of two large
    // numbers.
    const Vec size = max(x, zero() - x), y = max(broadcast(-20.0f), broadcast(-2.0f) * size);
    Vec n;
    const Vec r = reduced(y, &n), power = scale_by_power(broadcast(1.0f), n);
    const Vec m = fma(power, exp_series(r) * r, power - broadcast(1.0f));
    const Vec t = m / (m + broadcast(2.0f));
    return where(not_le(x, zero()), zero() - t, t);
}

// n scores → cap · tanh(scale · score / cap), in place, in whole vectors.
inline void soft_cap(float* scores, int64_t n, float scale, float cap) {
    const Vec factor = broadcast(scale), divisor = broadcast(cap);
    for (int64_t i = 0; i < n; i += Vec::W)
        store(scores + i, tanh(load(scores + i) * factor / divisor) * divisor);
}

// d capped / d score = 1 − (capped / cap)².
SPARSE_ATTN_INLINE Vec cap_slope(Vec capped, float inverse_cap) {
    const Vec t = capped * broadcast(inverse_cap);
    return fma(zero() - t, t, broadcast(1.0f));
}

// The extra logit of a head; −inf, which weighs nothing, where there is none.
SPARSE_ATTN_INLINE float sink_of(const float* sink_logits, int64_t head) {
    return sink_logits ? sink_logits[head] : -__builtin_inff();
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
