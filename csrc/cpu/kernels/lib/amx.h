// Intel's matrix registers (AMX): eight tiles of 16 rows of 64 bytes, and products of bfloat16 summed in
// float32.
//
//   C [m, 16] += A [m, 32] · B [32, 16]     A: rows of 32 bfloat16     B: 16 rows, of pairs (2k, 2k + 1) of
//   16 columns
//
// Subnormal numbers count as 0. Not the intrinsics: their loads do not tell the compiler that they read
// memory.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__)
#define SPARSE_ATTN_AMX

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// The shapes of this thread's tiles, for as long as it lives: tiles 0 to 5 have `rows` rows (A and C), 6 and
// 7 all 16 (B).
class Tiles {
  public:
    explicit Tiles(int rows) {
        struct alignas(64) Shapes {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } shapes = {};
        shapes.palette = 1;
        for (int i = 0; i < 8; ++i) {
            shapes.bytes[i] = 64;
            shapes.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
        }
        asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

template <int kTile>
SPARSE_ATTN_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
SPARSE_ATTN_INLINE void tile_load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
SPARSE_ATTN_INLINE void tile_store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
SPARSE_ATTN_INLINE void tile_multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
#endif
