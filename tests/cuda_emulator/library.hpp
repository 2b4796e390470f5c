/* What the emulator's library does for the code of a kernel. */
#pragma once

namespace emulator {

struct Index {
    u32 x, y, z;
};

/* The line of the kernel's source that makes a call. */
struct Site {
    const char *file;
    int line;
    constexpr Site(const char *file = __builtin_FILE(), int line = __builtin_LINE())
        : file(file), line(line) {}
};

/* What a compiled source says of one of its entries. */
struct Kernel {
    void (*body)(const void *params);
    u32 params_size, max_threads;
    char *shared_begin, *shared_end; /* its static shared memory */
};

enum class Shuffle { FROM, XOR, DOWN, UP };
enum class Reduction { ADD, MAX, MIN, OR };

/* A thread's own indices never change: that the calls are `const` lets a compiler hoist them. */
Index thread_index() __attribute__((const));
Index block_index() __attribute__((const));
Index block_size() __attribute__((const));
Index grid_size() __attribute__((const));
void *dynamic_shared() __attribute__((const));

void barrier(s32 id, s32 threads, Site site); /* threads 0: all that have not ended */
void sync_warp(Site site);
u64 shuffle(u64 value, Shuffle kind, s32 argument, Site site);
u32 ballot(bool pred, Site site);
s32 reduce(s32 value, Reduction kind, Site site);
void load_matrices(u32 *r, const void *row, bool transposed, Site site);
void multiply_matrices(float *c, const u32 *a, u32 b0, u32 b1, bool bf16, Site site);

void copy_async(void *dst, const void *src, u32 bytes, bool pred);
void commit_copies();
void wait_copies(u32 most);

void fence();
s32 atomic_add(s32 *p, s32 v);

} // namespace emulator
