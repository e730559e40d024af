// paged_attention and paged_select on the CPU: topk_attention and its selection for packed sequences whose
// keys and values lie in pages.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels/gathered_attention.h"
#include "cpu/packed.h"

SPARSE_ATTN_FIND_KERNELS(gathered_attention, AttendKernel)

namespace sparse_attn {
namespace {

void check_pages(const char* op, const Tensor& query, const Tensor& key, const Tensor& block_table,
                 const RuleArguments& rule) {
    STD_TORCH_CHECK(query.dim() == 4 && query.size(0) == 1 && key.dim() == 4 &&
                        query.size(3) == key.size(3) && query.size(3) > 0 && key.size(1) > 0 &&
                        key.size(2) > 0 && query.size(1) > 0 && query.size(1) % key.size(1) == 0 &&
                        query.scalar_type() == key.scalar_type(),
                    op, ": query [1, Hq, T, D] and key [P, Hkv, page size, D] must agree; got ",
                    shape_of(query), " and ", shape_of(key));
    STD_TORCH_CHECK(block_table.dim() == 2 && block_table.scalar_type() == ScalarType::Int &&
                        block_table.is_contiguous() && !block_table.is_cuda() &&
                        block_table.numel() <= (std::numeric_limits<int32_t>::max() - 64) / key.size(2),
                    op, ": block_table must be int32 [S, pages], contiguous, of fewer than 2^31 keys; got ",
                    shape_of(block_table));
    STD_TORCH_CHECK(!rule.attn_mask && !rule.key_lengths && rule.key_starts && rule.causal_offsets, op,
                    ": the rule must be that of packed sequences, with key_starts and causal_offsets");
}

void prepare(Selection& s, const char* op, const Tensor& query, const Tensor& key, const Tensor& block_table,
             int64_t top_k, const RuleArguments& rule) {
    prepare_selection(s, op, query, key, top_k, rule);
    SelectParams& p = s.params;
    p.key_length = block_table.numel() * key.size(2);
    p.top_k = std::min(top_k, p.key_length);
    STD_TORCH_CHECK(p.rule.is_causal, op, ": the rule must be causal");
    for (int64_t i = 0; i < p.query_length; ++i)
        STD_TORCH_CHECK(p.rule.starts.at(0, i) >= p.key_length || p.rule.last_key(0, i) < p.key_length, op,
                        ": causal_offsets must not pass the last key; got one of query ", i);
}

// The rows of an index of these pages, or none.
KeyIndexParams index_of_pages(const char* op, const Tensor& key, const std::optional<Tensor>& codes,
                              const std::optional<Tensor>& bounds, const std::optional<Tensor>& shift) {
    if (!codes || !bounds || !shift || key.size(0) == 0) return {};
    STD_TORCH_CHECK(key.size(2) % cpu::kIndexKeys == 0, op,
                    ": pages with an index must have a multiple of 16 keys; got ", shape_of(key));
    return key_index_of(op, key.size(0), key.size(1), key.size(2) / cpu::kIndexKeys, key.size(3), *codes,
                        *bounds, *shift, {key.size(1), key.size(3)});
}

// Kernels may read a page whose keys no query sees: there is one.
Tensor some_page(const Tensor& pages) {
    return pages.size(0) ? pages
                         : torch::stable::new_zeros(pages, {1, pages.size(1), pages.size(2), pages.size(3)});
}

Tensor paged_select_cpu(Tensor query, Tensor key, Tensor block_table, int64_t top_k,
                        SPARSE_ATTN_RULE_PARAMETERS, std::optional<Tensor> codes,
                        std::optional<Tensor> bounds, std::optional<Tensor> shift) {
    const char* op = "paged_select.cpu";
    const RuleArguments given{SPARSE_ATTN_RULE_ARGUMENTS};
    check_pages(op, query, key, block_table, given);
    const int64_t count = key.size(0);
    const KeyIndexParams index = index_of_pages(op, key, codes, bounds, shift);
    key = some_page(with_contiguous_rows(key));
    Selection s;
    prepare(s, op, query, key, block_table, top_k, given);
    Tensor indices = new_indices(query, s.params);
    if (indices.numel() > 0)
        select_paged(
            s, static_cast<const int32_t*>(block_table.const_data_ptr()), key.size(2), count, 0,
            [](int64_t, int64_t, const int32_t*, char*) {}, index);
    return indices;
}

// Rows from one page to the next; 0 where that is no whole number.
int64_t rows_of_page(const Tensor& pages) {
    if (pages.size(0) <= 1) return pages.size(2);
    if (pages.size(2) == 1) return 1;
    return pages.stride(2) > 0 && pages.stride(0) > 0 && pages.stride(0) % pages.stride(2) == 0
               ? pages.stride(0) / pages.stride(2)
               : 0;
}

std::tuple<Tensor, Tensor, Tensor> paged_attention_cpu(
    Tensor query, Tensor key, Tensor value, Tensor block_table, int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS,
    std::optional<Tensor> codes, std::optional<Tensor> bounds, std::optional<Tensor> shift) {
    const char* op = "paged_attention.cpu";
    const RuleArguments given{SPARSE_ATTN_RULE_ARGUMENTS};
    check_pages(op, query, key, block_table, given);
    STD_TORCH_CHECK(
        value.dim() == 4 && value.size(0) == key.size(0) && value.size(1) == key.size(1) &&
            value.size(2) == key.size(2) && value.size(3) > 0 && value.scalar_type() == key.scalar_type(),
        op, ": value must be [P, Hkv, page size, Dv] beside key ", shape_of(key), "; got ", shape_of(value));
    const int64_t count = key.size(0);
    const KeyIndexParams index = index_of_pages(op, key, codes, bounds, shift);
    key = some_page(with_contiguous_rows(key));
    value = some_page(with_contiguous_rows(value));
    if (rows_of_page(key) == 0 || rows_of_page(key) != rows_of_page(value)) {
        // One number cannot name a row of both.
        key = torch::stable::contiguous(key);
        value = torch::stable::contiguous(value);
    }
    const int64_t step = rows_of_page(key), size = key.size(2);
    Selection s;
    prepare(s, op, query, key, block_table, top_k, given);
    SelectParams& p = s.params;
    Tensor indices = new_indices(query, p);
    Tensor out = torch::stable::new_empty(query, {p.query_length, p.heads, value.size(3)});
    Tensor lse = torch::stable::new_empty(query, {p.query_length, p.heads}, ScalarType::Float);
    if (out.numel() == 0) return {out, lse, indices};

    AttendParams a = attend_params(op, query, key, value, scale, softcap, sink_logits);
    a.batch = a.query_length = 1;  // of each query
    a.groups = p.rule.groups, a.slots = p.top_k;
    a.key_length = (key.size(0) - 1) * step + size;
    STD_TORCH_CHECK(a.key_length <= std::numeric_limits<int32_t>::max() - 64, op,
                    ": pages must have fewer than 2^31 rows; got ", shape_of(key));
    if (size == 1 && key.size(0) > 1) a.key_strides.t = key.stride(0), a.value_strides.t = value.stride(0);
    a.indices_strides = {0, 0, 0, 1};
    const cpu::AttendKernel& attend = cpu::gathered_attention_kernels();
    const int64_t sharing = p.heads / a.groups, attend_bytes = attend.scratch_bytes(a);
    const int64_t width = bytes_of(p.dtype), query_step = p.query_strides.t * width;
    const auto row_done = [&](int64_t group, int64_t i, const int32_t* pages, char* scratch) {
        // The row's keys where they lie, behind the scratch of the kernel.
        int32_t* rows = reinterpret_cast<int32_t*>(scratch + blocks(attend_bytes, 64) * 64);
        const int32_t* row = p.indices + (group * p.query_length + i) * p.top_k;
        const uint32_t of = static_cast<uint32_t>(size);  // divisions of 32 bits cost half as much
        for (int64_t k = 0; k < p.top_k; ++k) {
            const uint32_t key = static_cast<uint32_t>(row[k]);
            rows[k] = row[k] < 0 ? -1 : static_cast<int32_t>(pages[key / of] * step + key % of);
        }
        AttendParams own = a;
        own.indices = rows;
        own.query = static_cast<const char*>(a.query) + i * query_step;
        own.out = static_cast<char*>(out.mutable_data_ptr()) + i * p.heads * a.value_dim * width;
        own.lse = static_cast<float*>(lse.mutable_data_ptr()) + i * p.heads;
        attend.run(own, {0, {group * sharing, (group + 1) * sharing}, {0, 1}}, scratch);
    };
    if (p.top_k == 0) {
        const Memory scratch = allocate(attend_bytes + 64);
        for (int64_t i = 0; i < p.query_length; ++i)
            for (int64_t g = 0; g < a.groups; ++g) row_done(g, i, nullptr, scratch.get());
        return {out, lse, indices};
    }
    select_paged(s, static_cast<const int32_t*>(block_table.const_data_ptr()), size, count,
                 blocks(attend_bytes, 64) * 64 + p.top_k * 4, row_done, index);
    return {out, lse, indices};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "paged_select.cpu(Tensor query, Tensor key, Tensor block_table, SymInt "
        "top_k, " SPARSE_ATTN_RULE_SCHEMA ", Tensor? codes, Tensor? bounds, Tensor? shift) -> Tensor");
    m.def(
        "paged_attention.cpu(Tensor query, Tensor key, Tensor value, Tensor block_table, SymInt "
        "top_k, " SPARSE_ATTN_RULE_SCHEMA
        ", Tensor? codes, Tensor? bounds, Tensor? shift) -> (Tensor out, Tensor lse, Tensor indices)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("paged_select.cpu", TORCH_BOX(&sparse_attn::paged_select_cpu));
    m.impl("paged_attention.cpu", TORCH_BOX(&sparse_attn::paged_attention_cpu));
}
