#include "cpu/isa.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sparse_attn::cpu {
namespace {

struct Choice {
    Isa isa;
    const char* name;
};

// One for each instruction set of setup.py.
namespace runs {

bool generic() {
    return true;
}
#if defined(__x86_64__) || defined(__i386__)
[[maybe_unused]] bool avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool avx512() {
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool avx512_bf16() {
    return avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
// Linux hands out the tiles' registers, 8 KB a thread, to processes that ask for them.
[[maybe_unused]] bool amx() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;  // of EDX
    constexpr long kRequest = 0x1023, kTileData = 18;           // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) && (d & kBFloat16) &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace runs

Choice choose() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
#endif
    const char* cap = std::getenv("SPARSE_ATTN_CPU_ISA");
    Choice best{Isa::generic, "generic"};
    bool capped = false;
    // In rising order; the cap ends the climb.
    auto offer = [&](Isa isa, const char* name, bool (*supported)()) {
        if (!capped && supported()) best = {isa, name};
        if (cap != nullptr && std::string(cap) == name) capped = true;
    };
#define SPARSE_ATTN_OFFER(isa, ...) offer(Isa::isa, #isa, runs::isa);
    SPARSE_ATTN_EACH_ISA(SPARSE_ATTN_OFFER, )
#undef SPARSE_ATTN_OFFER
    if (cap != nullptr && !capped)
        throw std::runtime_error(
            "SPARSE_ATTN_CPU_ISA must be generic, avx2, avx512, avx512_bf16 or amx, got " + std::string(cap));
    return best;
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

Isa isa() {
    return choice().isa;
}
const char* isa_name() {
    return choice().name;
}

}  // namespace sparse_attn::cpu
