#include "cpu/selection.h"

#include <atomic>

namespace sparse_attn {

std::vector<int64_t> lengths_of(const char* op, const std::optional<Tensor>& key_lengths, int64_t batch,
                                int64_t key_length) {
    std::vector<int64_t> lengths;
    if (!key_lengths) return lengths;
    const Tensor& n = *key_lengths;
    check_key_lengths(op, n, batch);
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t at = b * n.stride(0);
        const int64_t length = n.scalar_type() == ScalarType::Int
                                   ? static_cast<const int32_t*>(n.const_data_ptr())[at]
                                   : static_cast<const int64_t*>(n.const_data_ptr())[at];
        lengths.push_back(std::clamp<int64_t>(length, 0, key_length));
    }
    return lengths;
}

void prepare_selection(Selection& s, const char* op, const Tensor& query, const Tensor& key, int64_t top_k,
                       const RuleArguments& given, bool rounded) {
    s.params = select_params(op, query, key, top_k, given);
    s.params.rounded = rounded;
    s.lengths = lengths_of(op, given.key_lengths, s.params.batch, s.params.key_length);
    if (!s.lengths.empty()) s.params.rule.lengths = s.lengths.data();
}

bool needs_scores(const SelectParams& p) {
    int64_t most = p.key_length;
    if (p.rule.is_causal && !p.rule.offsets.given())
        most = std::min(most, p.query_length + p.rule.causal_offset);
    return most > p.top_k || p.rule.mask != nullptr || p.blocks != nullptr;
}

// Calls use(panels) for those of [begin, end) that are needed, the ones in a row together.
template <class F>
static void each_needed(const Selection& s, int64_t begin, int64_t end, const F& use) {
    if (s.panels.empty()) return use(cpu::Range{begin, end});
    for (int64_t n = begin; n < end; ++n) {
        const int64_t first = n;
        while (n < end && s.panels[static_cast<size_t>(n)]) ++n;
        if (n > first) use(cpu::Range{first, n});
    }
}

static void divide(Selection& s, int64_t block) {
    const SelectParams& p = s.params;
    s.block = block;
    s.per_head = blocks(p.query_length, s.block);
    double pairs = static_cast<double>(p.batch * p.heads) * p.query_length * p.key_length;
    s.parallel = worth_threads(pairs * p.head_dim);
}

void pack_keys(Selection& s, int64_t block, bool always) {
    const SelectParams& p = s.params;
    const cpu::SelectKernels& k = cpu::topk_select_kernels();
    divide(s, block);
    if (s.packed || (!always && !needs_scores(p))) return;
    const int64_t head_bytes = k.packed_head_bytes(p), panels = k.panel_count(p), chunk = 64;
    s.packed = allocate(head_bytes * p.batch * p.kv_heads);
    const int64_t chunks = blocks(panels, chunk);
    for_each_task(p.batch * p.kv_heads * chunks, 64, s.parallel, [&](int64_t i, char*) {
        int64_t head = i / chunks, c = i % chunks;
        each_needed(s, c * chunk, std::min(panels, (c + 1) * chunk), [&](cpu::Range some) {
            k.pack_keys(p, head / p.kv_heads, head % p.kv_heads, some, s.packed.get() + head * head_bytes);
        });
    });
}

// ---- by bounds

static std::atomic<ByBounds> bounds_used{ByBounds::kAuto};
static std::atomic<int> bounds_bits{0};
static std::atomic<int64_t> counts[6];

void use_bounds(ByBounds when, int bits) {
    bounds_used = when;
    bounds_bits = bits;
}

BoundsCounts bounds_counts() {
    return {counts[0], counts[1], counts[2], counts[3], counts[4], counts[5]};
}

static bool by_bounds(const SelectParams& p) {
    const ByBounds when = bounds_used;
    if (when == ByBounds::kNever || !needs_scores(p)) return false;
    const cpu::BoundsKernels& k = cpu::topk_bounds_kernels();
    return when == ByBounds::kAlways ? k.takes(p) : k.pays(p);
}

static int bits_of_bounds(const SelectParams& p) {
    const int bits = bounds_bits;
    return bits ? bits : cpu::topk_bounds_kernels().bits(p);
}

static Memory rounded_keys(const Selection& s) {
    const SelectParams& p = s.params;
    const cpu::BoundsKernels& k = cpu::topk_bounds_kernels();
    const int64_t head_bytes = k.packed_head_bytes(p), heads = p.batch * p.kv_heads;
    const int64_t panels = cpu::topk_select_kernels().panel_count(p), chunk = 64,
                  chunks = blocks(panels, chunk);
    Memory packed = allocate(head_bytes * heads);
    for_each_task(heads, 64, s.parallel, [&](int64_t i, char*) {
        k.find_shift(p, i / p.kv_heads, i % p.kv_heads, packed.get() + i * head_bytes);
    });
    for_each_task(heads * chunks, 64, s.parallel, [&](int64_t i, char*) {
        const int64_t head = i / chunks, c = i % chunks;
        each_needed(s, c * chunk, std::min(panels, (c + 1) * chunk), [&](cpu::Range some) {
            k.pack_keys(p, head / p.kv_heads, head % p.kv_heads, some, packed.get() + head * head_bytes);
        });
    });
    return packed;
}

void select_all(Selection& s, int64_t scratch_bytes, const std::function<void(const Block&, char*)>& then,
                const std::function<bool(const Block&)>& wanted) {
    const SelectParams& p = s.params;
    const cpu::SelectKernels& full = cpu::topk_select_kernels();
    const int64_t step = full.block_queries(p);
    divide(s, step);
    const int64_t parts = static_cast<int64_t>(s.parts.size());
    const int64_t tasks = parts ? p.rule.groups * parts : p.batch * p.rule.groups * s.per_head;
    auto block = [&](int64_t i) {
        if (!parts) return block_of(i, p.rule.groups, s.per_head, s.block, p.query_length);
        const QueryPart& part = s.parts[static_cast<size_t>(i % parts)];
        return Block{part.b, i / parts, part.queries};
    };
    // The tasks that the full product has to do: all, or those whose bounds leave too many keys.
    std::vector<int64_t> left;
    const bool bounds = by_bounds(p);
    if (bounds) {
        for (int64_t i = 0; i < tasks; ++i) left.push_back(i);
        const cpu::BoundsKernels& k = cpu::topk_bounds_kernels();
        const int first_bits = bits_of_bounds(p);
        // What fewer bits leave too much of, pairs may not; unless somebody asked for fewer.
        for (int bits = first_bits; bits > 0 && !left.empty();
             bits = bits < kPairBits && bounds_bits == 0 ? kPairBits : 0) {
            s.params.bounds_bits = bits;
            const Memory packed = rounded_keys(s);
            std::vector<uint8_t> done(left.size());
            std::atomic<int64_t> tried{0}, given_up{0};
            const int64_t bytes = (std::max(k.scratch_bytes(p), scratch_bytes) + 63) / 64 * 64;
            const int64_t logit_bytes = s.wants_logits ? 4 * step * p.top_k : 0;
            s.logits_at = s.wants_logits ? bytes : 0;
            for_each_task(
                static_cast<int64_t>(left.size()), bytes + logit_bytes, s.parallel,
                [&](int64_t n, char* scratch) {
                    if (given_up * 4 > tried + 16) return;  // inputs that bounds do not suit
                    const Block t = block(left[static_cast<size_t>(n)]);
                    uint8_t& is_done = done[static_cast<size_t>(n)];
                    if (wanted && !wanted(t)) {
                        is_done = 1;
                        return;
                    }
                    cpu::Survivors found{};
                    ++tried;
                    float* logits = logit_bytes ? reinterpret_cast<float*>(scratch + s.logits_at) : nullptr;
                    if (!k.select(p, {t.b, t.group, t.queries, packed.get(), logits}, scratch, &found)) {
                        ++given_up;
                        return;
                    }
                    is_done = 1;
                    then(t, scratch);
                    const int64_t add[] = {1, 0, found.rows, found.budget, found.kept, found.scored};
                    for (int j = 0; j < 6; ++j) counts[j] += add[j];
                });
            std::vector<int64_t> rest;
            for (size_t n = 0; n < left.size(); ++n)
                if (!done[n]) rest.push_back(left[n]);
            left.swap(rest);
            s.logits_at = 0;
        }
        counts[1] += static_cast<int64_t>(left.size());
        if (left.empty()) return;
    }
    pack_keys(s, step);
    const int64_t bytes = std::max(full.select.scratch_bytes(p), scratch_bytes);
    for_each_task(bounds ? static_cast<int64_t>(left.size()) : tasks, bytes, s.parallel,
                  [&](int64_t i, char* scratch) {
                      const Block t = block(bounds ? left[static_cast<size_t>(i)] : i);
                      if (!bounds && wanted && !wanted(t)) return;
                      full.select.run(p, {t.b, t.group, t.queries, s.packed.get()}, scratch);
                      then(t, scratch);
                  });
}

}  // namespace sparse_attn
