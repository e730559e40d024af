// Of kernels.cpp what the products of bytes and of pairs of bfloat16 are in: selection by bounds, decoding
// through a key index, and the loss.
#include "sets.h"

namespace arm {

struct Bounded {
    std::vector<int32_t> indices;
    std::vector<cpu::Survivors> survivors;  // of each block that bounds decided, else nothing
};

static Bounded by_bounds(const Set& set, const Problem& x, int bits) {
    Bounded found{x.no_indices(), {}};
    SelectParams p = x.select(found.indices.data());
    const cpu::BoundsKernels& k = *set.bounds;
    expect(k.takes(p), set.name, "what bounds take");
    p.bounds_bits = bits;
    const int64_t head_bytes = k.packed_head_bytes(p), heads = p.batch * p.kv_heads;
    const Memory packed = allocate(head_bytes * heads), scratch = allocate(k.scratch_bytes(p));
    for (int64_t n = 0; n < heads; ++n) {
        char* to = packed.get() + n * head_bytes;
        k.find_shift(p, n / p.kv_heads, n % p.kv_heads, to);
        k.pack_keys(p, n / p.kv_heads, n % p.kv_heads, {0, set.select->panel_count(p)}, to);
    }
    const int64_t step = set.select->block_queries(p);
    for (int64_t n = 0; n < p.batch * p.heads; ++n)
        for (int64_t i = 0; i < p.query_length; i += step) {
            const int64_t end = i + step < p.query_length ? i + step : p.query_length;
            cpu::Survivors survivors{};
            if (!k.select(p, {n / p.heads, n % p.heads, {i, end}, packed.get()}, scratch.get(), &survivors))
                survivors = {};
            found.survivors.push_back(survivors);
        }
    return found;
}

// As the full product has them, wherever bounds decide at all; and as many keys are left to it as by `plain`,
// whose scores are the same whole numbers.
void check_bounds(const Set& set, const Set& plain, const Problem& x, int bits) {
    const std::vector<int32_t> right = selected(set, x);
    const Bounded found = by_bounds(set, x, bits), other = by_bounds(plain, x, bits);
    const int64_t step = set.select->block_queries(x.select(nullptr)), row = x.z.top_k, queries = x.z.queries;
    size_t block = 0;
    int64_t decided = 0;
    for (int64_t n = 0; n < x.z.batch * x.z.heads; ++n)
        for (int64_t i = 0; i < queries; i += step, ++block) {
            const cpu::Survivors &mine = found.survivors[block], &theirs = other.survivors[block];
            expect(mine.rows == theirs.rows && mine.kept == theirs.kept, set.name, "what bounds leave");
            if (mine.rows == 0) continue;
            ++decided;
            const int64_t end = i + step < queries ? i + step : queries;
            for (int64_t at = (n * queries + i) * row; at < (n * queries + end) * row; ++at)
                expect(found.indices[static_cast<size_t>(at)] == right[static_cast<size_t>(at)], set.name,
                       "selection by bounds", at);
        }
    expect(decided > 0, set.name, "that bounds decide");
}

// A chunk for all keys, with an index and without: as the full product has them.
void check_decoding(const Set& set, const Problem& x) {
    const std::vector<int32_t> right = selected(set, x);
    const Index index = index_of(set, x);
    const Sizes& z = x.z;
    const std::vector<float> shift(static_cast<size_t>(z.batch * z.kv_heads * z.dim), kShift);
    for (const bool indexed : {false, true}) {
        std::vector<int32_t> indices = x.no_indices();
        const cpu::DecodeKernels& k = *set.decode;
        DecodeParams d{};
        d.select = x.select(indices.data());
        d.group_rows = z.queries;
        if (indexed)
            d.index = {reinterpret_cast<const int8_t*>(index.made.data()),
                       reinterpret_cast<const float*>(index.made.data() + index.codes), shift.data(),
                       index.blocks};
        d.chunk = (k.panels(d.select) + 1) / 2 * 2, d.chunks = 1, d.heads = 1;
        d.kept = d.room = z.top_k;
        const int64_t lists = z.batch * z.heads * z.queries;
        const Memory scores = allocate(lists * d.room * 4), places = allocate(lists * d.room * 4),
                     counts = allocate(lists * 4), of_scan = allocate(k.scan.scratch_bytes(d)),
                     of_choice = allocate(k.choose.scratch_bytes(d));
        d.best_scores = reinterpret_cast<float*>(scores.get());
        d.best_indices = reinterpret_cast<int32_t*>(places.get());
        d.best_counts = reinterpret_cast<int32_t*>(counts.get());
        for (int64_t n = 0; n < z.batch * z.kv_heads; ++n)
            k.scan.run(d, {n / z.kv_heads, n % z.kv_heads, 0}, of_scan.get());
        for (int64_t n = 0; n < z.batch * z.heads; ++n)
            for (int64_t i = 0; i < z.queries; ++i)
                k.choose.run(d, {n / z.heads, n % z.heads, i}, of_choice.get());
        expect(indices == right, set.name, indexed ? "decoding through an index" : "decoding");
    }
}

// ---- the loss of a band with a projection, in more than one tile of classes and block of tokens

void check_loss(const Set& set, DType dtype) {
    const int64_t tokens = 201, dim = 21, width = 11, classes = 300, padded = 2 * kTokenBlock;
    const auto next = [] { return smooth(); };
    const Array hidden(dtype, tokens * dim, next), table(dtype, classes * width, next),
        projection(dtype, dim * width, next);
    std::vector<int64_t> token, target;
    for (int64_t n = 0; n < tokens; ++n) token.push_back(tokens - 1 - n), target.push_back(31 * n % classes);

    // By definition.
    std::vector<double> near(static_cast<size_t>(tokens * width)), right_lse, right_target;
    std::vector<double> of_hidden(static_cast<size_t>(tokens * dim)),
        of_table(static_cast<size_t>(classes * width)), of_projection(static_cast<size_t>(dim * width));
    const auto at = [](int64_t i) { return static_cast<size_t>(i); };
    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t w = 0; w < width; ++w)
            for (int64_t d = 0; d < dim; ++d)
                near[at(n * width + w)] +=
                    hidden.values[at(token[at(n)] * dim + d)] * projection.values[at(d * width + w)];
    for (int64_t n = 0; n < tokens; ++n) {
        std::vector<double> logits(at(classes)), back(at(width));
        double sum = 0;
        for (int64_t v = 0; v < classes; ++v) {
            for (int64_t w = 0; w < width; ++w)
                logits[at(v)] += near[at(n * width + w)] * table.values[at(v * width + w)];
            sum += std::exp(logits[at(v)]);
        }
        right_lse.push_back(std::log(sum));
        right_target.push_back(logits[at(target[at(n)])]);
        for (int64_t v = 0; v < classes; ++v) {
            const double g = std::exp(logits[at(v)]) / sum - (v == target[at(n)]);
            for (int64_t w = 0; w < width; ++w) {
                back[at(w)] += g * table.values[at(v * width + w)];
                of_table[at(v * width + w)] += g * near[at(n * width + w)];
            }
        }
        for (int64_t d = 0; d < dim; ++d)
            for (int64_t w = 0; w < width; ++w) {
                of_hidden[at(token[at(n)] * dim + d)] += back[at(w)] * projection.values[at(d * width + w)];
                of_projection[at(d * width + w)] += back[at(w)] * hidden.values[at(token[at(n)] * dim + d)];
            }
    }

    const cpu::CrossEntropyKernels& k = *set.loss;
    const cpu::CrossEntropyBackwardKernels& back = *set.loss_backward;
    const int64_t room = padded * k.padded_width(width) * 4, tile = k.tile_classes(width);
    const Memory projected = allocate(room), projected_cols = allocate(room), grad_projected = allocate(room);
    Array grad_hidden(dtype, tokens * dim), grad_table(dtype, classes * width),
        grad_projection(dtype, dim * width);
    CrossEntropyBand band{};
    band.table = table.data(), band.projection = projection.data(), band.rows = classes, band.width = width;
    band.projected = reinterpret_cast<float*>(projected.get());
    band.projected_cols = reinterpret_cast<float*>(projected_cols.get());
    band.grad_projected = reinterpret_cast<float*>(grad_projected.get());
    band.grad_table = grad_table.data(), band.grad_projection = grad_projection.data();
    CrossEntropyParams p{};
    p.hidden = hidden.data(), p.token = token.data(), p.target = target.data(), p.bands = &band;
    p.tokens = tokens, p.embedding_dim = dim, p.band_count = 1, p.dtype = dtype;
    p.grad_hidden = grad_hidden.data();
    std::vector<float> peak(at(padded), -INFINITY), sum(at(padded)), target_logit(at(padded)),
        lse(at(padded));
    std::vector<float> one(at(tokens), 1.0f), none(at(padded));
    one.resize(at(padded));
    p.partial_max = peak.data(), p.partial_sum = sum.data(), p.target_logit = target_logit.data();
    const Memory of_projection_scratch = allocate(k.project_scratch_bytes(p)),
                 of_forward = allocate(k.scratch_bytes(p));
    for (int64_t block = 0; block < 2; ++block) k.project(p, 0, block, of_projection_scratch.get());
    for (int64_t v = 0; v < classes; v += tile) {
        const cpu::ClassTile some{0, v, v + tile < classes ? v + tile : classes};
        k.begin(p, some, of_forward.get());
        for (int64_t block = 0; block < 2; ++block) k.block(p, some, 0, block, of_forward.get());
    }
    Array found_lse(DType::kFloat32, tokens), found_target(DType::kFloat32, tokens);
    for (int64_t n = 0; n < tokens; ++n) {
        lse[at(n)] = peak[at(n)] + std::log(sum[at(n)]);
        found_lse.set(n, lse[at(n)]), found_target.set(n, target_logit[at(n)]);
    }
    // Products of pairs take projected hidden states as bfloat16.
    const double share = set.pairs(dtype) ? 8e-3 : 3e-6;
    expect_close(found_lse, right_lse, set.name, "the loss", share);
    expect_close(found_target, right_target, set.name, "the target's logit", share);

    p.lse = lse.data(), p.softmax_scale = p.target_scale = one.data(), p.smooth_scale = none.data();
    const Memory of_backward = allocate(back.scratch_bytes(p)),
                 of_ends = allocate(back.unproject_scratch_bytes(p));
    for (int64_t v = 0; v < classes; v += tile) {
        const cpu::ClassTile some{0, v, v + tile < classes ? v + tile : classes};
        back.begin(p, some, of_backward.get());
        for (int64_t block = 0; block < 2; ++block) {
            back.scores(p, some, block, of_backward.get());
            back.hidden(p, some, block, of_backward.get());
        }
        back.end(p, some, of_backward.get());
    }
    for (int64_t block = 0; block < 2; ++block) back.grad_hidden(p, block, of_ends.get());
    back.grad_projection(p, 0, 0, dim, of_ends.get());
    expect_close(grad_hidden, of_hidden, set.name, "the loss's gradient of hidden");
    expect_close(grad_table, of_table, set.name, "the loss's gradient of a table");
    expect_close(grad_projection, of_projection, set.name, "the loss's gradient of a projection");
}

}  // namespace arm
