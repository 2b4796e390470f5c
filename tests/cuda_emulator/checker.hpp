/* The check mode: races in shared memory, and accesses to memory that is not a kernel's.
 *
 * Kernels are compiled with the compiler's instrumentation for thread sanitizers, whose hooks are
 * checker.cpp's own. Outside of check mode all of these return at once.
 */
#pragma once
#include <cstddef>

#include "words.hpp"

namespace emulator {

/* An access of the current thread to shared memory: compared with the last ones by others. */
void checker_shared(const void *address, u32 bytes, bool write);
/* A copy of the current thread to shared memory, which may write at any time from the one to the
 * other: nobody else is to touch that memory until it is waited for, barriers or not. */
void checker_copy_begins(const void *address, u32 bytes);
void checker_copy_ends(const void *address, u32 bytes);
/* An access of the current thread to memory of the launch. */
void checker_global(const void *address, u32 bytes, bool write);

/* What orders accesses: a new block, a warp's sync, a barrier of these warps. */
void checker_block();
void checker_sync_warp(u32 warp);
void checker_barrier(u32 warps);

bool is_shared(const void *address, u32 bytes);

} // namespace emulator
