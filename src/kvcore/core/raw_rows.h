/* Raw rows: which keys and values of a quantized cache a query reads as bfloat16. */
#ifndef KVCORE_CORE_RAW_ROWS_H
#define KVCORE_CORE_RAW_ROWS_H

#include "kvcore.h"

/* From this key on a query that is stored at `position` reads raw rows. */
static inline int32_t kv_raw_start(const kv_blocks *blocks, int64_t position) {
    const int64_t start = (position + 1) / KV_RAW_BLOCK_SIZE * KV_RAW_BLOCK_SIZE - blocks->raw_last;
    return start > 0 ? (int32_t)start : 0;
}

#endif
