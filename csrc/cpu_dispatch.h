// Which instruction set the CPU kernels run on.
#pragma once

#include <string>

#include "cpu/kernels.h"

namespace sparse_attn::cpu {

// The kernels for the best instruction set that this build holds and this machine has. SPARSE_ATTN_CPU_ISA in
// the environment caps it (for tests and for comparison); read once.
const KernelTable& kernels();

// Its name: "generic", "avx2", "avx512" or "avx512_bf16".
std::string isa_name();

}  // namespace sparse_attn::cpu
