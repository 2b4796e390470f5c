/* The threads of one block as fibers: one runs until it has to wait, then another. */
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "words.hpp"

#include "library.hpp"

#if !defined(__x86_64__) || defined(KV_EMULATOR_UCONTEXT)
#define KV_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {

constexpr u32 MAX_THREADS = 1024, MAX_WARPS = 32, NUM_BARRIERS = 16;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr u32 SHARED_BYTES = 227 * 1024; /* of an H100's block */

/* Which thread and which block goes first. */
enum class Order : s32 { ASCENDING, DESCENDING, RANDOM };

enum class Operation { SYNC_WARP, SHUFFLE, BALLOT, REDUCE, LDMATRIX, MMA };

struct AsyncCopy {
    char *dst;
    const char *src;
    u32 bytes;
    bool pred, early;
};

struct Fiber {
    void *stack_pointer;
    Index index;
    u32 number, warp, lane;
    bool done;
    s32 barrier; /* where it waits, or -1 */
    Site site;
    /* Its part of a warp's operation that waits for the others. */
    Operation operation;
    const void *in;
    void *out;
    s64 argument;
    std::vector<AsyncCopy> open_group;
    std::vector<std::vector<AsyncCopy>> groups; /* committed, oldest first */
#ifdef KV_UCONTEXT
    ucontext_t context;
#endif
};

struct Barrier {
    u32 arrived;
    s32 needed;
    Site site;
};

struct Machine {
    Fiber fibers[MAX_THREADS];
    Fiber main;
    Fiber *current;
    u32 num_threads, num_warps, num_live;
    /* A bit for each lane; of those arrived, that wait for the rest at an operation of their warp. */
    u32 ready[MAX_WARPS], live[MAX_WARPS], arrived[MAX_WARPS];
    u32 ready_warps;
    Barrier barriers[NUM_BARRIERS];
    Index grid, block, block_index;
    char *stacks;
    char *shared;
    u32 shared_bytes;
    const Kernel *kernel;
    const void *params;
    Order order;
    u64 random_state;
    uintptr_t image_begin, image_end; /* of the kernel's shared object */
    uintptr_t place;                  /* in it, of the access or fault at hand; or 0 */
    bool failed;
    char error[640];
};

extern Machine machine;

u32 random_number();
/* Ends the launch: says what, and which block and thread; does not return. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Runs others until someone makes this thread ready again. */
void wait();
void wake(u32 warp, u32 lanes);
/* All threads of a block, from start to end; false where one failed. */
bool run_block();

} // namespace emulator
