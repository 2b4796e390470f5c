#include "checker.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "launch.hpp"
#include "scheduler.hpp"

namespace emulator {

namespace {

/* Memory that a launch may touch. */
struct Range {
    uintptr_t begin, end;
    bool writable;
};

constexpr u16 NOBODY = 0xffff;

struct Access {
    u16 thread;
    u32 clock; /* of the thread's warp */
};

/* What is remembered of one byte of shared memory. */
struct Shadow {
    Access write, reads[2];
    Access copy; /* under way, of the block with this number */
};

struct Checker {
    bool on;
    std::vector<Range> ranges; /* sorted, apart */
    size_t last_range;
    std::vector<Shadow> shadow; /* dynamic shared memory, then static */
    /* Each warp's clock ticks when its lanes are ordered. An access at clock c of warp b comes
     * before what warp a does now if c <= known[a][b]. */
    u32 clock[MAX_WARPS], known[MAX_WARPS][MAX_WARPS];
    /* Ticks at each barrier of the block; where a thread last wrote global memory, and fenced. */
    u32 barriers;
    u32 block;
    u32 written[MAX_THREADS], fenced[MAX_THREADS];
    bool unfenced[MAX_THREADS];
};

Checker checker;

} // namespace

/* ---- shared memory */

static bool within(const void *address, u32 bytes, const char *begin, const char *end) {
    const char *const p = static_cast<const char *>(address);
    return begin <= p && p + bytes <= end;
}

static bool is_dynamic(const void *address, u32 bytes) {
    return within(address, bytes, machine.shared, machine.shared + machine.shared_bytes);
}

static bool is_static(const void *address, u32 bytes) {
    return within(address, bytes, machine.kernel->shared_begin, machine.kernel->shared_end);
}

bool is_shared(const void *address, u32 bytes) {
    return is_dynamic(address, bytes) || is_static(address, bytes);
}

static bool ordered(const Access &before, const Fiber &now) {
    return before.thread == NOBODY || before.thread == now.number ||
           before.clock <= checker.known[now.warp][before.thread / 32];
}

[[noreturn]] static void race(const char *what, const char *whose, const Access &other) {
    fail("race: shared memory %s what thread %u %s with no barrier between", what, other.thread,
         whose);
}

static void remember_read(Shadow &shadow, Access access) {
    if (shadow.reads[0].thread != access.thread)
        shadow.reads[1] = shadow.reads[0];
    shadow.reads[0] = access;
}

static Shadow *shadow_of(const void *address, u32 bytes) {
    const char *const p = static_cast<const char *>(address);
    return &checker.shadow[is_dynamic(address, bytes)
                               ? (size_t)(p - machine.shared)
                               : SHARED_BYTES + (size_t)(p - machine.kernel->shared_begin)];
}

void checker_shared(const void *address, u32 bytes, bool write) {
    if (!checker.on)
        return;
    const Fiber &self = *machine.current;
    const Access access = {(u16)self.number, checker.clock[self.warp]};
    Shadow *const shadows = shadow_of(address, bytes);
    for (u32 i = 0; i < bytes; i++) {
        Shadow &shadow = shadows[i];
        if (shadow.copy.thread != NOBODY && shadow.copy.clock == checker.block)
            fail("race: shared memory is %s where a copy of thread %u is under way",
                 write ? "written" : "read", shadow.copy.thread);
        if (!ordered(shadow.write, self))
            race(write ? "gets written over" : "gives", "wrote", shadow.write);
        if (!write) {
            remember_read(shadow, access);
            continue;
        }
        for (const Access &read : shadow.reads)
            if (!ordered(read, self))
                race("gets written over", "read", read);
        shadow.write = access;
    }
}

void checker_copy_begins(const void *address, u32 bytes) {
    checker_shared(address, bytes, true);
    for (u32 i = 0; checker.on && i < bytes; i++)
        shadow_of(address, bytes)[i].copy = {(u16)machine.current->number, checker.block};
}

void checker_copy_ends(const void *address, u32 bytes) {
    for (u32 i = 0; checker.on && i < bytes; i++)
        shadow_of(address, bytes)[i].copy.thread = NOBODY;
    checker_shared(address, bytes, true);
}

void checker_block() {
    if (!checker.on)
        return;
    checker.block++;
    for (u32 a = 0; a < machine.num_warps; a++)
        checker.clock[a]++;
    for (u32 a = 0; a < MAX_WARPS; a++)
        for (u32 b = 0; b < MAX_WARPS; b++)
            checker.known[a][b] = checker.clock[b] - 1;
    checker.barriers = 1;
    memset(checker.fenced, 0, sizeof checker.fenced);
    memset(checker.unfenced, 0, sizeof checker.unfenced);
}

void checker_sync_warp(u32 warp) {
    if (checker.on)
        checker.known[warp][warp] = checker.clock[warp]++;
}

void checker_barrier(u32 warps) {
    if (!checker.on)
        return;
    u32 all[MAX_WARPS] = {0};
    const auto in = [&](u32 warp) { return warps >> warp & 1; };
    for (u32 a = 0; a < MAX_WARPS; a++)
        if (in(a))
            checker_sync_warp(a);
    for (u32 a = 0; a < MAX_WARPS; a++)
        for (u32 b = 0; b < MAX_WARPS && in(a); b++)
            all[b] = std::max(all[b], checker.known[a][b]);
    for (u32 a = 0; a < MAX_WARPS; a++)
        if (in(a))
            memcpy(checker.known[a], all, sizeof all);
    checker.barriers++;
}

/* ---- global memory */

static const Range *find_range(uintptr_t begin) {
    const std::vector<Range> &ranges = checker.ranges;
    if (checker.last_range < ranges.size() && ranges[checker.last_range].begin <= begin &&
        begin < ranges[checker.last_range].end)
        return &ranges[checker.last_range];
    const auto after = std::upper_bound(
        ranges.begin(), ranges.end(), begin,
        [](uintptr_t address, const Range &range) { return address < range.begin; });
    if (after == ranges.begin() || (after - 1)->end <= begin)
        return nullptr;
    checker.last_range = (size_t)(after - 1 - ranges.begin());
    return &*(after - 1);
}

void checker_global(const void *address, u32 bytes, bool write) {
    if (!checker.on)
        return;
    const uintptr_t begin = (uintptr_t)address;
    const Range *const range = find_range(begin);
    const char *const what = write ? "write" : "read";
    if (!range || begin + bytes > range->end)
        fail("%s of %u bytes out of bounds of every array", what, bytes);
    if (write && !range->writable)
        fail("write to an array that is read-only");
    if (write) {
        checker.written[machine.current->number] = checker.barriers;
        checker.unfenced[machine.current->number] = true;
    }
}

void fence() {
    checker.fenced[machine.current->number] = checker.barriers;
    checker.unfenced[machine.current->number] = false;
}

/* A count tells other blocks that what this one wrote is there: so all of it must be fenced, by
 * its writer, or after a barrier by the thread that counts. */
s32 atomic_add(s32 *p, s32 v) {
    const u32 self = machine.current->number;
    for (u32 i = 0; checker.on && i < machine.num_threads; i++)
        if (checker.unfenced[i] && checker.written[i] >= checker.fenced[self])
            fail("atomic_add: what thread %u wrote is not fenced", i);
    checker_global(p, sizeof *p, true);
    checker.unfenced[self] = false; /* the counter itself */
    const s32 before = *p;
    *p = before + v;
    return before;
}

/* ---- the hooks */

/* The parameters, a thread's own stack and constants are memory too. */
static bool is_private(uintptr_t address, bool write) {
    const uintptr_t stacks = (uintptr_t)machine.stacks;
    if (address - stacks < MAX_THREADS * STACK_BYTES)
        return true;
    if (write)
        return false;
    return address - (uintptr_t)machine.params < machine.kernel->params_size ||
           (machine.image_begin <= address && address < machine.image_end);
}

static void access(const void *address, u32 bytes, bool write, void *caller) {
    if (!checker.on || machine.current == &machine.main)
        return;
    machine.place = (uintptr_t)caller;
    if (is_shared(address, bytes))
        checker_shared(address, bytes, write);
    else if (!is_private((uintptr_t)address, write))
        checker_global(address, bytes, write);
    machine.place = 0;
}

/* ---- what a launch tells */

void checker_launch(bool on, u32 num_ranges, const u64 *begins, const u64 *ends,
                    const u8 *writable) {
    checker.on = on;
    if (!on)
        return;
    checker.ranges.clear();
    checker.last_range = 0;
    for (u32 i = 0; i < num_ranges; i++)
        checker.ranges.push_back({begins[i], ends[i], writable[i] != 0});
    const size_t statics = (size_t)(machine.kernel->shared_end - machine.kernel->shared_begin);
    const Access nobody = {NOBODY, 0};
    checker.shadow.assign(SHARED_BYTES + statics, {nobody, {nobody, nobody}, nobody});
}

} // namespace emulator

#define KV_HOOK(name, bytes, write)                                           \
    extern "C" void __tsan_##name(void *address) {                            \
        emulator::access(address, bytes, write, __builtin_return_address(0)); \
    }
#define KV_HOOKS(bytes)                          \
    KV_HOOK(read##bytes, bytes, false)           \
    KV_HOOK(write##bytes, bytes, true)           \
    KV_HOOK(unaligned_read##bytes, bytes, false) \
    KV_HOOK(unaligned_write##bytes, bytes, true)
KV_HOOKS(1)
KV_HOOKS(2)
KV_HOOKS(4)
KV_HOOKS(8)
KV_HOOKS(16)
extern "C" void __tsan_read_range(void *address, unsigned long bytes) {
    emulator::access(address, (u32)bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void *address, unsigned long bytes) {
    emulator::access(address, (u32)bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
