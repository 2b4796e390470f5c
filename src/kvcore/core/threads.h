/* The core's thread pool. The caller takes part; workers sleep between calls. */
#ifndef KVCORE_CORE_THREADS_H
#define KVCORE_CORE_THREADS_H

#include <stdint.h>

enum { KV_MAX_THREADS = 256 };

/* Does part `part` of the work that `context` describes. */
typedef void (*kv_part_function)(void *context, int32_t part);

/* Runs parts 0 .. num_parts - 1, each exactly once, and returns when all are done. Part 0 runs in
 * the caller. When the pool is in use, or has no thread for a part, the caller runs it itself. */
void kv_run_parts(int32_t num_parts, kv_part_function function, void *context);

/* How many parts to cut `work` into: one for each thread, but none smaller than `smallest`. */
int32_t kv_num_parts(int64_t work, int64_t smallest);

/* Where part `part` of `num_parts` begins when `count` items are cut evenly. */
int64_t kv_part_begin(int64_t count, int32_t part, int32_t num_parts);

#endif
