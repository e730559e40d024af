// block_attention from torch's tensors to the CPU kernel.
#include <vector>

#include "cpu_attention.h"
#include "cpu_dispatch.h"
#include "cpu_selection.h"

namespace sparse_attn {

using cpu::KernelTable;

std::tuple<Tensor, Tensor> block_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor blocks_of,
                                               std::optional<Tensor> key_lengths, int64_t block_size,
                                               int64_t query_tile, bool is_causal, int64_t causal_offset,
                                               double scale) {
    const char* op = "block_attention.cpu";
    check_qkv(op, query, key, &value);
    STD_TORCH_CHECK(block_size >= 1 && query_tile >= 1, op,
                    ": block_size and query_tile must be at least 1; got ", block_size, " and ", query_tile);
    BlockParams p{};
    AttendParams& a = p.attend;
    a = attend_params(op, query, key, value, scale);
    // Longer ones change nothing, and sums of them still fit.
    p.block_size = std::min(block_size, std::max<int64_t>(1, a.key_length));
    p.query_tile = std::min(query_tile, std::max<int64_t>(1, a.query_length));
    p.tiles = blocks(a.query_length, p.query_tile);
    p.block_count = blocks(a.key_length, p.block_size);
    p.chunks_per_block = blocks(p.block_size, kBlockChunk);
    constexpr int64_t kFar = int64_t{1} << 40;
    p.causal_offset = std::clamp(causal_offset, -kFar, kFar);
    p.is_causal = is_causal;
    const int64_t groups = blocks_of.dim() == 4 ? blocks_of.size(1) : 0;
    STD_TORCH_CHECK(
        blocks_of.scalar_type() == ScalarType::Int && blocks_of.dim() == 4 && blocks_of.size(0) == a.batch &&
            (groups == 1 || groups == a.kv_heads || groups == a.heads) && blocks_of.size(2) == p.tiles,
        op, ": blocks must be int32 [B, G, N, M], G one of 1, Hkv, Hq, N tiles of queries; got ",
        shape_of(blocks_of));
    blocks_of = with_contiguous_rows(blocks_of);
    a.indices = static_cast<const int32_t*>(blocks_of.const_data_ptr());
    a.indices_strides = strides_of(blocks_of);
    a.groups = groups;
    a.slots = blocks_of.size(3);
    const std::vector<int64_t> lengths = lengths_of(op, key_lengths, a.batch, a.key_length);
    p.lengths = lengths.empty() ? nullptr : lengths.data();
    Tensor out = torch::stable::new_empty(query, {a.batch, a.heads, a.query_length, a.value_dim});
    Tensor lse = new_lse(query);
    if (out.numel() == 0) return {out, lse};
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());

    const KernelTable& k = cpu::kernels();
    const int64_t chunks = p.block_count * p.chunks_per_block, key_heads = a.batch * a.kv_heads;
    Memory packed_key = allocate(key_heads * chunks * k.block_packed_key(p) * 4);
    Memory packed_value = allocate(key_heads * chunks * k.block_packed_value(p) * 4);
    Memory special = allocate(key_heads * chunks);
    p.packed_key = reinterpret_cast<float*>(packed_key.get());
    p.packed_value = reinterpret_cast<float*>(packed_value.get());
    p.special = reinterpret_cast<uint8_t*>(special.get());
    const double pairs = static_cast<double>(a.batch * a.heads) * a.query_length * a.slots * p.block_size;
    const bool parallel = worth_threads(pairs * (a.head_dim + a.value_dim));
    constexpr int64_t kPack = 16;
    const int64_t packs = blocks(chunks, kPack);
    for_each_task(key_heads * packs, 64, parallel, [&](int64_t i, char*) {
        const int64_t head = i / packs, c = i % packs * kPack;
        k.block_pack(p, head / a.kv_heads, head % a.kv_heads, {c, std::min(chunks, c + kPack)});
    });
    // Heads that share a key head and a row of blocks are rows of one product.
    const int64_t units = std::max(a.kv_heads, a.groups), sharing = a.heads / units;
    for_each_task(a.batch * units * p.tiles, k.block_scratch_bytes(p), parallel,
                  [&](int64_t i, char* scratch) {
                      const int64_t unit = i / p.tiles % units;
                      k.block_attend(p, i / p.tiles / units, {unit * sharing, (unit + 1) * sharing},
                                     p.tiles - 1 - i % p.tiles, scratch);
                  });
    return {out, lse};
}

}  // namespace sparse_attn
