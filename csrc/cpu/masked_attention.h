// Attention by dense tiles as other hosts use it: where it is the cheaper way, and its parameters.
#pragma once

#include "cpu/kernels/masked_attention.h"
#include "cpu/packed.h"
#include "cpu/tile_costs.h"

SPARSE_ATTN_FIND_KERNELS(masked_attention, MaskedKernels)
SPARSE_ATTN_FIND_KERNELS(masked_attention_backward, MaskedBackwardKernels)

namespace sparse_attn {

// The keys that a query sees, masked or not.
inline cpu::Range keys_of(const Rule& rule, int64_t b, int64_t query, int64_t key_length) {
    int64_t end = rule.lengths ? rule.lengths[b] : key_length;
    if (rule.is_causal) end = std::clamp<int64_t>(rule.last_key(b, query) + 1, 0, end);
    const int64_t begin = rule.starts.given() ? rule.starts.at(b, query) : 0;
    return {std::clamp<int64_t>(begin, 0, end), end};
}

// A query that keeps fewer keys gathers in the forward, so that its output has the same bits in decoding, in
// a pack, and where its selection is replayed.
constexpr int64_t kFewKept = 512;
// Rows of the backward over fewer keys gather: they cost little either way.
constexpr int64_t kFewKeys = 256;

// Whether tiles can serve such a selection at all. A few queries are another matter (topk_decode.h).
inline bool tiles_take(const SelectParams& p) {
    return p.rule.groups == p.heads && !p.rounded && !p.blocks && p.query_length > kDecodeQueries;
}

// The same of a row of indices that names some keys of a span, without selecting.
bool tiles_pay_for(const TileCosts& c, int64_t named, int64_t span, int64_t width);

// Values of all heads as the kernels want them; p's pointers point to them.
struct PackedValues {
    Memory values, special;
};
PackedValues pack_values(MaskedParams& p, bool parallel);

// Selects and attends by tiles for every query for which that is the cheaper way; those are marked in `done`,
// [B, Tq]. False where there is none.
bool attend_by_tiles(Selection& s, const AttendParams& a, uint32_t* bits, std::vector<uint8_t>& done);

// The gradients of what p.forward attended to, which stand in p with all that they are made of, checked; and
// what of that has to live as long.
struct Gradients {
    Tensor query, key, value, lse;
    std::optional<Tensor> grad_lse;

    std::tuple<Tensor, Tensor, Tensor> all() const { return {query, key, value}; }
};
Gradients new_gradients(MaskedBackwardParams& p, const char* op, const Tensor& query, const Tensor& key,
                        const Tensor& value, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                        const Tensor& out, const Tensor& lse);

// A selection [B, Hq, Tq, bit_words(key_length)] that is given as bits, checked, contiguous.
const uint32_t* bits_of(AttendParams& a, const char* op, const Tensor& bits, int64_t key_length);

// gathered_attention's forward: each block of queries by tiles or by gathering.
void attend_to_indices(const AttendParams& a);

// Its backward by tiles, where that is the cheaper way; false, and nothing is written, where it is not. Takes
// the gradients' pointers and strides of p, and makes what stands behind them.
bool backward_by_tiles(MaskedBackwardParams& p, const int32_t* indices);

// gathered_attention's backward, by tiles or by gathering, whose gradients are set in p (new_gradients).
// `of_more`: `out` and `lse` are of other keys, too, of whose gradients somebody else takes care; float32
// alone.
void gradients_of_indices(MaskedBackwardParams& p, bool of_more);
// The same of a selection that is given as bits, by tiles.
void gradients_of_bits(MaskedBackwardParams& p);

// [B, G, Tq, bit_words(Tk)] bits of the indices; false where a row names a key twice.
bool bits_of_indices(const AttendParams& a, uint32_t* bits, bool parallel);
// Those of the rows `queries` of list b · G + g alone.
bool bits_of_rows(const AttendParams& a, int64_t list, cpu::Range queries, uint32_t* bits);

// The tiles of that backward, whose p.bits are there. `then` is called when the rows are prepared.
using TilesPrepared = std::function<void(MaskedBackwardParams&)>;
void walk_tiles(MaskedBackwardParams& p, bool parallel, const TilesPrepared& then = nullptr);

// select_rows for the queries that are not done, [B, Tq].
void select_rest(Selection& s, int64_t scratch_bytes, const std::vector<uint8_t>* done, const RowsDone& then);

}  // namespace sparse_attn
