/* What a step means for each pool, as the data plane reads it. */
#include <string.h>

#include "step.h"

void kv_step_fill_plans(kv_step *step) {
    const kv_cache *cache = step->cache;
    for (int32_t p = 0; p < cache->num_pools; p++) {
        const kv_step_pool *part = &step->pools[p];
        const int32_t raw = cache->pools[p].raw;
        step->plans[p] = (kv_plan){
            .block_size = cache->pools[p].block_size,
            .num_sequences = step->num_sequences,
            .num_tokens = step->num_tokens,
            .max_new = step->max_new,
            .query_starts = step->buffer,
            .seq_lens = step->buffer + step->num_sequences + 1,
            .slots = part->slots,
            .num_copies = (int32_t)part->num_copies,
            .copies = part->copies,
            .num_new_blocks = (int32_t)part->num_new_blocks,
            .new_blocks = part->new_blocks,
            .block_rows = part->block_rows,
            .buffer = step->buffer,
            .buffer_size = step->buffer_size,
            .raw = raw == KV_NO_POOL ? NULL : &step->plans[raw],
            .num_restores = (int32_t)part->num_restores,
            .restores = part->restores,
        };
    }
}

kv_status kv_step_get_plan(const kv_step *step, int32_t group, kv_plan *out) {
    if (!step || !out) {
        return KV_ERR_NULL;
    }
    if (!step->open) {
        return KV_ERR_STEP_CLOSED;
    }
    if (group < 0 || group >= step->cache->num_pools) {
        return KV_ERR_RANGE;
    }
    *out = step->plans[group];
    return KV_OK;
}

kv_status kv_plan_block_tables(const kv_plan *plan, int32_t *out, int32_t width) {
    if (!plan || !out || !plan->block_rows) {
        return KV_ERR_NULL;
    }
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        if (kv_columns(plan->seq_lens[s], plan->block_size) > width) {
            return KV_ERR_RANGE;
        }
    }
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        int32_t *row = out + (size_t)s * (size_t)width;
        const int32_t columns = kv_columns(plan->seq_lens[s], plan->block_size);
        memcpy(row, plan->block_rows[s], (size_t)columns * sizeof *row);
        for (int32_t i = columns; i < width; i++) {
            row[i] = -1;
        }
    }
    return KV_OK;
}
