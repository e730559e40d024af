// The kernels that torch's tensors never reach here: compiled for the instruction sets of 64-bit ARM and
// without any, `plain`, linked into one program without torch, and both held against loops in double. Run by
// tests/simd/arm.py under emulation: kernels SET, on a CPU that has that set and none above it. Prints what
// was wrong, or how much was looked at.
#include "sets.h"

namespace arm {

// ---- selection

std::vector<int32_t> selected(const Set& set, const Problem& x, bool rounded) {
    std::vector<int32_t> indices = x.no_indices();
    SelectParams p = x.select(indices.data());
    p.rounded = rounded;
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
        q.grad_out = grad_out.data(), q.out = keys_first ? out.data() : nullptr;
        q.grad_out_strides =
            q.out_strides = {z.heads * z.queries * z.value_dim, z.queries * z.value_dim, z.value_dim, 1};
        Array grad_query(dtype, rows * z.dim), grad_key(dtype, z.batch * z.kv_heads * z.keys * z.dim),
            grad_value(dtype, z.batch * z.kv_heads * z.keys * z.value_dim);
        q.grad_query = grad_query.data(), q.grad_key = grad_key.data(), q.grad_value = grad_value.data();
        const Memory probability = allocate(4 * rows * z.top_k), score = allocate(4 * rows * z.top_k),
                     centre = allocate(4 * rows);
        q.probability = keys_first ? nullptr : reinterpret_cast<float*>(probability.get());
        q.grad_score = reinterpret_cast<float*>(score.get());
        q.centre = keys_first ? reinterpret_cast<float*>(centre.get()) : nullptr;
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

Index index_of(const Set& set, const Problem& x) {
    const Sizes& z = x.z;
    const int64_t blocks = (z.keys + cpu::kIndexKeys - 1) / cpu::kIndexKeys, words = (z.dim + 3) / 4;
    const int64_t heads = z.batch * z.kv_heads, codes = heads * blocks * words * 64,
                  bounds = heads * blocks * 3 * 64;
    Index index{std::vector<uint8_t>(static_cast<size_t>(codes + bounds)), codes, blocks};
    std::vector<float> shift(static_cast<size_t>(heads * z.dim), kShift);
    IndexKeysParams p{};
    p.key = x.key.data(), p.key_strides = x.select(nullptr).key_strides, p.dtype = x.key.dtype;
    p.kv_heads = z.kv_heads, p.length = z.keys, p.head_dim = z.dim, p.begin = 0, p.blocks = blocks;
    p.codes = reinterpret_cast<int8_t*>(index.made.data());
    p.bounds = reinterpret_cast<float*>(index.made.data() + codes);
    p.shift = shift.data();
    const Memory scratch = allocate(set.index_keys->scratch_bytes(p));
    for (int64_t n = 0; n < heads; ++n)
        set.index_keys->run(p, {n / z.kv_heads, n % z.kv_heads, 0, blocks}, scratch.get());
    return index;
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

// Where scores are rounded otherwise: no key that was left scores more than one that was taken.
static void check_near(const Set& set, const Problem& x, const std::vector<int32_t>& indices) {
    const Sizes& z = x.z;
    for (int64_t b = 0; b < z.batch; ++b)
        for (int64_t h = 0; h < z.heads; ++h)
            for (int64_t i = 0; i < z.queries; ++i) {
                const int32_t* row = indices.data() + x.row(b, h, i) * z.top_k;
                const int64_t own = i + x.offset();
                std::vector<uint8_t> taken(static_cast<size_t>(z.keys));
                for (int64_t slot = 0; slot < z.top_k; ++slot)
                    if (row[slot] >= 0) taken[static_cast<size_t>(row[slot])] = 1;
                double least = 1e30, most = -1e30;
                for (int64_t j = 0; j <= own; ++j) {
                    if (j < z.sinks || j > own - z.window) continue;
                    const double s = x.score(b, h, i, j);
                    if (taken[static_cast<size_t>(j)])
                        least = std::fmin(least, s);
                    else
                        most = std::fmax(most, s);
                }
                expect(most <= least + 1e-5, set.name, "a near selection", x.row(b, h, i));
            }
}

static Set find(const std::string& name) {
    Set s{};
#define SPARSE_ATTN_TAKE(isa, op, Type, member) \
    if (cpu::isa::find_##op != nullptr) cpu::isa::find_##op(s.member);
#define SPARSE_ATTN_CLIMB(isa)                    \
    s.name = #isa;                                \
    SPARSE_ATTN_EACH_TABLE(SPARSE_ATTN_TAKE, isa) \
    if (name == #isa) return s;
    SPARSE_ATTN_CLIMB(plain)
    SPARSE_ATTN_CLIMB(neon)
    SPARSE_ATTN_CLIMB(neon_dot)
    SPARSE_ATTN_CLIMB(neon_bf16)
    std::printf("no such set: %s\n", name.c_str());
    std::exit(2);
}

}  // namespace arm

int main(int count, char** arguments) {
    using namespace arm;
    const Set plain = find("plain"), simd = find(count > 1 ? arguments[1] : "neon");
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
            if (!simd.pairs(dtype))
                expect(selected(simd, shared) == selected(plain, shared), "both", "a shared selection");
            expect(selected(simd, shared, true) == selected(plain, shared, true), "both",
                   "a rounded selection");
            expect(index_of(simd, shared).made == index_of(plain, shared).made, "both", "a key index");
        }
        const Problem longer({1, 2, 1, 40, 700, 64, 4, 8, 2, 1, 2}, dtype, smooth);
        const Problem odd({1, 2, 1, 9, 500, 37, 4, 8, 2, 1, 2}, dtype, smooth);
        for (const Problem* x : {&longer, &odd}) {
            const std::vector<int32_t> found = selected(simd, *x);
            if (simd.pairs(dtype))
                check_near(simd, *x, found);
            else
                expect(found == selected(plain, *x), "both", "a selection");
        }
        for (const Set& set : {simd, plain}) {
            for (const Problem* x : {&longer, &odd})
                for (const int bits : {kPairBits, kByteBits}) check_bounds(set, plain, *x, bits);
            check_decoding(set, odd);
            check_loss(set, dtype);
            for (const bool packed : {false, true}) check_embedding(set, dtype, packed);
        }
    }
    std::printf("kernels: %s: %d numbers and selections looked at, %d wrong\n", simd.name, checks, faults);
    return faults != 0;
}
