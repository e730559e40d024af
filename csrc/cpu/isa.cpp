#include "cpu/isa.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
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

// One for each instruction set of tools/isas.py.
namespace runs {

[[maybe_unused]] bool generic() {
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
#elif defined(__aarch64__)
// By the names that the kernel has for them: Linux's bits of AT_HWCAP or AT_HWCAP2, macOS' words.
bool has([[maybe_unused]] unsigned long kind, [[maybe_unused]] int bit, [[maybe_unused]] const char* word) {
#if defined(__linux__)
    return (getauxval(kind) >> bit & 1) != 0;
#elif defined(__APPLE__)
    int there = 0;
    size_t size = sizeof there;
    return sysctlbyname(word, &there, &size, nullptr, 0) == 0 && there != 0;
#else
    return false;
#endif
}
constexpr unsigned long kFirst = 16, kSecond = 26;  // AT_HWCAP, AT_HWCAP2

[[maybe_unused]] bool neon() {
    return true;
}
[[maybe_unused]] bool neon_dot() {
    return has(kFirst, 20, "hw.optional.arm.FEAT_DotProd");
}
[[maybe_unused]] bool neon_bf16() {
    return neon_dot() && has(kSecond, 13, "hw.optional.arm.FEAT_I8MM") &&
           has(kSecond, 14, "hw.optional.arm.FEAT_BF16");
}
#endif

}  // namespace runs

Choice choose() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
#endif
    const char* cap = std::getenv("SPARSE_ATTN_CPU_ISA");
    Choice best{};
    std::string names;
    bool capped = false;
    // In rising order; the cap ends the climb.
    auto offer = [&](Isa isa, const char* name, bool (*supported)()) {
        if (!capped && supported()) best = {isa, name};
        if (cap != nullptr && std::string(cap) == name) capped = true;
        names += (names.empty() ? "" : ", ") + std::string(name);
    };
#define SPARSE_ATTN_OFFER(isa, ...) offer(Isa::isa, #isa, runs::isa);
    SPARSE_ATTN_EACH_ISA(SPARSE_ATTN_OFFER, )
#undef SPARSE_ATTN_OFFER
    if (cap != nullptr && !capped)
        throw std::runtime_error("SPARSE_ATTN_CPU_ISA must be one of " + names + ", got " + cap);
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
