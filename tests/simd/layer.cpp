// Every operation of the SIMD layer on numbers of all kinds, as lines of bits: compiled for two instruction
// sets of one width, both must print the same. Knows no torch. NaN is printed as such, for its sign is the
// processor's affair.
#include "cpu/kernels/lib/simd.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>

using namespace sparse_attn::cpu::SPARSE_ATTN_ISA;

namespace {

constexpr int W = Vec::W;
uint64_t state = 88172645463325252ull;

uint32_t draw() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
}

float number() {
    static const float special[] = {0.0f,
                                    -0.0f,
                                    1.0f,
                                    -1.5f,
                                    2.5f,
                                    3.5f,
                                    1e-40f,
                                    -1e-42f,
                                    3e38f,
                                    -3e38f,
                                    std::numeric_limits<float>::infinity(),
                                    -std::numeric_limits<float>::infinity(),
                                    std::numeric_limits<float>::quiet_NaN()};
    if (draw() % 4 == 0) return special[draw() % (sizeof special / sizeof *special)];
    const float digits = static_cast<float>(static_cast<int32_t>(draw()));  // in order: two calls of draw
    return std::ldexp(digits, static_cast<int>(draw() % 60) - 60);
}

void show(float x) {
    if (x != x)
        std::printf(" nan");
    else
        std::printf(" %08x", bits_of(x));
}

void show(const char* name, Vec a) {
    float lanes[W];
    store(lanes, a);
    std::printf("%s", name);
    for (float x : lanes) show(x);
    std::printf("\n");
}

void show(const char* name, uint32_t bits) {
    std::printf("%s %x\n", name, bits);
}

void show(const char* name, const int32_t* numbers, int n) {
    std::printf("%s %d:", name, n);
    for (int i = 0; i < n; ++i) std::printf(" %d", numbers[i]);
    std::printf("\n");
}

void one_case() {
    float x[W], y[W], small[W], power[W];
    int32_t keys[W], numbers[W];
    uint16_t halves[W];
    uint8_t bytes[W];
    for (int i = 0; i < W; ++i) {
        x[i] = number();
        y[i] = draw() % 5 ? number() : x[i];
        small[i] = static_cast<float>(static_cast<int>(draw() % 2001) - 1000);  // their products are exact
        power[i] = static_cast<float>(static_cast<int>(draw() % 240) - 120);
        numbers[i] = static_cast<int32_t>(draw() % 41) - 20;
        halves[i] = static_cast<uint16_t>(draw());
        bytes[i] = draw() % 2 ? static_cast<uint8_t>(draw()) : 0;
    }
    const Vec a = load(x), b = load(y), c = load(small);
    const uint32_t bits = draw() & low_bits(W);
    show("add", a + b);
    show("subtract", a - b);
    show("multiply", a * b);
    show("divide", a / b);
    show("fma", fma(c, c, c));
    show("max", max(a, b));
    show("zero", zero());
    show("broadcast", broadcast(x[0]));
    show("bfloat16", load(reinterpret_cast<const bfloat16*>(halves)));
    show("float16", load(reinterpret_cast<const float16*>(halves)));
    for (int n = 0; n <= W; ++n) {
        show("load_n", load_n(x, n));
        float to[W] = {7, 7, 7, 7};
        store_n(to, a, n);
        show("store_n", load(to));
    }
    std::printf("sum");
    show(sum(a));
    std::printf("\nmax_lane");
    show(max_lane(c));
    std::printf("\n");
    show("not_le", not_le(a, b));
    show("is_nan", is_nan(a));
    show("where", where(bits, a, b));
    show("where_above", where_above(a, b, c));
    show("round_even", round_even(load(power) * broadcast(0.25f)));
    show("scale_by_power", scale_by_power(c, load(power)));
    Vec rows[W];
    for (int i = 0; i < W; ++i) rows[i] = c * broadcast(static_cast<float>(i + 1));
    show("transpose_sum", transpose_sum(rows));
    order_keys(x, keys);
    show("order_keys", keys, W);
    show("keys_ge", keys_ge(numbers, 3));
    show("keys_eq", keys_eq(numbers, numbers[1]));
    show("nonzero_bytes", nonzero_bytes(bytes));
    show("in_range", in_range(numbers, -5, 7));
    float values[2 * W];
    int32_t indices[2 * W];
    show("append_lanes", indices, append_lanes(indices, bits, 100));
    show("compress", indices, compress_to(indices, bits, numbers));
    int n = append(values, indices, bits, a, 50);
    show("append", indices, n);
    for (int i = 0; i < n; ++i) show(values[i]);
    n = compress_to(values, indices, bits, y, numbers);
    show(" compress_to", indices, n);
    for (int i = 0; i < n; ++i) show(values[i]);
    std::printf("\n");
}

}  // namespace

int main() {
    // Every half number, and floats of every exponent around the middles between two of them.
    for (uint32_t half = 0; half < 0x10000; ++half) {
        const float x = float_of_half(static_cast<uint16_t>(half));
        std::printf("half");
        show(x);
        if (x == x) std::printf(" %04x", half_of(x));
        std::printf("\n");
    }
    for (uint32_t top = 0; top < 0x80000; top += 3)
        for (uint32_t rest : {0u, 1u, 0xfffu, 0x1000u, 0x1001u}) {
            const float x = float_of(top << 13 ^ rest);
            if (x == x) std::printf("half_of %08x %04x\n", bits_of(x), half_of(x));
        }
    for (int i = 0; i < 2000; ++i) one_case();
    return 0;
}
