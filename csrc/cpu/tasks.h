// What every CPU op needs on the host side: aligned memory, and threads that draw tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/tensors.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SPARSE_ATTN_UNWATCHED __attribute__((no_sanitize_thread))
#else
#define SPARSE_ATTN_UNWATCHED
#endif

namespace sparse_attn {

// Work that goes to other threads, or comes back. What torch's threads are made of is not compiled for TSan,
// which therefore does not see that one waits for the other: it is told, and nothing happens in other builds.
struct Handover {
#if defined(__SANITIZE_THREAD__)
    void give() { __tsan_release(this); }
    void take() { __tsan_acquire(this); }
#else
    void give() {}
    void take() {}
#endif
};

struct Free {
    void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

// Uninitialised, on a cache line's boundary.
inline Memory allocate(int64_t bytes) {
    size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    char* p = static_cast<char*>(std::aligned_alloc(64, std::max<size_t>(rounded, 64)));
    if (p == nullptr) throw std::bad_alloc();
    return Memory(p);
}

// Runs task(i, scratch) for every i < count on torch's threads, each with scratch of its own. Threads draw
// the next task from a counter: tasks differ in cost (causal rows see from 1 to T keys), and no result
// depends on who runs it.
template <class F>
void for_each_task(int64_t count, int64_t scratch_bytes, bool parallel, const F& task) {
    if (count == 0) return;
    auto work = [&](std::atomic<int64_t>& next) {
        Memory scratch;
        for (int64_t i = next++; i < count; i = next++) {
            if (!scratch) scratch = allocate(scratch_bytes);
            task(i, scratch.get());
        }
    };
    std::atomic<int64_t> next{0};
    int64_t threads = parallel ? std::min<int64_t>(torch::stable::get_num_threads(), count) : 1;
    if (threads == 1) return work(next);
    Handover there, back;
    there.give();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) SPARSE_ATTN_UNWATCHED {
        there.take();
        for (int64_t i = begin; i < end; ++i) work(next);
        back.give();
    });
    back.take();
}

// Below this many multiply-adds waking the other threads costs more than they save.
inline bool worth_threads(double multiply_adds) {
    return multiply_adds > 1e5;
}

}  // namespace sparse_attn
