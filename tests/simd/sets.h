// The tables of every instruction set that is looked at, and problems for them: what kernels.cpp and
// products.cpp share.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels/gathered_attention.h"
#include "cpu/kernels/index_keys.h"
#include "cpu/kernels/lib/simd_base.h"
#include "cpu/kernels/topk_bounds.h"
#include "cpu/kernels/topk_decode.h"
#include "cpu/kernels/variable_width_cross_entropy.h"
#include "cpu/kernels/variable_width_embedding.h"

// X(op, the table's type, its name in Set)
#define SPARSE_ATTN_EACH_TABLE(X, isa)                                   \
    X(isa, topk_select, SelectKernels, select)                           \
    X(isa, topk_bounds, BoundsKernels, bounds)                           \
    X(isa, topk_decode, DecodeKernels, decode)                           \
    X(isa, gathered_attention, AttendKernel, attend)                     \
    X(isa, gathered_attention_backward, AttendBackwardKernels, backward) \
    X(isa, index_keys, IndexKeysKernel, index_keys)                      \
    X(isa, variable_width_embedding, EmbeddingKernels, embedding)        \
    X(isa, variable_width_cross_entropy, CrossEntropyKernels, loss)      \
    X(isa, variable_width_cross_entropy_backward, CrossEntropyBackwardKernels, loss_backward)

namespace sparse_attn::cpu {
// Weak, as in cpu/isa.h: what a set has not got is that of the one below it.
#define SPARSE_ATTN_FIND(isa, op, Type, name) [[gnu::weak]] void find_##op(const Type*&);
#define SPARSE_ATTN_SET(isa)                      \
    namespace isa {                               \
    SPARSE_ATTN_EACH_TABLE(SPARSE_ATTN_FIND, isa) \
    }
SPARSE_ATTN_SET(plain)
SPARSE_ATTN_SET(neon)
SPARSE_ATTN_SET(neon_dot)
SPARSE_ATTN_SET(neon_bf16)
}  // namespace sparse_attn::cpu

namespace arm {

using namespace sparse_attn;
using cpu::Range;

struct Set {
    const char* name;
#define SPARSE_ATTN_MEMBER(isa, op, Type, name) const cpu::Type* name;
    SPARSE_ATTN_EACH_TABLE(SPARSE_ATTN_MEMBER, )

    // Whether products of bfloat16 are those of pairs, which are rounded otherwise than one by one.
    bool pairs(DType dtype) const { return dtype == DType::kBFloat16 && std::string(name) == "neon_bf16"; }
};

inline int checks = 0, faults = 0;

inline void expect(bool right, const char* set, const char* what, int64_t at = 0) {
    ++checks;
    if (right) return;
    if (++faults < 20) std::printf("%s: %s is wrong (%lld)\n", set, what, static_cast<long long>(at));
}

struct Free {
    void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;
inline Memory allocate(int64_t bytes) {
    const size_t whole = (static_cast<size_t>(bytes) + 127) / 64 * 64;
    char* p = static_cast<char*>(std::aligned_alloc(64, whole));
    std::memset(p, 0xff, whole);  // NaN, and indices of −1
    return Memory(p);
}

inline uint64_t state = 88172645463325252ull;
inline uint32_t draw() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
}
inline double whole(int most) {  // scores of such numbers are exact, and often equal
    return static_cast<int>(draw() % static_cast<uint32_t>(2 * most + 1)) - most;
}
inline double smooth() {
    double sum = 0;
    for (int i = 0; i < 4; ++i) sum += draw() / 4294967296.0 - 0.5;
    return sum;
}

// Numbers as the kernels take them, and what these numbers are.
struct Array {
    DType dtype;
    std::vector<double> values;
    Memory memory;

    Array(DType type, int64_t count)
        : dtype(type), values(static_cast<size_t>(count)), memory(allocate(4 * count)) {}
    template <class F>
    Array(DType type, int64_t count, F next) : Array(type, count) {
        for (int64_t i = 0; i < count; ++i) set(i, static_cast<float>(next()));
    }
    void* data() const { return memory.get(); }
    void set(int64_t i, float x) {
        uint16_t half = dtype == DType::kBFloat16 ? static_cast<uint16_t>(cpu::generic::bits_of(x) >> 16)
                                                  : cpu::generic::half_of(x);
        if (dtype == DType::kFloat32)
            static_cast<float*>(data())[i] = x;
        else
            static_cast<uint16_t*>(data())[i] = half;
        values[static_cast<size_t>(i)] = at(i);
    }
    double at(int64_t i) const {
        if (dtype == DType::kFloat32) return static_cast<const float*>(data())[i];
        const uint16_t half = static_cast<const uint16_t*>(data())[i];
        return dtype == DType::kBFloat16 ? cpu::generic::float_of(static_cast<uint32_t>(half) << 16)
                                         : cpu::generic::float_of_half(half);
    }
};

// What a result of the dtype may be off by, of the largest one.
inline double share_of(DType dtype) {
    return dtype == DType::kFloat32 ? 3e-6 : dtype == DType::kBFloat16 ? 1.5e-2 : 2e-3;
}
// `share`: where a result is less exact than its type says.
inline void expect_close(const Array& found, const std::vector<double>& right, const char* set,
                         const char* what, double share = 0) {
    double largest = 1e-6;
    for (double x : right) largest = std::fmax(largest, std::fabs(x));
    for (size_t i = 0; i < right.size(); ++i) {
        const double off = std::fabs(found.at(static_cast<int64_t>(i)) - right[i]);
        expect(off <= std::fmax(share, share_of(found.dtype)) * largest, set, what, static_cast<int64_t>(i));
    }
}

struct Sizes {
    int64_t batch, heads, kv_heads, queries, keys, dim, value_dim, top_k, window, sinks, groups;
};

struct Problem {
    Sizes z;
    Array query, key, value;

    template <class F>
    Problem(const Sizes& sizes, DType dtype, F next)
        : z(sizes),
          query(dtype, z.batch * z.heads * z.queries * z.dim, next),
          key(dtype, z.batch * z.kv_heads * z.keys * z.dim, next),
          value(dtype, z.batch * z.kv_heads * z.keys * z.value_dim, next) {}

    float scale() const { return 1.0f / std::sqrt(static_cast<float>(z.dim)); }
    int64_t row(int64_t b, int64_t h, int64_t i) const { return (b * z.heads + h) * z.queries + i; }
    int64_t key_row(int64_t b, int64_t h, int64_t j) const {
        return (b * z.kv_heads + h / (z.heads / z.kv_heads)) * z.keys + j;
    }
    double score(int64_t b, int64_t h, int64_t i, int64_t j) const {
        double sum = 0;
        for (int64_t d = 0; d < z.dim; ++d)
            sum += query.values[static_cast<size_t>(row(b, h, i) * z.dim + d)] *
                   key.values[static_cast<size_t>(key_row(b, h, j) * z.dim + d)];
        return sum;
    }
    int64_t offset() const { return z.keys - z.queries; }

    SelectParams select(int32_t* indices) const {
        SelectParams p{};
        p.query = query.data(), p.key = key.data(), p.indices = indices;
        p.query_strides = {z.heads * z.queries * z.dim, z.queries * z.dim, z.dim, 1};
        p.key_strides = {z.kv_heads * z.keys * z.dim, z.keys * z.dim, z.dim, 1};
        p.rule.is_causal = true, p.rule.causal_offset = offset();
        p.rule.window = z.window, p.rule.sinks = z.sinks, p.rule.groups = z.groups, p.rule.scale = scale();
        p.batch = z.batch, p.heads = z.heads, p.kv_heads = z.kv_heads;
        p.query_length = z.queries, p.key_length = z.keys, p.head_dim = z.dim;
        p.top_k = z.top_k, p.dtype = query.dtype;
        return p;
    }
    AttendParams attend(const int32_t* indices) const {
        AttendParams p{};
        const SelectParams s = select(nullptr);
        p.query = s.query, p.key = s.key, p.value = value.data(), p.indices = indices;
        p.query_strides = s.query_strides, p.key_strides = s.key_strides;
        p.value_strides = {z.kv_heads * z.keys * z.value_dim, z.keys * z.value_dim, z.value_dim, 1};
        p.indices_strides = {z.groups * z.queries * z.top_k, z.queries * z.top_k, z.top_k, 1};
        p.batch = z.batch, p.heads = z.heads, p.kv_heads = z.kv_heads, p.groups = z.groups;
        p.query_length = z.queries, p.key_length = z.keys, p.head_dim = z.dim, p.value_dim = z.value_dim;
        p.slots = z.top_k, p.scale = scale(), p.dtype = query.dtype;
        return p;
    }
    std::vector<int32_t> no_indices() const {
        return std::vector<int32_t>(static_cast<size_t>(z.batch * z.groups * z.queries * z.top_k), 77777);
    }
};

// ---- kernels.cpp

std::vector<int32_t> selected(const Set& set, const Problem& x, bool rounded = false);

// The 8-bit rows of the keys: codes, and behind them bounds. The shift of every head is kShift.
constexpr float kShift = 0.25f;
struct Index {
    std::vector<uint8_t> made;
    int64_t codes, blocks;
};
Index index_of(const Set& set, const Problem& x);

// ---- products.cpp

void check_bounds(const Set& set, const Set& plain, const Problem& x, int bits);
void check_decoding(const Set& set, const Problem& x);
void check_loss(const Set& set, DType dtype);

}  // namespace arm
