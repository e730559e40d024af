// How a kernel meets its host: functions in a table, one table per op and instruction set, found by name.
//
// Every file in cpu/kernels is compiled once per instruction set with SPARSE_ATTN_ISA naming it, and ends in
//
//     SPARSE_ATTN_KERNELS(op, Type) = {.scratch_bytes = …, .run = …};
//
// The host of the op says SPARSE_ATTN_FIND_KERNELS(op, Type) (cpu/isa.h) and calls op_kernels().
//
// Files here use no inline function or template of the standard library: the linker keeps one copy of such
// code, and it could be the copy that was compiled for an instruction set which this machine lacks.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace sparse_attn::cpu {

struct Range {
    int64_t begin, end;
};

// All that most ops need: a task, and how much scratch a thread must have for it.
template <class Params, class Task = int64_t>
struct Kernel {
    int64_t (*scratch_bytes)(const Params&);
    void (*run)(const Params&, Task, void* scratch);
};

}  // namespace sparse_attn::cpu

// In the namespace of the instruction set. The function has the type in its name: a host that takes the table
// for another type is not linked.
#define SPARSE_ATTN_KERNELS(op, ...)        \
    extern const __VA_ARGS__ op##_table;    \
    void find_##op(const __VA_ARGS__*& t) { \
        t = &op##_table;                    \
    }                                       \
    const __VA_ARGS__ op##_table
