// index_keys on the CPU: rows of a key index, written in place.
#include "cpu/kernels/index_keys.h"

#include <torch/csrc/stable/library.h>

#include "common/attention.h"
#include "cpu/isa.h"
#include "cpu/kernels/topk_decode.h"
#include "cpu/tasks.h"

SPARSE_ATTN_FIND_KERNELS(index_keys, IndexKeysKernel)

namespace sparse_attn {
namespace {

constexpr int64_t kBlocks = 64;  // of a task

bool fits(const Tensor& t, ScalarType type, const std::vector<int64_t>& shape) {
    bool ok = t.scalar_type() == type && t.is_contiguous() && t.dim() == static_cast<int64_t>(shape.size());
    for (size_t d = 0; ok && d < shape.size(); ++d) ok = t.size(static_cast<int64_t>(d)) == shape[d];
    return ok;
}

void index_keys_cpu(Tensor key, Tensor codes, Tensor bounds, Tensor shift, int64_t begin) {
    const char* op = "index_keys.cpu";
    const int64_t keys = cpu::kIndexKeys;
    STD_TORCH_CHECK(key.dim() == 4, op, ": key must be [B, Hkv, T, D]; got ", shape_of(key));
    const int64_t batch = key.size(0), heads = key.size(1), length = key.size(2), dim = key.size(3);
    const int64_t n = codes.dim() == 6 ? codes.size(2) : 0;
    STD_TORCH_CHECK(
        begin >= 0 && begin <= n * keys && length <= n * keys - begin &&
            fits(codes, ScalarType::Char, {batch, heads, n, blocks(dim, 4), keys, 4}) &&
            fits(bounds, ScalarType::Float, {batch, heads, n, 3, keys}) &&
            fits(shift, ScalarType::Float, {batch, heads, dim}),
        op, ": the index must be int8 [B, Hkv, N, ⌈D/4⌉, 16, 4], float32 [B, Hkv, N, 3, 16] and float32 ",
        "[B, Hkv, D], contiguous, with room for the keys ", shape_of(key), " from ", begin, " on; got ",
        shape_of(codes), ", ", shape_of(bounds), ", ", shape_of(shift));
    if (key.numel() == 0) return;
    if (dim > 1 && key.stride(3) != 1) key = torch::stable::contiguous(key);
    const IndexKeysParams p{key.const_data_ptr(),
                            strides_of(key),
                            dtype_of(op, key),
                            heads,
                            length,
                            dim,
                            begin,
                            n,
                            static_cast<int8_t*>(codes.mutable_data_ptr()),
                            static_cast<float*>(bounds.mutable_data_ptr()),
                            static_cast<const float*>(shift.const_data_ptr())};
    const cpu::IndexKeysKernel& k = cpu::index_keys_kernels();
    const int64_t first = begin / keys, last = blocks(begin + length, keys),
                  parts = blocks(last - first, kBlocks);
    const double work = static_cast<double>(batch * heads * length) * static_cast<double>(dim);
    for_each_task(batch * heads * parts, k.scratch_bytes(p), worth_threads(work),
                  [&](int64_t i, char* scratch) {
                      const int64_t head = i / parts, from = first + i % parts * kBlocks;
                      k.run(p, {head / heads, head % heads, from, std::min(from + kBlocks, last)}, scratch);
                  });
}

void index_pages_cpu(Tensor key, Tensor slots, Tensor codes, Tensor bounds, Tensor shift) {
    const char* op = "index_pages.cpu";
    const int64_t keys = cpu::kIndexKeys;
    STD_TORCH_CHECK(key.dim() == 3 && slots.dim() == 1 && slots.size(0) == key.size(0) &&
                        slots.scalar_type() == ScalarType::Long && slots.is_contiguous(),
                    op, ": key must be [T, Hkv, D] and slots int64 [T]; got ", shape_of(key), " and ",
                    shape_of(slots));
    const int64_t length = key.size(0), heads = key.size(1), dim = key.size(2);
    const int64_t pages = codes.dim() == 6 ? codes.size(0) : 0, n = codes.dim() == 6 ? codes.size(2) : 0;
    STD_TORCH_CHECK(fits(codes, ScalarType::Char, {pages, heads, n, blocks(dim, 4), keys, 4}) &&
                        fits(bounds, ScalarType::Float, {pages, heads, n, 3, keys}) &&
                        fits(shift, ScalarType::Float, {heads, dim}),
                    op, ": the index must be int8 [P, Hkv, N, ⌈D/4⌉, 16, 4], float32 [P, Hkv, N, 3, 16] and ",
                    "float32 [Hkv, D], contiguous, of the heads of ", shape_of(key), "; got ",
                    shape_of(codes), ", ", shape_of(bounds), ", ", shape_of(shift));
    if (key.numel() == 0) return;
    if (dim > 1 && key.stride(2) != 1) key = torch::stable::contiguous(key);
    const int64_t* at = static_cast<const int64_t*>(slots.const_data_ptr());
    const int64_t size = n * keys;
    // Keys whose slots follow each other in a page.
    struct Run {
        int64_t first, count, page, begin;
    };
    std::vector<Run> runs;
    for (int64_t i = 0; i < length; ++i) {
        if (at[i] < 0) continue;
        STD_TORCH_CHECK(at[i] < pages * size, op, ": slots must be below ", pages * size, "; got ", at[i]);
        Run* last = runs.empty() ? nullptr : &runs.back();
        if (last && last->first + last->count == i && at[i] == at[i - 1] + 1 && at[i] % size != 0)
            ++last->count;
        else
            runs.push_back({i, 1, at[i] / size, at[i] % size});
    }
    const int64_t row = dim > 0 ? key.stride(0) : 0, width = key.scalar_type() == ScalarType::Float ? 4 : 2;
    const cpu::IndexKeysKernel& k = cpu::index_keys_kernels();
    IndexKeysParams p{nullptr,
                      {0, key.stride(1), row, 1},
                      dtype_of(op, key),
                      heads,
                      0,
                      dim,
                      0,
                      n,
                      nullptr,
                      nullptr,
                      static_cast<const float*>(shift.const_data_ptr())};
    const double work = static_cast<double>(length * heads) * static_cast<double>(dim);
    // A task per head: of keys with one slot the last one stays.
    for_each_task(heads, k.scratch_bytes(p), worth_threads(work), [&](int64_t head, char* scratch) {
        for (const Run& r : runs) {
            IndexKeysParams own = p;
            own.key = static_cast<const char*>(key.const_data_ptr()) + r.first * row * width;
            own.length = r.count, own.begin = r.begin;
            own.codes = static_cast<int8_t*>(codes.mutable_data_ptr()) +
                        r.page * heads * n * blocks(dim, 4) * keys * 4;
            own.bounds = static_cast<float*>(bounds.mutable_data_ptr()) + r.page * heads * n * 3 * keys;
            k.run(own, {0, head, r.begin / keys, blocks(r.begin + r.count, keys)}, scratch);
        }
    });
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "index_pages.cpu(Tensor key, Tensor slots, Tensor(a!) codes, Tensor(b!) bounds, Tensor shift) -> ()");
    m.def(
        "index_keys.cpu(Tensor key, Tensor(a!) codes, Tensor(b!) bounds, Tensor shift, SymInt begin) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("index_keys.cpu", TORCH_BOX(&sparse_attn::index_keys_cpu));
    m.impl("index_pages.cpu", TORCH_BOX(&sparse_attn::index_pages_cpu));
}
