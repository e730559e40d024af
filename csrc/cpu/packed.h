// Selection for all queries of a call, each part of them the way that suits it: packed sequences are found
// and divided here.
#pragma once

#include "cpu/topk_decode.h"

namespace sparse_attn {

// Some queries of one group, whose rows are there: then(b, group, queries, scratch).
using RowsDone = std::function<void(int64_t, int64_t, cpu::Range, char*)>;

// The row of one group and query is there: then(group, query, pages, scratch), where pages is the table, in
// which the chosen keys' entries are pages that there are.
using PagedRowDone = std::function<void(int64_t, int64_t, const int32_t*, char*)>;

// Of a tensor's element.
inline int64_t bytes_of(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}

// Fills the indices of a call without blocks. `then` is called in the task that chose the last of these keys,
// with scratch_bytes of scratch. Blocks of more than a few queries are done where they are `wanted`, if that
// is given.
void select_rows(Selection& s, int64_t scratch_bytes, const RowsDone& then,
                 const std::function<bool(const Block&)>& wanted = nullptr);

// The same of packed sequences (a rule with a first key and an offset for each query, none of which passes
// the last key) whose keys lie in pages [P, Hkv, size, D]: key j in page table[j / size]. Pages that are not
// there have no keys. An index of the pages, if there is one, serves the sequences of a few queries.
void select_paged(Selection& s, const int32_t* table, int64_t page_size, int64_t page_count,
                  int64_t scratch_bytes, const PagedRowDone& then, const KeyIndexParams& index = {});

}  // namespace sparse_attn
