#include "block_pool.h"

#include <stdlib.h>

kv_status kv_pool_init(kv_pool *pool, const kv_group_config *config) {
    const int32_t size = config->block_size, count = config->num_blocks;
    if (size < 16 || size > 4096 || (size & (size - 1)) != 0 || count < 1 ||
        config->retention < 0 || config->slack < 0) {
        return KV_ERR_VALUE;
    }
    /* Slots are int32: block * block_size + offset. */
    if ((int64_t)size * count > INT32_MAX) {
        return KV_ERR_OVERFLOW;
    }
    *pool = (kv_pool){.block_size = size,
                      .num_blocks = count,
                      .retention = config->retention,
                      .slack = config->slack,
                      .raw = KV_NO_POOL,
                      .source = KV_NO_POOL,
                      .num_free = count};
    pool->oldest = pool->newest = -1;
    const size_t n = (size_t)count;
    pool->refcounts = calloc(n, sizeof *pool->refcounts);
    pool->generations = calloc(n, sizeof *pool->generations);
    pool->nodes = malloc(n * sizeof *pool->nodes);
    pool->free_stack = malloc(n * sizeof *pool->free_stack);
    pool->older = malloc(n * sizeof *pool->older);
    pool->newer = malloc(n * sizeof *pool->newer);
    if (!pool->refcounts || !pool->generations || !pool->nodes || !pool->free_stack ||
        !pool->older || !pool->newer) {
        kv_pool_destroy(pool);
        return KV_ERR_NO_MEMORY;
    }
    for (int32_t i = 0; i < count; i++) {
        pool->nodes[i] = KV_NO_NODE;
        pool->free_stack[i] = count - 1 - i; /* a new cache hands out 0, 1, 2, ... */
    }
    return KV_OK;
}

kv_status kv_pool_init_raw(kv_pool *pool, const kv_group_config *config, int32_t source) {
    const int32_t first = config->raw_first, last = config->raw_last;
    if (first < 0 || first > KV_RAW_BLOCK_SIZE || last < 0 || last % KV_RAW_BLOCK_SIZE != 0) {
        return KV_ERR_VALUE;
    }
    /* The rows of a block that is not full yet stay in any case: they are still to be encoded. */
    const kv_group_config own = {.block_size = KV_RAW_BLOCK_SIZE,
                                 .num_blocks = config->raw_blocks,
                                 .retention = last > 0 ? last : 1,
                                 .slack = config->slack};
    const kv_status status = kv_pool_init(pool, &own);
    pool->pinned = first > 0;
    pool->source = source;
    return status;
}

void kv_pool_destroy(kv_pool *pool) {
    free(pool->refcounts);
    free(pool->generations);
    free(pool->nodes);
    free(pool->free_stack);
    free(pool->older);
    free(pool->newer);
    *pool = (kv_pool){0};
}

static void push_free(kv_pool *pool, int32_t block) { pool->free_stack[pool->num_free++] = block; }

static void push_cached(kv_pool *pool, int32_t block) {
    pool->older[block] = pool->newest;
    pool->newer[block] = -1;
    if (pool->newest >= 0) {
        pool->newer[pool->newest] = block;
    } else {
        pool->oldest = block;
    }
    pool->newest = block;
    pool->num_cached++;
}

static void remove_cached(kv_pool *pool, int32_t block) {
    const int32_t older = pool->older[block], newer = pool->newer[block];
    if (older >= 0) {
        pool->newer[older] = newer;
    } else {
        pool->oldest = newer;
    }
    if (newer >= 0) {
        pool->older[newer] = older;
    } else {
        pool->newest = older;
    }
    pool->num_cached--;
}

int32_t kv_pool_take(kv_pool *pool) {
    const int32_t block = pool->free_stack[--pool->num_free];
    pool->refcounts[block] = 1;
    pool->generations[block]++;
    pool->allocations++;
    return block;
}

void kv_pool_retain(kv_pool *pool, int32_t block) {
    if (pool->refcounts[block]++ == 0) {
        remove_cached(pool, block);
    }
}

void kv_pool_release(kv_pool *pool, int32_t block) {
    if (--pool->refcounts[block] > 0) {
        return;
    }
    if (pool->nodes[block] != KV_NO_NODE) {
        push_cached(pool, block);
    } else {
        push_free(pool, block);
    }
}

kv_block_handle kv_pool_handle(const kv_pool *pool, int32_t block) {
    return (kv_block_handle){.block = block, .generation = pool->generations[block]};
}

int kv_pool_is_current(const kv_pool *pool, kv_block_handle handle) {
    return pool->generations[handle.block] == handle.generation;
}

void kv_pool_list(kv_pool *pool, int32_t block, int32_t node) { pool->nodes[block] = node; }

void kv_pool_unlist(kv_pool *pool, int32_t block) {
    pool->nodes[block] = KV_NO_NODE;
    if (pool->refcounts[block] == 0) {
        remove_cached(pool, block);
        push_free(pool, block);
    }
}
