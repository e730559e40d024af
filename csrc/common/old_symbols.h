// A call of an old version of a function of glibc, whatever version is new where this is compiled. The link
// sends every call of NAME in the shared object to __wrap_NAME (--wrap, which tools/native.py writes for each
// name that is listed by these macros), and that jumps to the version which every glibc of the architecture
// has.
#pragma once

#include <cstddef>  // defines __GLIBC__

#if defined(__GLIBC__) && defined(__x86_64__)
#define SPARSE_ATTN_JUMP(NAME) "jmp *sparse_attn_first_" #NAME "@GOTPCREL(%rip)"
#define SPARSE_ATTN_FIRST "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define SPARSE_ATTN_JUMP(NAME) "b sparse_attn_first_" #NAME
#define SPARSE_ATTN_FIRST "GLIBC_2.17"
#endif

#if defined(SPARSE_ATTN_JUMP)
#define SPARSE_ATTN_OLD_VERSION(NAME, VERSION)                    \
    asm(".symver sparse_attn_first_" #NAME ", " #NAME "@" VERSION \
        "\n"                                                      \
        ".text\n"                                                 \
        ".globl __wrap_" #NAME                                    \
        "\n"                                                      \
        ".hidden __wrap_" #NAME                                   \
        "\n"                                                      \
        ".type __wrap_" #NAME                                     \
        ", %function\n"                                           \
        "__wrap_" #NAME ":\n" SPARSE_ATTN_JUMP(NAME))
#define SPARSE_ATTN_OLD(NAME) SPARSE_ATTN_OLD_VERSION(NAME, SPARSE_ATTN_FIRST)
#else
#define SPARSE_ATTN_OLD_VERSION(NAME, VERSION) static_assert(true)
#define SPARSE_ATTN_OLD(NAME) static_assert(true)
#endif
