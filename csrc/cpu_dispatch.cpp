#include "cpu_dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace sparse_attn::cpu {

#define SPARSE_ATTN_DECLARE(isa)    \
    namespace isa {                 \
    extern const KernelTable table; \
    }
SPARSE_ATTN_DECLARE(generic)
#ifdef SPARSE_ATTN_HAVE_AVX2
SPARSE_ATTN_DECLARE(avx2)
#endif
#ifdef SPARSE_ATTN_HAVE_AVX512
SPARSE_ATTN_DECLARE(avx512)
#endif
#ifdef SPARSE_ATTN_HAVE_AVX512_BF16
SPARSE_ATTN_DECLARE(avx512_bf16)
#endif
#undef SPARSE_ATTN_DECLARE

namespace {

struct Choice {
    const char* name;
    const KernelTable* table;
};

Choice choose() {
    const char* cap = std::getenv("SPARSE_ATTN_CPU_ISA");
    Choice best{"generic", &generic::table};
    bool capped = cap != nullptr && std::string(cap) == "generic";
    bool known = cap == nullptr || capped;
    // In rising order; the cap ends the climb.
    [[maybe_unused]] auto offer = [&](const char* name, bool supported, const KernelTable* table) {
        if (supported && !capped) best = {name, table};
        if (cap != nullptr && std::string(cap) == name) capped = known = true;
    };
#if defined(SPARSE_ATTN_HAVE_X86)
    __builtin_cpu_init();
#ifdef SPARSE_ATTN_HAVE_AVX2
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    offer("avx2", avx2, &avx2::table);
#endif
#ifdef SPARSE_ATTN_HAVE_AVX512
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    offer("avx512", avx512, &avx512::table);
#endif
#ifdef SPARSE_ATTN_HAVE_AVX512_BF16
    bool bf16_and_vnni =
        avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    offer("avx512_bf16", bf16_and_vnni, &avx512_bf16::table);
#endif
#endif
    if (!known)
        throw std::runtime_error("SPARSE_ATTN_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, got " +
                                 std::string(cap));
    return best;
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

const KernelTable& kernels() {
    return *choice().table;
}
std::string isa_name() {
    return choice().name;
}

}  // namespace sparse_attn::cpu
