// Which copy of the CPU kernels runs here: the host's way to the tables of cpu/kernels.
#pragma once

#include "common/export.h"
#include "compiled_isas.h"  // written by the build: SPARSE_ATTN_EACH_ISA(X, …) is X(generic, …) X(avx2, …) …

namespace sparse_attn::cpu {

// Those that this build holds, in rising order.
#define SPARSE_ATTN_ENUMERATOR(isa, ...) isa,
enum class Isa { SPARSE_ATTN_EACH_ISA(SPARSE_ATTN_ENUMERATOR, ) };
#undef SPARSE_ATTN_ENUMERATOR

// The best that this build holds and this machine has. SPARSE_ATTN_CPU_ISA in the environment caps it (for
// tests and for comparison); read once.
Isa isa();

// Its name: "generic", "avx2", "avx512", "avx512_bf16" or "amx"; on 64-bit ARM "neon", "neon_dot" or
// "neon_bf16".
SPARSE_ATTN_EXPORT const char* isa_name();

}  // namespace sparse_attn::cpu

// Weak: a set that has kernels for some ops alone leaves the others to the set below it.
#define SPARSE_ATTN_DECLARE_FIND(isa, op, ...)         \
    namespace isa {                                    \
    [[gnu::weak]] void find_##op(const __VA_ARGS__*&); \
    }
#define SPARSE_ATTN_NAME_FIND(isa, op) isa::find_##op,

// Outside of all namespaces: makes cpu::op_kernels(), the table of type `…` that cpu/kernels fills.
#define SPARSE_ATTN_FIND_KERNELS(op, ...)                                                          \
    namespace sparse_attn::cpu {                                                                   \
    SPARSE_ATTN_EACH_ISA(SPARSE_ATTN_DECLARE_FIND, op, __VA_ARGS__)                                \
    inline const __VA_ARGS__& op##_kernels() {                                                     \
        using Table = const __VA_ARGS__;                                                           \
        static void (*const kFind[])(Table*&) = {SPARSE_ATTN_EACH_ISA(SPARSE_ATTN_NAME_FIND, op)}; \
        int at = static_cast<int>(isa());                                                          \
        while (kFind[at] == nullptr) --at;                                                         \
        Table* table = nullptr;                                                                    \
        kFind[at](table);                                                                          \
        return *table;                                                                             \
    }                                                                                              \
    }
