/* What a launch is told; mirrored by runtime.py. */
#pragma once
#include "words.hpp"

#include "library.hpp"

namespace emulator {

struct Launch {
    const Kernel *kernel;
    const void *params;
    u32 params_size;
    Index grid, block;
    u32 shared_bytes;
    s32 order;
    u32 check; /* with these arrays, sorted by address */
    u64 seed;
    const u64 *begins, *ends;
    const u8 *writable;
    u32 num_ranges;
};

void checker_launch(bool on, u32 num_ranges, const u64 *begins, const u64 *ends,
                    const u8 *writable);

} // namespace emulator
