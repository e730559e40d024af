// The simulated device: its memory, the scheduler of one block's threads, and the checks of every access.
//
// Memory is one arena in which allocations lie far apart, so that an access beside one of them hits nothing
// and is seen. Each 2 bytes of it have a shadow: whether they are allocated, whether anything was written to
// them, and who wrote and read them last. Two accesses of different threads, one of them a write and not both
// atomic, are a race unless a __syncthreads (of their block) or a __syncwarp (of their warp) lies between.
// An error ends the launch.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "simt.h"

extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
)");

namespace simt {

int64_t shared_limit = 99 * 1024;  // of compute capability 8.6, 8.9 and 12.0, the smallest that is supported

namespace {

constexpr size_t kArena = size_t{128} << 20, kGap = 64 << 10, kStack = 128 << 10;
constexpr size_t kMostShared = 256 << 10;

// ---- shadow

struct Stamp {            // one access; serial 0: none
    uint32_t serial = 0;  // of the block, counted over all launches
    uint16_t thread = 0;
    bool atomic = false;
    uint32_t block_phase = 0, warp_phase = 0;
};
struct Shadow {
    bool allocated, written;
    Stamp write, read[2];  // readers: two different threads, the last ones
};

unsigned char* arena = nullptr;
Shadow* shadow = nullptr;                 // one per 2 bytes
size_t used = kGap + kMostShared + kGap;  // the block's shared memory lies first, after a gap
size_t shared_bytes = 0;

void* reserve(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
void start() {
    if (arena) return;
    arena = static_cast<unsigned char*>(reserve(kArena));
    shadow = static_cast<Shadow*>(reserve(kArena / 2 * sizeof(Shadow)));
}
void set_shadow(size_t offset, size_t bytes, bool allocated, bool written) {
    Shadow fresh{};
    fresh.allocated = allocated, fresh.written = written;
    std::fill(shadow + offset / 2, shadow + (offset + bytes + 1) / 2, fresh);
}

// ---- threads

enum class State { kReady, kBlock, kWarp, kDone };

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    size_t size, valid;
};
struct Fiber {
    void* sp;
    State state;
    Place place;
    int index;
    std::vector<std::vector<Copy>> copies;  // groups, the last one open
};
struct Warp {
    const char* operation = nullptr;
    unsigned mask = 0, arrived = 0;
    int parity = 0;
    uint32_t phase = 0;
    char slots[2][32 * 64];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<void*> stacks;
Fiber* running = nullptr;
void* scheduler_sp = nullptr;
const std::function<void()>* body = nullptr;
uint32_t serial = 0, launch_start = 0, block_phase = 0;
int at_barrier = 0;
std::string error;      // the first one, until simt_reset()
unsigned schedule = 0;  // 0: threads in order; 1: the last one first; else the seed of a random order
std::mt19937 dice;

std::string name_of(const Place& p) {
    char text[120];
    std::snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u)", p.block.x, p.block.y,
                  p.block.z, p.thread.x, p.thread.y, p.thread.z);
    return text;
}

void to_scheduler() {
    Fiber* self = running;
    simt_switch(&self->sp, scheduler_sp);
}

// Ends the launch: the scheduler sees the text, and no thread runs again.
void fail(std::string text) {
    if (error.empty()) error = (running ? name_of(running->place) + ": " : "") + text;
    if (running) to_scheduler();
}

Stamp stamp_of(bool atomic) {
    Stamp s;
    s.serial = serial, s.thread = running->index, s.atomic = atomic;
    s.block_phase = block_phase, s.warp_phase = warps[running->index / 32].phase;
    return s;
}

bool conflict(const Stamp& before, const Stamp& now) {
    if (before.serial < launch_start || before.serial == 0) return false;
    if (before.atomic && now.atomic) return false;
    if (before.serial != now.serial) return true;  // blocks of one launch have no order
    if (before.thread == now.thread || before.block_phase != now.block_phase) return false;
    return before.thread / 32 != now.thread / 32 || before.warp_phase == now.warp_phase;
}

std::string address(size_t offset) {
    char text[64];
    const bool in_shared = offset < kGap + kMostShared + kGap;
    std::snprintf(text, sizeof text, "%s memory at byte %zd", in_shared ? "shared" : "device",
                  static_cast<ptrdiff_t>(offset) - static_cast<ptrdiff_t>(in_shared ? kGap : 0));
    return text;
}

void access(const void* p, size_t size, bool write, bool atomic, bool aligned) {
    const size_t offset = static_cast<const unsigned char*>(p) - arena;
    if (!arena || offset >= kArena) return;  // registers, parameters, the host's memory
    if (!running) return fail("the host reads or writes " + address(offset));
    if (schedule > 1 && dice() % 256 == 0) to_scheduler();
    const char* verb = write ? "write" : "read";
    if (aligned && offset % size)
        return fail(std::string("misaligned ") + verb + " of " + std::to_string(size) + " bytes of " +
                    address(offset));
    const Stamp now = stamp_of(atomic);
    for (size_t at = offset / 2; at < (offset + size + 1) / 2; ++at) {
        Shadow& s = shadow[at];
        if (!s.allocated)
            return fail(std::string("out of bounds: ") + verb + " of " + std::to_string(size) + " bytes of " +
                        address(offset));
        if ((!write || atomic) && !s.written)
            return fail("read of " + address(offset) + ", where nothing was written");
        bool race = conflict(s.write, now);
        if (write)
            for (const Stamp& r : s.read) race |= conflict(r, now);
        if (race)
            return fail(std::string("race: ") + verb + " of " + address(offset) +
                        " and an access of another thread, with no barrier between");
        if (write) {
            s.write = now, s.written = true;
        } else if (s.read[0].serial == now.serial && s.read[0].thread == now.thread) {
            s.read[0] = now;
        } else {
            s.read[1] = s.read[0], s.read[0] = now;
        }
    }
}

void thread_main() {
    (*body)();
    Fiber* self = running;
    for (const auto& group : self->copies)
        if (!group.empty()) fail("the thread ends while asynchronous copies are in flight");
    self->state = State::kDone;
    to_scheduler();
    __builtin_unreachable();
}

void prepare(Fiber& f, int index) {
    while (static_cast<int>(stacks.size()) <= index) stacks.push_back(reserve(kStack));
    // The stack as simt_switch leaves it: six registers, then where to go. `call` leaves it 8 off 16.
    void** top = reinterpret_cast<void**>(static_cast<char*>(stacks[index]) + kStack) - 2;
    *top = reinterpret_cast<void*>(&thread_main);
    f.sp = top - 6;
    f.state = State::kReady;
    f.index = index;
    f.copies.clear();
}

bool run_block() {
    std::vector<Fiber*> ready;
    const int count = static_cast<int>(fibers.size());
    for (;;) {
        ready.clear();
        int done = 0;
        for (Fiber& f : fibers) {
            if (f.state == State::kReady) ready.push_back(&f);
            done += f.state == State::kDone;
        }
        if (done == count) return true;
        if (ready.empty()) {
            const Fiber* waits = nullptr;
            for (Fiber& f : fibers)
                if (f.state != State::kDone && !waits) waits = &f;
            error = name_of(waits->place) + " waits at " +
                    (waits->state == State::kBlock ? "__syncthreads" : warps[waits->index / 32].operation) +
                    ", which other threads do not reach";
            return false;
        }
        if (schedule == 1) std::reverse(ready.begin(), ready.end());
        if (schedule > 1) std::shuffle(ready.begin(), ready.end(), dice);
        for (Fiber* f : ready) {
            running = f;
            simt_switch(&scheduler_sp, f->sp);
            running = nullptr;
            if (!error.empty()) return false;
        }
    }
}

}  // namespace

const Place& here() {
    return running->place;
}
const char* last_error() {
    return error.c_str();
}
unsigned char* dynamic_shared() {
    return arena + kGap;
}

void block_barrier() {
    running->state = State::kBlock;
    if (++at_barrier == static_cast<int>(fibers.size())) {
        at_barrier = 0;
        ++block_phase;
        for (Fiber& f : fibers) f.state = State::kReady;
    } else {
        to_scheduler();
    }
}

const char* exchange(const char* operation, unsigned mask, const void* mine, size_t size) {
    Warp& w = warps[running->index / 32];
    const int lane = running->place.lane;
    if (!w.arrived) {
        w.operation = operation, w.mask = mask;
    } else if (w.mask != mask || std::strcmp(w.operation, operation)) {
        fail(std::string("divergent warp: ") + operation + " while other lanes are at " + w.operation);
    }
    if (!(mask >> lane & 1)) fail(std::string(operation) + ": the lane is not in its own mask");
    const int parity = w.parity;
    std::memcpy(w.slots[parity] + 64 * lane, mine, size);
    w.arrived |= 1u << lane;
    if (w.arrived == w.mask) {
        w.arrived = 0;
        w.parity ^= 1;
        // The other collectives order no memory accesses.
        if (!std::strcmp(operation, "__syncwarp")) ++w.phase;
        const int first = running->index / 32 * 32;
        const int last = std::min<int>(first + 32, fibers.size());
        for (int i = first; i < last; ++i)
            if (fibers[i].state == State::kWarp) fibers[i].state = State::kReady;
    } else {
        running->state = State::kWarp;
        to_scheduler();
    }
    return w.slots[parity];
}

void warp_barrier(unsigned mask) {
    exchange("__syncwarp", mask, "", 1);
}

void atomic_access(const void* p, size_t size) {
    access(p, size, true, true, true);
}

void check(bool holds, const char* what) {
    if (!holds) fail(std::string("assertion failed: ") + what);
}

// An asynchronous copy: what it writes is undefined from now until its thread waits for it.
void copy_async(void* to, const void* from, size_t size, size_t valid) {
    access(to, size, true, false, true);
    if (valid) access(from, valid, false, false, false);
    if (valid && reinterpret_cast<uintptr_t>(from) % size) fail("misaligned source of an asynchronous copy");
    const size_t offset = static_cast<unsigned char*>(to) - arena;
    for (size_t at = offset / 2; at < (offset + size) / 2; ++at) shadow[at].written = false;
    if (running->copies.empty()) running->copies.emplace_back();
    running->copies.back().push_back(
        {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), size, valid});
}
void commit_copies() {
    if (running->copies.empty()) running->copies.emplace_back();
    running->copies.emplace_back();
}
void wait_copies(unsigned pending) {
    auto& groups = running->copies;
    while (groups.size() > pending + 1) {
        for (const Copy& c : groups.front()) {
            access(c.to, c.size, true, false, true);
            std::memset(c.to, 0, c.size);
            std::memcpy(c.to, c.from, c.valid);
        }
        groups.erase(groups.begin());
    }
}

bool launch(dim3 grid, dim3 block, size_t bytes, const std::function<void()>& thread) {
    start();
    if (!error.empty()) return false;
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (!threads || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 ||
        bytes > static_cast<size_t>(shared_limit)) {
        error = "invalid configuration: grid " + std::to_string(grid.x) + " × " + std::to_string(grid.y) +
                " × " + std::to_string(grid.z) + ", " + std::to_string(threads) + " threads, " +
                std::to_string(bytes) + " bytes of shared memory";
        return false;
    }
    body = &thread;
    launch_start = serial + 1;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t n = 0; n < blocks; ++n) {
        const uint64_t b = schedule == 1 ? blocks - 1 - n : n;
        ++serial;
        block_phase = 0, at_barrier = 0;
        set_shadow(kGap, shared_bytes, false, false);
        set_shadow(kGap, bytes, true, false);
        shared_bytes = bytes;
        std::memset(arena + kGap, 0xff, bytes);
        warps.assign((threads + 31) / 32, Warp());
        fibers.resize(threads);
        for (size_t i = 0; i < threads; ++i) {
            prepare(fibers[i], static_cast<int>(i));
            const unsigned x = i % block.x, y = i / block.x % block.y, z = i / block.x / block.y;
            const unsigned bx = b % grid.x, by = b / grid.x % grid.y;
            const unsigned bz = b / grid.x / grid.y;
            fibers[i].place = {{x, y, z}, {bx, by, bz}, block, grid, static_cast<int>(i % 32)};
        }
        if (!run_block()) return false;
    }
    return true;
}

}  // namespace simt

cudaError_t cudaMemsetAsync(void* p, int byte, size_t size, cudaStream_t) {
    std::memset(p, byte, size);
    simt::set_shadow(static_cast<unsigned char*>(p) - simt::arena, size, true, true);
    return cudaSuccess;
}

// ---- for the tests

extern "C" {

// `bytes` of device memory, poisoned, between gaps; null when there is no more.
void* simt_allocate(size_t bytes) {
    simt::start();
    const size_t offset = simt::used, taken = (bytes + 255) / 256 * 256 + simt::kGap;
    if (offset + taken > simt::kArena) return nullptr;
    simt::used += taken;
    simt::set_shadow(offset, bytes, true, false);
    std::memset(simt::arena + offset, 0xff, bytes);
    return simt::arena + offset;
}
// Frees all memory and forgets the error.
void simt_reset() {
    simt::start();
    simt::error.clear();
    const size_t first = simt::kGap + simt::kMostShared + simt::kGap;
    simt::set_shadow(first, simt::used - first, false, false);
    simt::used = first;
}
void simt_upload(void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    simt::set_shadow(static_cast<unsigned char*>(to) - simt::arena, bytes, true, true);
}
// Whether all of it was written.
bool simt_download(void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    const size_t offset = static_cast<const unsigned char*>(from) - simt::arena;
    for (size_t at = offset / 2; at < (offset + bytes + 1) / 2; ++at)
        if (!simt::shadow[at].written) return false;
    return true;
}
void simt_schedule(unsigned schedule) {
    simt::schedule = schedule;
    simt::dice.seed(schedule);
}
const char* simt_error() {
    return simt::last_error();
}

// What gcc's -fsanitize=thread calls at every access.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_read_range(void* p, size_t size) {
    if (size) simt::access(p, size, false, false, false);
}
void __tsan_write_range(void* p, size_t size) {
    if (size) simt::access(p, size, true, false, false);
}
#define HOOKS(size)                                 \
    void __tsan_read##size(void* p) {               \
        simt::access(p, size, false, false, true);  \
    }                                               \
    void __tsan_write##size(void* p) {              \
        simt::access(p, size, true, false, true);   \
    }                                               \
    void __tsan_unaligned_read##size(void* p) {     \
        simt::access(p, size, false, false, false); \
    }                                               \
    void __tsan_unaligned_write##size(void* p) {    \
        simt::access(p, size, true, false, false);  \
    }                                               \
    void __tsan_volatile_read##size(void* p) {      \
        simt::access(p, size, false, false, true);  \
    }                                               \
    void __tsan_volatile_write##size(void* p) {     \
        simt::access(p, size, true, false, true);   \
    }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
}
