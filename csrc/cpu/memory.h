// Large results and scratch: on large pages, where the system gives them on request, and past the caches.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparse_attn {

constexpr int64_t kLargePage = int64_t{1} << 21;

// Memory that is about to be written for the first time: a page fault for every 4 KiB can cost more than what
// is written (five times, for a lookup of 32 MiB). Only whole large pages inside the block are asked for, so
// none of it grows. No effect where the system does not offer them.
inline void prefer_large_pages(void* block, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = kLargePage;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + kPage - 1) / kPage * kPage;
    const uintptr_t end =
        (reinterpret_cast<uintptr_t>(block) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
    if (bytes > 0 && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)block, (void)bytes;
#endif
}

// memcpy that leaves the destination out of the caches: nothing is read before it is overwritten. The thread
// calls finish_copies() before others read it.
inline void copy_around_caches(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
        for (int64_t i = 0; i < bytes; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
        return;
    }
#endif
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

inline void finish_copies() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace sparse_attn
