// The kernels that torch's tensors never reach here: compiled for two instruction sets of one width, `simd`
// and `plain`, linked into one program without torch, and both held against loops in double. Run by
// tests/simd/arm.py on 64-bit ARM under emulation. Prints what was wrong, or how much was looked at.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/kernels/gathered_attention.h"
#include "cpu/kernels/index_keys.h"
#include "cpu/kernels/lib/simd_base.h"
#include "cpu/kernels/topk_bounds.h"
#include "cpu/kernels/topk_decode.h"
#include "cpu/kernels/variable_width_embedding.h"

namespace sparse_attn::cpu {
#define SPARSE_ATTN_SET(isa)                                              \
    namespace isa {                                                       \
    void find_topk_select(const SelectKernels*&);                         \
    void find_topk_bounds(const BoundsKernels*&);                         \
    void find_gathered_attention(const AttendKernel*&);                   \
    void find_gathered_attention_backward(const AttendBackwardKernels*&); \
    void find_index_keys(const IndexKeysKernel*&);                        \
    void find_variable_width_embedding(const EmbeddingKernels*&);         \
    }
SPARSE_ATTN_SET(simd)
SPARSE_ATTN_SET(plain)
}  // namespace sparse_attn::cpu

namespace {

using namespace sparse_attn;
using cpu::Range;

struct Set {
    const char* name;
    const cpu::SelectKernels* select;
    const cpu::BoundsKernels* bounds;
    const cpu::AttendKernel* attend;
    const cpu::AttendBackwardKernels* backward;
    const cpu::IndexKeysKernel* index_keys;
    const cpu::EmbeddingKernels* embedding;
};

#define SPARSE_ATTN_FIND(isa)                                   \
    [] {                                                        \
        Set s{#isa, {}, {}, {}, {}, {}, {}};                    \
        cpu::isa::find_topk_select(s.select);                   \
        cpu::isa::find_topk_bounds(s.bounds);                   \
        cpu::isa::find_gathered_attention(s.attend);            \
        cpu::isa::find_gathered_attention_backward(s.backward); \
        cpu::isa::find_index_keys(s.index_keys);                \
        cpu::isa::find_variable_width_embedding(s.embedding);   \
        return s;                                               \
    }()

int checks = 0, faults = 0;

void expect(bool right, const char* set, const char* what, int64_t at = 0) {
    ++checks;
    if (right) return;
    if (++faults < 20) std::printf("%s: %s is wrong (%lld)\n", set, what, static_cast<long long>(at));
}

struct Free {
    void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;
Memory allocate(int64_t bytes) {
    const size_t whole = (static_cast<size_t>(bytes) + 127) / 64 * 64;
    char* p = static_cast<char*>(std::aligned_alloc(64, whole));
    std::memset(p, 0xff, whole);  // NaN, and indices of −1
    return Memory(p);
}

uint64_t state = 88172645463325252ull;
uint32_t draw() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
}
double whole(int most) {  // scores of such numbers are exact, and often equal
    return static_cast<int>(draw() % static_cast<uint32_t>(2 * most + 1)) - most;
}
double smooth() {
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
double share_of(DType dtype) {
    return dtype == DType::kFloat32 ? 3e-6 : dtype == DType::kBFloat16 ? 1.5e-2 : 2e-3;
}
void expect_close(const Array& found, const std::vector<double>& right, const char* set, const char* what) {
    double largest = 1e-6;
    for (double x : right) largest = std::fmax(largest, std::fabs(x));
    for (size_t i = 0; i < right.size(); ++i) {
        const double off = std::fabs(found.at(static_cast<int64_t>(i)) - right[i]);
        expect(off <= share_of(found.dtype) * largest, set, what, static_cast<int64_t>(i));
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

// ---- selection

std::vector<int32_t> selected(const Set& set, const Problem& x) {
    std::vector<int32_t> indices = x.no_indices();
    const SelectParams p = x.select(indices.data());
    const cpu::SelectKernels& k = *set.select;
    const int64_t head_bytes = k.packed_head_bytes(p), heads = p.batch * p.kv_heads;
    const Memory packed = allocate(head_bytes * heads), scratch = allocate(k.select.scratch_bytes(p));
    for (int64_t n = 0; n < heads; ++n)
        k.pack_keys(p, n / p.kv_heads, n % p.kv_heads, {0, k.panel_count(p)}, packed.get() + n * head_bytes);
    const int64_t step = k.block_queries(p);
    for (int64_t n = 0; n < p.batch * p.rule.groups; ++n)
        for (int64_t i = 0; i < p.query_length; i += step) {
            const int64_t end = i + step < p.query_length ? i + step : p.query_length;
            k.select.run(p, {n / p.rule.groups, n % p.rule.groups, {i, end}, packed.get()}, scratch.get());
        }
    return indices;
}

// By sorting: what is always kept, then the larger score, then the smaller index.
std::vector<int32_t> by_sorting(const Problem& x) {
    const Sizes& z = x.z;
    std::vector<int32_t> indices;
    for (int64_t b = 0; b < z.batch; ++b)
        for (int64_t h = 0; h < z.heads; ++h)
            for (int64_t i = 0; i < z.queries; ++i) {
                const int64_t own = i + x.offset();
                std::vector<uint8_t> taken(static_cast<size_t>(z.keys));
                int64_t count = 0;
                for (; count < z.top_k && count <= own; ++count) {
                    int64_t best = -1;
                    double most = 0;
                    for (int64_t j = 0; j <= own; ++j) {
                        if (taken[static_cast<size_t>(j)]) continue;
                        const bool kept = j < z.sinks || j > own - z.window;
                        const double s = kept ? 1e9 : x.score(b, h, i, j);
                        if (best < 0 || s > most) best = j, most = s;
                    }
                    taken[static_cast<size_t>(best)] = 1;
                }
                for (int64_t j = 0; j < z.keys; ++j)
                    if (taken[static_cast<size_t>(j)]) indices.push_back(static_cast<int32_t>(j));
                for (; count < z.top_k; ++count) indices.push_back(-1);
            }
    return indices;
}

// As the full product has them, wherever bounds decide at all.
void check_bounds(const Set& set, const Problem& x) {
    const std::vector<int32_t> right = selected(set, x);
    std::vector<int32_t> indices = x.no_indices();
    SelectParams p = x.select(indices.data());
    const cpu::BoundsKernels& k = *set.bounds;
    expect(k.takes(p), set.name, "what bounds take");
    p.bounds_bits = kPairBits;
    const int64_t head_bytes = k.packed_head_bytes(p), heads = p.batch * p.kv_heads;
    const Memory packed = allocate(head_bytes * heads), scratch = allocate(k.scratch_bytes(p));
    for (int64_t n = 0; n < heads; ++n) {
        char* to = packed.get() + n * head_bytes;
        k.find_shift(p, n / p.kv_heads, n % p.kv_heads, to);
        k.pack_keys(p, n / p.kv_heads, n % p.kv_heads, {0, set.select->panel_count(p)}, to);
    }
    const int64_t step = set.select->block_queries(p);
    int64_t decided = 0;
    for (int64_t n = 0; n < p.batch * p.heads; ++n)
        for (int64_t i = 0; i < p.query_length; i += step) {
            const int64_t end = i + step < p.query_length ? i + step : p.query_length;
            cpu::Survivors survivors{};
            if (!k.select(p, {n / p.heads, n % p.heads, {i, end}, packed.get()}, scratch.get(), &survivors))
                continue;
            ++decided;
            for (int64_t at = (n * p.query_length + i) * p.top_k; at < (n * p.query_length + end) * p.top_k;
                 ++at)
                expect(indices[static_cast<size_t>(at)] == right[static_cast<size_t>(at)], set.name,
                       "selection by bounds", at);
        }
    expect(decided > 0, set.name, "that bounds decide");
}

// ---- attention

struct Exact {
    std::vector<double> out, lse, query, key, value;  // the last three: gradients
};

Exact by_definition(const Problem& x, const std::vector<int32_t>& indices, const Array& grad_out) {
    const Sizes& z = x.z;
    const auto at = [](int64_t i) { return static_cast<size_t>(i); };
    Exact e{std::vector<double>(at(z.batch * z.heads * z.queries * z.value_dim)),
            std::vector<double>(at(z.batch * z.heads * z.queries)),
            std::vector<double>(x.query.values.size()), std::vector<double>(x.key.values.size()),
            std::vector<double>(x.value.values.size())};
    for (int64_t b = 0; b < z.batch; ++b)
        for (int64_t h = 0; h < z.heads; ++h)
            for (int64_t i = 0; i < z.queries; ++i) {
                const int64_t row = x.row(b, h, i), group = h / (z.heads / z.groups);
                const int32_t* mine = indices.data() + ((b * z.groups + group) * z.queries + i) * z.top_k;
                std::vector<double> p, grad;
                double total = 0, mean = 0;
                for (int64_t n = 0; n < z.top_k && mine[n] >= 0; ++n) {
                    p.push_back(std::exp(x.score(b, h, i, mine[n]) * static_cast<double>(x.scale())));
                    total += p.back();
                }
                e.lse[at(row)] = std::log(total);
                for (size_t n = 0; n < p.size(); ++n) {
                    const int64_t k = x.key_row(b, h, mine[n]);
                    double dot = 0;
                    for (int64_t d = 0; d < z.value_dim; ++d) {
                        const double g = grad_out.values[at(row * z.value_dim + d)];
                        e.out[at(row * z.value_dim + d)] +=
                            p[n] / total * x.value.values[at(k * z.value_dim + d)];
                        e.value[at(k * z.value_dim + d)] += p[n] / total * g;
                        dot += g * x.value.values[at(k * z.value_dim + d)];
                    }
                    grad.push_back(dot);
                    mean += p[n] / total * dot;
                }
                for (size_t n = 0; n < p.size(); ++n) {
                    const int64_t k = x.key_row(b, h, mine[n]);
                    const double s = p[n] / total * (grad[n] - mean) * static_cast<double>(x.scale());
                    for (int64_t d = 0; d < z.dim; ++d) {
                        e.query[at(row * z.dim + d)] += s * x.key.values[at(k * z.dim + d)];
                        e.key[at(k * z.dim + d)] += s * x.query.values[at(row * z.dim + d)];
                    }
                }
            }
    return e;
}

void check_attention(const Set& set, const Problem& x, const std::vector<int32_t>& indices) {
    const Sizes& z = x.z;
    const DType dtype = x.query.dtype;
    const int64_t rows = z.batch * z.heads * z.queries, per_kv = z.heads / z.kv_heads;
    const Array grad_out(dtype, rows * z.value_dim, [] { return whole(4) / 4; });
    const Exact exact = by_definition(x, indices, grad_out);

    AttendParams p = x.attend(indices.data());
    Array out(dtype, rows * z.value_dim), lse(DType::kFloat32, rows);
    p.out = out.data(), p.lse = static_cast<float*>(lse.data());
    const Memory scratch = allocate(set.attend->scratch_bytes(p));
    for (int64_t n = 0; n < z.batch * z.kv_heads; ++n) {
        const int64_t head = n % z.kv_heads * per_kv;
        set.attend->run(p, {n / z.kv_heads, {head, head + per_kv}, {0, z.queries}}, scratch.get());
    }
    expect_close(out, exact.out, set.name, "attention");
    expect_close(lse, exact.lse, set.name, "the log-sum-exp");

    for (const bool keys_first : {false, true}) {
        if (keys_first && dtype != DType::kFloat32) continue;
        cpu::AttendTask task{};
        AttendBackwardParams q{};
        q.forward = p;
        q.grad_out = grad_out.data(), q.out = out.data();
        q.grad_out_strides =
            q.out_strides = {z.heads * z.queries * z.value_dim, z.queries * z.value_dim, z.value_dim, 1};
        Array grad_query(dtype, rows * z.dim), grad_key(dtype, z.batch * z.kv_heads * z.keys * z.dim),
            grad_value(dtype, z.batch * z.kv_heads * z.keys * z.value_dim);
        q.grad_query = grad_query.data(), q.grad_key = grad_key.data(), q.grad_value = grad_value.data();
        const Memory probability = allocate(4 * rows * z.top_k), score = allocate(4 * rows * z.top_k),
                     centre = allocate(4 * rows);
        q.probability = keys_first ? nullptr : reinterpret_cast<float*>(probability.get());
        q.grad_score = reinterpret_cast<float*>(score.get());
        q.centre = reinterpret_cast<float*>(centre.get());
        const Memory of_query = allocate(set.backward->query.scratch_bytes(q)),
                     of_keys = allocate(set.backward->key_scratch_bytes(q, 64));
        const auto queries = [&] {
            for (int64_t n = 0; n < z.batch * z.kv_heads; ++n) {
                const int64_t head = n % z.kv_heads * per_kv;
                task = {n / z.kv_heads, {head, head + per_kv}, {0, z.queries}};
                set.backward->query.run(q, task, of_query.get());
            }
        };
        if (keys_first)
            for (int64_t n = 0; n < z.batch * z.heads; ++n)
                set.backward->centre(q, n / z.heads, n % z.heads, {0, z.queries});
        else
            queries();
        for (int64_t n = 0; n < z.batch * z.kv_heads; ++n)
            for (int64_t j = 0; j < z.keys; j += 64)
                set.backward->key(q, n / z.kv_heads, n % z.kv_heads, {j, j + 64 < z.keys ? j + 64 : z.keys},
                                  of_keys.get());
        if (keys_first) queries();
        expect_close(grad_query, exact.query, set.name, "the gradient of query");
        expect_close(grad_key, exact.key, set.name, "the gradient of key");
        expect_close(grad_value, exact.value, set.name, "the gradient of value");
    }
}

// ---- what is the same to the bit in both sets

std::vector<uint8_t> index_of(const Set& set, const Problem& x) {
    const Sizes& z = x.z;
    const int64_t blocks = (z.keys + cpu::kIndexKeys - 1) / cpu::kIndexKeys, words = (z.dim + 3) / 4;
    const int64_t heads = z.batch * z.kv_heads, codes = heads * blocks * words * 64,
                  bounds = heads * blocks * 3 * 64;
    std::vector<uint8_t> made(static_cast<size_t>(codes + bounds));
    std::vector<float> shift(static_cast<size_t>(heads * z.dim), 0.25f);
    IndexKeysParams p{};
    p.key = x.key.data(), p.key_strides = x.select(nullptr).key_strides, p.dtype = x.key.dtype;
    p.kv_heads = z.kv_heads, p.length = z.keys, p.head_dim = z.dim, p.begin = 0, p.blocks = blocks;
    p.codes = reinterpret_cast<int8_t*>(made.data());
    p.bounds = reinterpret_cast<float*>(made.data() + codes);
    p.shift = shift.data();
    const Memory scratch = allocate(set.index_keys->scratch_bytes(p));
    for (int64_t n = 0; n < heads; ++n)
        set.index_keys->run(p, {n / z.kv_heads, n % z.kv_heads, 0, blocks}, scratch.get());
    return made;
}

// ---- embedding

void check_embedding(const Set& set, DType dtype, bool packed) {
    const int64_t rows = 50, dim = 37, width = 11;
    const auto next = [] { return whole(8) / 8; };
    const Array table(dtype, rows * width, next), projection(dtype, dim * width, next);
    Array out(dtype, rows * dim);
    std::vector<int64_t> row, starts, positions;
    for (int64_t i = 0; i < rows; ++i)
        row.push_back((7 * i) % rows), starts.push_back(i), positions.push_back(rows - 1 - i);
    starts.push_back(rows);
    EmbeddingBand band{};
    band.table = table.data(), band.projection = projection.data(), band.table_stride = band.width = width;
    band.first = 0, band.last = rows;
    EmbeddingParams p{};
    p.bands = &band, p.row = row.data(), p.starts = starts.data(), p.positions = positions.data();
    p.out = out.data(), p.embedding_dim = dim, p.widest = width, p.dtype = dtype;
    Memory panels = allocate(set.embedding->packed_bytes(p, 0, false));
    if (packed) {
        band.packed = reinterpret_cast<float*>(panels.get());
        set.embedding->pack(p, 0, false, {0, set.embedding->panels(p, 0, false)});
    }
    const Memory scratch = allocate(set.embedding->project.scratch_bytes(p));
    for (int64_t i = 0; i < rows; i += kEmbeddingBlock)
        set.embedding->project.run(p, {0, {i, i + kEmbeddingBlock < rows ? i + kEmbeddingBlock : rows}},
                                   scratch.get());
    std::vector<double> right(static_cast<size_t>(rows * dim));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < dim; ++d)
            for (int64_t w = 0; w < width; ++w)
                right[static_cast<size_t>((rows - 1 - i) * dim + d)] +=
                    table.values[static_cast<size_t>(row[static_cast<size_t>(i)] * width + w)] *
                    projection.values[static_cast<size_t>(d * width + w)];
    expect_close(out, right, set.name, "the embedding");
}

}  // namespace

int main() {
    const Set simd = SPARSE_ATTN_FIND(simd), plain = SPARSE_ATTN_FIND(plain);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        for (const int64_t dim : {5, 64}) {
            const Problem exact({2, 4, 2, 21, 70, dim, dim + 3, 9, 3, 1, 4}, dtype, [] { return whole(3); });
            const std::vector<int32_t> right = by_sorting(exact);
            const Problem shared({1, 4, 2, 21, 70, dim, dim, 9, 3, 1, 2}, dtype, smooth);
            for (const Set& set : {simd, plain}) {
                const std::vector<int32_t> found = selected(set, exact);
                for (size_t i = 0; i < right.size(); ++i)
                    expect(found[i] == right[i], set.name, "the selection", static_cast<int64_t>(i));
                check_attention(set, exact, right);
                check_attention(set, shared, selected(set, shared));
            }
            expect(selected(simd, shared) == selected(plain, shared), "both", "a shared selection");
            expect(index_of(simd, shared) == index_of(plain, shared), "both", "a key index");
        }
        const Problem longer({1, 2, 1, 40, 700, 64, 4, 8, 2, 1, 2}, dtype, smooth);
        for (const Set& set : {simd, plain}) {
            check_bounds(set, longer);
            for (const bool packed : {false, true}) check_embedding(set, dtype, packed);
        }
    }
    std::printf("kernels: %d numbers and selections looked at, %d wrong\n", checks, faults);
    return faults != 0;
}
