/* kv_cache_check: recounts the books from the sequences up. */
#include <stdio.h>
#include <stdlib.h>

#include "cache.h"
#include "step.h"

static void count_holds(const kv_cache *cache, int32_t group, int32_t *holds) {
    for (int32_t s = 0; s < cache->sequences.count; s++) {
        const kv_sequence_state *state = &cache->sequences.states[s];
        const kv_block_row *row = &state->rows[group];
        for (int32_t i = 0; state->live && i < row->count; i++) {
            if (kv_row_holds(&cache->pools[group], row, i)) {
                holds[row->blocks[i]]++;
            }
        }
    }
    for (const kv_step *step = cache->open_steps; step; step = step->next) {
        const kv_step_pool *part = &step->pools[group];
        for (int64_t c = 0; c < part->num_copies; c++) {
            holds[part->copies[3 * c]]++;
        }
    }
}

static const char *check_free(const kv_pool *pool, int32_t *seen) {
    for (int32_t i = 0; i < pool->num_free; i++) {
        const int32_t block = pool->free_stack[i];
        if (pool->refcounts[block] != 0 || pool->nodes[block] != KV_NO_NODE || seen[block]++) {
            return "the free list has a block that is in use, cached or listed twice";
        }
    }
    return NULL;
}

static const char *check_cached(const kv_pool *pool, int32_t *seen) {
    int32_t count = 0;
    for (int32_t block = pool->oldest; block >= 0; block = pool->newer[block]) {
        if (pool->refcounts[block] != 0 || pool->nodes[block] == KV_NO_NODE || seen[block]++ ||
            ++count > pool->num_cached) {
            return "the cached list has a block that is in use, free or listed twice";
        }
    }
    return count == pool->num_cached ? NULL : "the cached list is shorter than its count";
}

static const char *check_pool(const kv_cache *cache, int32_t group, int32_t *scratch) {
    const kv_pool *pool = &cache->pools[group];
    int32_t *holds = scratch, *seen = scratch + pool->num_blocks;
    int32_t in_use = 0;
    count_holds(cache, group, holds);
    for (int32_t block = 0; block < pool->num_blocks; block++) {
        if (holds[block] != pool->refcounts[block]) {
            return "a block's reference count differs from the sequences that hold it";
        }
        in_use += holds[block] > 0;
    }
    if (in_use + pool->num_cached + pool->num_free != pool->num_blocks) {
        return "in use + cached + free is not the total";
    }
    const char *wrong = check_free(pool, seen);
    return wrong ? wrong : check_cached(pool, seen);
}

static const char *check_row(const kv_pool *pool, const kv_sequence_state *state,
                             const kv_block_row *row) {
    if (!state->step && row->count != kv_columns(state->length, pool->block_size)) {
        return "a sequence has more or fewer blocks than its length needs";
    }
    const kv_lost_columns lost = kv_row_lost(pool, row, state->length);
    if (row->first < 0 || (lost.first < lost.stop && pool->source == KV_NO_POOL)) {
        return "a sequence has released blocks that its next token may read";
    }
    for (int32_t i = 0; i < row->count; i++) {
        const int32_t block = row->blocks[i];
        if (kv_row_holds(pool, row, i) ? block < 0 || block >= pool->num_blocks
                                       : block != KV_NO_BLOCK) {
            return "a sequence holds a released block, or misses one that is not";
        }
    }
    return NULL;
}

static const char *check_rows(const kv_cache *cache) {
    for (int32_t s = 0; s < cache->sequences.count; s++) {
        const kv_sequence_state *state = &cache->sequences.states[s];
        for (int32_t g = 0; state->live && g < cache->num_pools; g++) {
            const char *wrong = check_row(&cache->pools[g], state, &state->rows[g]);
            if (wrong) {
                return wrong;
            }
        }
    }
    return NULL;
}

static kv_status check_locked(const kv_cache *cache, char *message, size_t message_size) {
    const char *wrong = check_rows(cache); /* first: the blocks that rows name are counted next */
    for (int32_t g = 0; g < cache->num_pools && !wrong; g++) {
        int32_t *scratch = calloc(2 * (size_t)cache->pools[g].num_blocks, sizeof *scratch);
        if (!scratch) {
            return KV_ERR_NO_MEMORY;
        }
        const char *unbalanced = check_pool(cache, g, scratch);
        free(scratch);
        if (unbalanced) {
            snprintf(message, message_size, "group %d: %s", (int)g, unbalanced);
            return KV_ERR_CORRUPT;
        }
    }
    wrong = wrong ? wrong : kv_prefix_check(&cache->prefixes);
    if (wrong) {
        snprintf(message, message_size, "%s", wrong);
        return KV_ERR_CORRUPT;
    }
    return KV_OK;
}

kv_status kv_cache_check(const kv_cache *cache, char *message, size_t message_size) {
    if (!cache || (!message && message_size > 0)) {
        return KV_ERR_NULL;
    }
    kv_cache_lock(cache);
    const kv_status status = check_locked(cache, message, message_size);
    kv_cache_unlock(cache);
    return status;
}
