// Pieces of one block of memory that the host allocated for a thread.
#pragma once

#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

struct Scratch {
    char* next;
    template <class T>
    SPARSE_ATTN_INLINE T* take(int64_t n) {
        T* p = reinterpret_cast<T*>(next);
        next += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
        return p;
    }
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
