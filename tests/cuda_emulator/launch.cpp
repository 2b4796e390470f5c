/* A launch: checks it, runs its blocks one by one, and turns a fault into an error. */
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "scheduler.hpp"

#include "launch.hpp"

namespace emulator {

/* ---- memory: stacks and shared memory end in pages that nobody may touch */

static size_t page_size() { return (size_t)sysconf(_SC_PAGESIZE); }

static char *reserve(size_t bytes) {
    void *const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : static_cast<char *>(p);
}

static bool make_room() {
    static char *shared_end;
    if (!machine.stacks) {
        const size_t page = page_size(), room = (SHARED_BYTES + page - 1) / page * page;
        char *const shared = reserve(room + page);
        machine.stacks = reserve(MAX_THREADS * STACK_BYTES);
        if (!shared || !machine.stacks)
            return false;
        shared_end = shared + room;
        mprotect(shared_end, page, PROT_NONE);
        for (u32 i = 0; i < MAX_THREADS; i++) /* a stack grows down */
            mprotect(machine.stacks + i * STACK_BYTES, page, PROT_NONE);
    }
    machine.shared = shared_end - (machine.shared_bytes + 127) / 128 * 128;
    return true;
}

/* ---- faults */

static const int FAULTS[] = {SIGSEGV, SIGBUS, SIGFPE};
static struct sigaction former_actions[3];

static void on_fault(int signal, siginfo_t *info, void *context) {
    if (machine.current == &machine.main) {
        for (int i = 0; i < 3; i++)
            sigaction(FAULTS[i], &former_actions[i], nullptr);
        return; /* not a kernel's: the instruction faults again, for whoever was there before */
    }
#ifdef __x86_64__
    machine.place = (uintptr_t)static_cast<ucontext_t *>(context)->uc_mcontext.gregs[REG_RIP];
#else
    (void)context;
#endif
    fail("%s at address %p", signal == SIGFPE ? "arithmetic fault" : "memory fault", info->si_addr);
}

/* Handlers that are there for a launch only; faults are taken on a stack of their own. */
struct Faults {
    stack_t former_stack;
    std::vector<char> stack = std::vector<char>(64 * 1024);

    Faults() {
        stack_t own = {};
        own.ss_sp = stack.data(), own.ss_size = stack.size();
        sigaltstack(&own, &former_stack);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        /* The handler leaves by switching stacks and never returns: nothing may stay blocked. */
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; i++)
            sigaction(FAULTS[i], &action, &former_actions[i]);
    }
    ~Faults() {
        for (int i = 0; i < 3; i++)
            sigaction(FAULTS[i], &former_actions[i], nullptr);
        sigaltstack(&former_stack, nullptr);
    }
};

/* ---- blocks */

/* Where the kernel's shared object lies. */
static int find_image(dl_phdr_info *info, size_t, void *) {
    const uintptr_t inside = (uintptr_t)machine.kernel;
    uintptr_t begin = UINTPTR_MAX, end = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD)
            continue;
        begin = std::min<uintptr_t>(begin, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
        end = std::max<uintptr_t>(end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr +
                                           info->dlpi_phdr[i].p_memsz);
    }
    if (begin <= inside && inside < end)
        machine.image_begin = begin, machine.image_end = end;
    return 0;
}

static std::vector<u64> order_of_blocks(u64 count) {
    std::vector<u64> order(count);
    for (u64 i = 0; i < count; i++)
        order[i] = machine.order == Order::ASCENDING ? i : count - 1 - i;
    for (u64 i = count; i > 1 && machine.order == Order::RANDOM; i--)
        std::swap(order[i - 1], order[random_number() % i]);
    return order;
}

static bool valid(const Launch &launch) {
    const Kernel &kernel = *launch.kernel;
    const u64 threads = (u64)launch.block.x * launch.block.y * launch.block.z;
    const size_t statics = (size_t)(kernel.shared_end - kernel.shared_begin);
    const Index g = launch.grid;
    const char *wrong = nullptr;
    if (launch.params_size != kernel.params_size)
        wrong = "the parameters are not of the kernel's size";
    else if (!threads || threads > kernel.max_threads || threads > MAX_THREADS)
        wrong = "more threads than the kernel's launch bounds, or none";
    else if (launch.shared_bytes + statics > SHARED_BYTES)
        wrong = "more shared memory than a block can have";
    else if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
        wrong = "a grid that is empty or too large";
    if (wrong)
        snprintf(machine.error, sizeof machine.error,
                 "invalid launch: %s (grid %u,%u,%u; %llu threads; %u + %zu bytes shared; "
                 "parameters of %u bytes, the kernel's are %u)",
                 wrong, g.x, g.y, g.z, threads, launch.shared_bytes, statics, launch.params_size,
                 kernel.params_size);
    return !wrong;
}

static bool run_grid(const Launch &launch) {
    const Faults faults;
    const Index grid = launch.grid;
    for (const u64 i : order_of_blocks((u64)grid.x * grid.y * grid.z)) {
        const u64 row = i / grid.x;
        machine.block_index = {(u32)(i % grid.x), (u32)(row % grid.y), (u32)(row / grid.y)};
        if (!run_block())
            return false;
    }
    return true;
}

} // namespace emulator

/* 0, or 1 after an error; kv_emulator_error then says which. Not for two threads at once. */
extern "C" int kv_emulator_launch(const emulator::Launch *launch) {
    using emulator::machine;
    machine.error[0] = 0;
    machine.failed = false;
    if (!valid(*launch))
        return 1;
    machine.kernel = launch->kernel;
    machine.params = launch->params;
    machine.grid = launch->grid, machine.block = launch->block;
    machine.num_threads = launch->block.x * launch->block.y * launch->block.z;
    machine.shared_bytes = launch->shared_bytes;
    machine.order = (emulator::Order)launch->order;
    machine.random_state = launch->seed * 0x9E3779B97F4A7C15ull | 1;
    machine.current = &machine.main;
    machine.place = 0;
    dl_iterate_phdr(emulator::find_image, nullptr);
    if (!emulator::make_room()) {
        snprintf(machine.error, sizeof machine.error, "no memory for the stacks of the threads");
        return 1;
    }
    emulator::checker_launch(launch->check != 0, launch->num_ranges, launch->begins, launch->ends,
                             launch->writable);
    return emulator::run_grid(*launch) ? 0 : 1;
}

extern "C" const char *kv_emulator_error() { return emulator::machine.error; }
