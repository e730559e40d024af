#include "cpu/isa.h"

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
    auto offer = [&](Isa isa, const char* name, bool supported) {
        if (supported && !capped) best = {isa, name};
        if (cap != nullptr && std::string(cap) == name) capped = true;
    };
#define SPARSE_ATTN_OFFER(isa, ...) offer(Isa::isa, #isa, runs::isa());
    SPARSE_ATTN_EACH_ISA(SPARSE_ATTN_OFFER, )
#undef SPARSE_ATTN_OFFER
    if (cap != nullptr && !capped)
        throw std::runtime_error("SPARSE_ATTN_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, got " +
                                 std::string(cap));
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
