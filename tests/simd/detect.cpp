// Which of the instruction sets this CPU is found to have (cpu/isa.cpp).
#include <cstdio>
#include <exception>

#include "cpu/isa.h"

int main() {
    try {
        std::printf("%s\n", sparse_attn::cpu::isa_name());
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
    }
    return 0;
}
