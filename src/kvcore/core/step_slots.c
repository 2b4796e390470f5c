/* What a step takes from the pools: blocks for new tokens, for copies on write and for raw rows that
 * a truncate or fork had left released. Counting comes first, so that nothing changes in vain. */
#include "step.h"

/* ---- count ------------------------------------------------------------------------------------ */

/* Whether the rows that share the first new token's block of KV_RAW_BLOCK_SIZE will be restored: they
 * were encoded together, and will be again. */
static int seals_again(const kv_step *step, int32_t group, int32_t i) {
    const kv_cache *cache = step->cache;
    const int32_t raw = cache->pools[group].raw, length = step->sequences[i].old_length;
    return raw != KV_NO_POOL && length % KV_RAW_BLOCK_SIZE != 0 &&
           !kv_row_holds(&cache->pools[raw], &kv_step_state(step, i)->rows[raw],
                         length / KV_RAW_BLOCK_SIZE);
}

/* Whether the first new token goes into a block that is to be copied first: one that others read, or
 * one whose rows are encoded anew, since a rollback must find them as they were. */
static int must_copy(const kv_step *step, int32_t p, int32_t i) {
    const kv_pool *pool = &step->cache->pools[p];
    const int32_t length = step->sequences[i].old_length, column = length / pool->block_size;
    const kv_block_row *row = &kv_step_state(step, i)->rows[p];
    if (length % pool->block_size == 0 || !kv_row_holds(pool, row, column)) {
        return 0;
    }
    return kv_pool_is_shared(pool, row->blocks[column]) || seals_again(step, p, i);
}

static void count_pool(kv_step *step, int32_t p) {
    const kv_pool *pool = &step->cache->pools[p];
    kv_step_pool *part = &step->pools[p];
    part->num_copies = part->num_new_blocks = part->num_restores = 0;
    for (int32_t i = 0; i < step->num_sequences; i++) {
        kv_step_sequence *entry = &step->sequences[i];
        const kv_lost_columns lost =
            kv_row_lost(pool, &kv_step_state(step, i)->rows[p], entry->old_length);
        const int restores = lost.first < lost.stop ? lost.stop - lost.first : 0;
        const int copies = must_copy(step, p, i);
        entry->copy_pools |= (uint32_t)copies << p;
        part->num_copies += copies;
        part->num_restores += restores;
        part->num_new_blocks += copies + restores +
                                kv_columns(entry->old_length + entry->num_new, pool->block_size) -
                                kv_columns(entry->old_length, pool->block_size);
    }
}

kv_status kv_step_count_blocks(kv_step *step, kv_shortage *shortage) {
    for (int32_t p = 0; p < step->cache->num_pools; p++) {
        count_pool(step, p);
        const int64_t available = kv_pool_available(&step->cache->pools[p]);
        if (step->pools[p].num_new_blocks > available) {
            if (shortage) {
                *shortage = (kv_shortage){p, step->pools[p].num_new_blocks, available};
            }
            return KV_ERR_OUT_OF_BLOCKS;
        }
    }
    return KV_OK;
}

kv_status kv_step_reserve_buffer(kv_step *step) {
    const int32_t pools = step->cache->num_pools;
    const int64_t sequences = step->num_sequences;
    int64_t size = 2 * sequences + 1;
    for (int32_t p = 0; p < pools; p++) {
        const kv_step_pool *part = &step->pools[p];
        size +=
            step->num_tokens + 3 * (part->num_copies + part->num_new_blocks + part->num_restores);
    }
    if (!kv_step_make_room((void **)&step->buffer, &step->buffer_capacity, size,
                           sizeof *step->buffer) ||
        !kv_step_make_room((void **)&step->pointers, &step->pointer_capacity, pools * sequences,
                           sizeof *step->pointers)) {
        return KV_ERR_NO_MEMORY;
    }
    step->buffer_size = size;
    int32_t *next = step->buffer + 2 * sequences + 1;
    for (int32_t p = 0; p < pools; p++) {
        kv_step_pool *part = &step->pools[p];
        part->slots = next;
        part->copies = part->slots + step->num_tokens;
        part->new_blocks = part->copies + 3 * part->num_copies;
        part->restores = part->new_blocks + 3 * part->num_new_blocks;
        next = part->restores + 3 * part->num_restores;
        part->block_rows = step->pointers + p * sequences;
    }
    return KV_OK;
}

/* ---- take ------------------------------------------------------------------------------------- */

typedef struct plan_writer {
    kv_step *step;
    int32_t pool;
    int32_t *slot, *copy, *new_block, *restore;
} plan_writer;

static void put3(int32_t **out, int32_t a, int32_t b, int32_t c) {
    (*out)[0] = a;
    (*out)[1] = b;
    (*out)[2] = c;
    *out += 3;
}

static int32_t take_block(plan_writer *writer, kv_block_row *row, int32_t i, int32_t column) {
    const int32_t block = kv_cache_take_block(writer->step->cache, writer->pool);
    row->blocks[column] = block;
    put3(&writer->new_block, i, column, block);
    return block;
}

static void restore_lost(plan_writer *writer, kv_block_row *row, int32_t i) {
    const kv_pool *pool = &writer->step->cache->pools[writer->pool];
    const int32_t length = writer->step->sequences[i].old_length, size = pool->block_size;
    const kv_lost_columns lost = kv_row_lost(pool, row, length);
    for (int32_t column = lost.first; column < lost.stop; column++) {
        const int32_t left = length - column * size;
        take_block(writer, row, i, column);
        put3(&writer->restore, i, column, left < size ? left : size);
    }
    if (lost.first < lost.stop) {
        row->first = lost.first;
    }
}

static void copy_on_write(plan_writer *writer, kv_block_row *row, int32_t i) {
    kv_pool *pool = &writer->step->cache->pools[writer->pool];
    const int32_t length = writer->step->sequences[i].old_length;
    const int32_t column = length / pool->block_size, from = row->blocks[column];
    /* The old one is still held, by this step now, until commit or rollback. */
    const int32_t to = take_block(writer, row, i, column);
    put3(&writer->copy, from, to, length % pool->block_size);
    pool->copies++;
}

static void write_slots(plan_writer *writer, const int32_t *blocks, int32_t block_size,
                        int32_t start, int32_t stop) {
    for (int32_t position = start; position < stop; position++) {
        *writer->slot++ = blocks[position / block_size] * block_size + position % block_size;
    }
}

static void take_pool_slots(kv_step *step, int32_t p) {
    const int32_t block_size = step->cache->pools[p].block_size;
    kv_step_pool *part = &step->pools[p];
    plan_writer writer = {step, p, part->slots, part->copies, part->new_blocks, part->restores};
    for (int32_t i = 0; i < step->num_sequences; i++) {
        const kv_step_sequence *entry = &step->sequences[i];
        const int32_t stop = entry->old_length + entry->num_new;
        kv_block_row *row = &kv_step_state(step, i)->rows[p];
        restore_lost(&writer, row, i);
        if (entry->copy_pools >> p & 1) {
            copy_on_write(&writer, row, i);
        }
        while (row->count < kv_columns(stop, block_size)) {
            take_block(&writer, row, i, row->count);
            row->count++;
        }
        write_slots(&writer, row->blocks, block_size, entry->old_length, stop);
        part->block_rows[i] = row->blocks;
    }
}

void kv_step_take_slots(kv_step *step) {
    for (int32_t p = 0; p < step->cache->num_pools; p++) {
        take_pool_slots(step, p);
    }
}

/* ---- give back, or keep ------------------------------------------------------------------------ */

static void return_pool_slots(kv_step *step, int32_t p) {
    kv_pool *pool = &step->cache->pools[p];
    const kv_step_pool *part = &step->pools[p];
    int64_t copy = part->num_copies;
    for (int64_t n = part->num_new_blocks - 1; n >= 0; n--) {
        const int32_t i = part->new_blocks[3 * n], column = part->new_blocks[3 * n + 1];
        const int32_t block = part->new_blocks[3 * n + 2];
        kv_block_row *row = &kv_step_state(step, i)->rows[p];
        kv_pool_release(pool, block);
        if (copy > 0 && part->copies[3 * (copy - 1) + 1] == block) {
            row->blocks[column] = part->copies[3 * --copy];
        } else if (column >= kv_columns(step->sequences[i].old_length, pool->block_size)) {
            row->count--;
        } else { /* restored */
            row->blocks[column] = KV_NO_BLOCK;
            row->first = column + 1 > row->first ? column + 1 : row->first;
        }
    }
}

void kv_step_return_slots(kv_step *step) {
    for (int32_t p = step->cache->num_pools - 1; p >= 0; p--) {
        return_pool_slots(step, p);
    }
}

void kv_step_keep_slots(kv_step *step) {
    for (int32_t p = 0; p < step->cache->num_pools; p++) {
        kv_pool *pool = &step->cache->pools[p];
        const kv_step_pool *part = &step->pools[p];
        for (int64_t c = 0; c < part->num_copies; c++) {
            kv_pool_release(pool, part->copies[3 * c]);
        }
        for (int64_t r = 0; r < part->num_restores; r++) {
            pool->reencoded_rows += part->restores[3 * r + 2];
        }
    }
}
