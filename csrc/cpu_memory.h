// Large results and scratch on large pages, where the system gives them on request.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparse_attn {

// Memory that is about to be written for the first time: a page fault for every 4 KiB can cost more than what
// is written (five times, for a lookup of 32 MiB). Only whole large pages inside the block are asked for, so
// none of it grows. No effect where the system does not offer them.
inline void prefer_large_pages(void* block, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = uintptr_t{1} << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + kPage - 1) / kPage * kPage;
    const uintptr_t end =
        (reinterpret_cast<uintptr_t>(block) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
    if (bytes > 0 && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)block, (void)bytes;
#endif
}

}  // namespace sparse_attn
