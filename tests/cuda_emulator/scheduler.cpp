#include "scheduler.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "checker.hpp"

namespace emulator {

Machine machine;

u32 random_number() {
    u64 &x = machine.random_state;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return (u32)(x >> 32);
}

/* ---- switching stacks */

#ifdef KV_UCONTEXT
static void switch_to(Fiber *next) {
    Fiber *const self = machine.current;
    machine.current = next;
    swapcontext(&self->context, &next->context);
}
#else
/* Saves what the calling convention asks a function to preserve, and takes up the other stack. */
asm(R"(
.text
.type kv_emulator_switch, @function
kv_emulator_switch:
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
.size kv_emulator_switch, . - kv_emulator_switch
)");
extern "C" void kv_emulator_switch(void **save, void *next) __attribute__((visibility("hidden")));

static void switch_to(Fiber *next) {
    Fiber *const self = machine.current;
    machine.current = next;
    kv_emulator_switch(&self->stack_pointer, next->stack_pointer);
}
#endif

/* ---- who runs next */

static u32 choose_bit(u32 mask) {
    if (machine.order == Order::ASCENDING)
        return (u32)__builtin_ctz(mask);
    if (machine.order == Order::DESCENDING)
        return 31 - (u32)__builtin_clz(mask);
    const u32 turn = random_number() & 31;
    const u32 turned = mask >> turn | (turn ? mask << (32 - turn) : 0);
    return ((u32)__builtin_ctz(turned) + turn) & 31;
}

/* A thread of the same warp where one is ready, unless the order is random. */
static Fiber *next_fiber() {
    if (!machine.ready_warps)
        return &machine.main;
    u32 warp = machine.current == &machine.main ? 0 : machine.current->warp;
    if (machine.order == Order::RANDOM || !machine.ready[warp])
        warp = choose_bit(machine.ready_warps);
    return &machine.fibers[warp * 32 + choose_bit(machine.ready[warp])];
}

static void not_ready(const Fiber *fiber) {
    machine.ready[fiber->warp] &= ~(1u << fiber->lane);
    if (!machine.ready[fiber->warp])
        machine.ready_warps &= ~(1u << fiber->warp);
}

void wake(u32 warp, u32 lanes) {
    machine.ready[warp] |= lanes;
    if (lanes)
        machine.ready_warps |= 1u << warp;
}

void wait() {
    not_ready(machine.current);
    switch_to(next_fiber());
}

void fail(const char *format, ...) {
    constexpr int ROOM = sizeof machine.error - 120;
    const Fiber *const self = machine.current;
    const Index b = machine.block_index, t = self->index;
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(machine.error, ROOM, format, arguments);
    va_end(arguments);
    n = n < ROOM ? n : ROOM - 1;
    n += snprintf(machine.error + n, sizeof machine.error - (size_t)n,
                  " [block %u,%u,%u thread %u,%u,%u]", b.x, b.y, b.z, t.x, t.y, t.z);
    if (machine.image_begin <= machine.place && machine.place < machine.image_end)
        snprintf(machine.error + n, sizeof machine.error - (size_t)n, " at +0x%llx",
                 (u64)(machine.place - machine.image_begin));
    machine.failed = true;
    switch_to(&machine.main);
    __builtin_unreachable();
}

/* ---- barriers */

static void release(Barrier &barrier, s32 id) {
    u32 warps = 0;
    barrier.arrived = 0;
    for (u32 i = 0; i < machine.num_threads; i++) {
        Fiber &fiber = machine.fibers[i];
        if (fiber.done || fiber.barrier != id)
            continue;
        fiber.barrier = -1;
        warps |= 1u << fiber.warp;
        wake(fiber.warp, 1u << fiber.lane);
    }
    checker_barrier(warps);
}

void barrier(s32 id, s32 threads, Site site) {
    Fiber *const self = machine.current;
    if (id < 0 || id >= (s32)NUM_BARRIERS || threads % 32)
        fail("%s:%d: a barrier of id %d for %d threads", site.file, site.line, id, threads);
    Barrier &barrier = machine.barriers[id];
    if (barrier.arrived && (barrier.site.line != site.line || barrier.needed != threads))
        fail("divergent barrier: threads of one block wait at %s:%d and at line %d", site.file,
             site.line, barrier.site.line);
    barrier.site = self->site = site;
    barrier.needed = threads;
    self->barrier = id;
    if (++barrier.arrived >= (threads ? (u32)threads : machine.num_live))
        release(barrier, id);
    else
        wait();
}

/* ---- a block */

static void end_of_thread() {
    Fiber *const self = machine.current;
    wait_copies(0);
    self->done = true;
    machine.live[self->warp] &= ~(1u << self->lane);
    machine.num_live--;
    Barrier &barrier = machine.barriers[0];
    if (barrier.arrived && barrier.arrived >= machine.num_live)
        release(barrier, 0);
    wait();
}

static void thread_entry() {
    machine.kernel->body(machine.params);
    end_of_thread();
    __builtin_unreachable();
}

static void start_fiber(u32 number) {
    Fiber &fiber = machine.fibers[number];
    const Index size = machine.block;
    char *const stack = machine.stacks + number * STACK_BYTES;
    fiber.index = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
    fiber.number = number, fiber.warp = number / 32, fiber.lane = number % 32;
    fiber.done = false, fiber.barrier = -1;
    fiber.open_group.clear(), fiber.groups.clear();
    machine.live[fiber.warp] |= 1u << fiber.lane;
#ifdef KV_UCONTEXT
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_entry, 0);
#else
    /* The six registers that a switch takes up, the entry, and a return address that aligns it. */
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(thread_entry);
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    fiber.stack_pointer = top;
#endif
}

static void report_deadlock() {
    for (u32 i = 0; i < machine.num_threads; i++) {
        const Fiber &fiber = machine.fibers[i];
        if (fiber.done)
            continue;
        const Index b = machine.block_index;
        snprintf(machine.error, sizeof machine.error,
                 "deadlock: %u threads never end; this one waits at %s:%d for %s that others never "
                 "reach [block %u,%u,%u thread %u]",
                 machine.num_live, fiber.site.file, fiber.site.line,
                 fiber.barrier >= 0 ? "a barrier" : "an operation of its warp", b.x, b.y, b.z, i);
        machine.failed = true;
        return;
    }
}

bool run_block() {
    machine.num_warps = (machine.num_threads + 31) / 32;
    machine.num_live = machine.num_threads;
    machine.ready_warps = 0;
    memset(machine.ready, 0, sizeof machine.ready);
    memset(machine.live, 0, sizeof machine.live);
    memset(machine.arrived, 0, sizeof machine.arrived);
    for (Barrier &barrier : machine.barriers)
        barrier.arrived = 0;
    /* NaN in every float type: what a kernel reads unwritten shows. */
    memset(machine.shared, 0xff, machine.shared_bytes);
    std::fill(machine.kernel->shared_begin, machine.kernel->shared_end, '\xff');
    checker_block();
    for (u32 i = 0; i < machine.num_threads; i++)
        start_fiber(i);
    for (u32 warp = 0; warp < machine.num_warps; warp++)
        wake(warp, machine.live[warp]);
    machine.current = &machine.main;
    switch_to(next_fiber());
    if (!machine.failed && machine.num_live)
        report_deadlock();
    return !machine.failed;
}

/* ---- indices */

Index thread_index() { return machine.current->index; }
Index block_index() { return machine.block_index; }
Index block_size() { return machine.block; }
Index grid_size() { return machine.grid; }
void *dynamic_shared() { return machine.shared; }

} // namespace emulator
