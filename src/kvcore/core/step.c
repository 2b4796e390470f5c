#include "step.h"

#include <stdlib.h>
#include <string.h>

/* ---- memory: steps keep their buffers and are used again -------------------------------------- */

void kv_step_free_memory(kv_step *step) {
    free(step->sequences);
    free(step->groups);
    free(step->appended);
    free(step->buffer);
    free(step->pointers);
    free(step);
}

static kv_step *new_step(kv_cache *cache) {
    kv_step *step = calloc(1, sizeof *step);
    if (!step) {
        return NULL;
    }
    step->cache = cache;
    step->groups = calloc((size_t)cache->num_groups, sizeof *step->groups);
    step->appended = calloc((size_t)cache->num_layers, sizeof *step->appended);
    if (!step->groups || !step->appended) {
        kv_step_free_memory(step);
        return NULL;
    }
    return step;
}

static kv_step *acquire_step(kv_cache *cache) {
    kv_step *step = cache->spare_steps;
    if (!step) {
        return new_step(cache);
    }
    cache->spare_steps = step->next;
    step->next = NULL;
    return step;
}

static void recycle_step(kv_step *step) {
    step->next = step->cache->spare_steps;
    step->cache->spare_steps = step;
}

/* Old contents are not kept. */
static int make_room(void **array, int64_t *capacity, int64_t wanted, size_t element_size) {
    if (wanted <= *capacity) {
        return 1;
    }
    const int64_t grown = wanted + wanted / 2;
    void *fresh = malloc((size_t)grown * element_size);
    if (!fresh) {
        return 0;
    }
    free(*array);
    *array = fresh;
    *capacity = grown;
    return 1;
}

/* ---- begin: count, reserve, and only then change anything ------------------------------------- */

static kv_sequence_state *state_of(const kv_step *step, int32_t i) {
    return &step->cache->sequences.states[step->sequences[i].place];
}

static void unlock_sequences(kv_step *step, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        state_of(step, i)->step = NULL;
    }
}

static kv_status lock_sequence(kv_step *step, const kv_step_entry *entry, int32_t i) {
    kv_cache *cache = step->cache;
    int32_t place;
    const kv_status status = kv_sequences_find(&cache->sequences, entry->sequence, &place);
    if (status != KV_OK) {
        return status;
    }
    kv_sequence_state *state = &cache->sequences.states[place];
    if (state->step) {
        return state->step == step ? KV_ERR_DUPLICATE_SEQUENCE : KV_ERR_SEQUENCE_BUSY;
    }
    if (entry->num_new < 1) {
        return KV_ERR_VALUE;
    }
    if (entry->num_new > INT32_MAX - state->length ||
        entry->num_new > INT32_MAX - step->num_tokens) {
        return KV_ERR_OVERFLOW;
    }
    step->sequences[i] = (kv_step_sequence){
        .place = place,
        .old_length = state->length,
        .num_new = entry->num_new,
        .has_tokens = entry->tokens && state->num_known == state->length,
    };
    state->step = step;
    step->num_tokens += entry->num_new;
    step->max_new = entry->num_new > step->max_new ? entry->num_new : step->max_new;
    return KV_OK;
}

static kv_status lock_sequences(kv_step *step, const kv_step_entry *entries, int32_t count) {
    int64_t capacity = step->sequence_capacity;
    if (!make_room((void **)&step->sequences, &capacity, count, sizeof *step->sequences)) {
        return KV_ERR_NO_MEMORY;
    }
    step->sequence_capacity = (int32_t)(capacity < INT32_MAX ? capacity : INT32_MAX);
    step->num_tokens = step->max_new = 0;
    for (int32_t i = 0; i < count; i++) {
        const kv_status status = lock_sequence(step, &entries[i], i);
        if (status != KV_OK) {
            unlock_sequences(step, i);
            return status;
        }
    }
    step->num_sequences = count;
    return KV_OK;
}

/* Whether the first new token goes into a block that others read, which is then copied first. */
static int must_copy(const kv_step *step, int32_t group, int32_t i) {
    const kv_pool *pool = &step->cache->pools[group];
    const int32_t length = step->sequences[i].old_length;
    if (length % pool->block_size == 0) {
        return 0;
    }
    const int32_t last = state_of(step, i)->rows[group].blocks[length / pool->block_size];
    return kv_pool_is_shared(pool, last);
}

static void count_group(kv_step *step, int32_t group) {
    const int32_t block_size = step->cache->pools[group].block_size;
    kv_step_group *part = &step->groups[group];
    part->num_copies = part->num_new_blocks = 0;
    for (int32_t i = 0; i < step->num_sequences; i++) {
        kv_step_sequence *entry = &step->sequences[i];
        const int copies = must_copy(step, group, i);
        entry->copy_groups |= (uint32_t)copies << group;
        part->num_copies += copies;
        part->num_new_blocks += copies +
                                kv_columns(entry->old_length + entry->num_new, block_size) -
                                kv_columns(entry->old_length, block_size);
    }
}

static kv_status count_blocks(kv_step *step, kv_shortage *shortage) {
    for (int32_t g = 0; g < step->cache->num_groups; g++) {
        count_group(step, g);
        const int64_t available = kv_pool_available(&step->cache->pools[g]);
        if (step->groups[g].num_new_blocks > available) {
            if (shortage) {
                *shortage = (kv_shortage){g, step->groups[g].num_new_blocks, available};
            }
            return KV_ERR_OUT_OF_BLOCKS;
        }
    }
    return KV_OK;
}

static kv_status reserve_rows(kv_step *step) {
    for (int32_t i = 0; i < step->num_sequences; i++) {
        const kv_step_sequence *entry = &step->sequences[i];
        kv_sequence_state *state = state_of(step, i);
        const int32_t length = entry->old_length + entry->num_new;
        kv_status status = entry->has_tokens ? kv_tokens_reserve(state, length) : KV_OK;
        for (int32_t g = 0; g < step->cache->num_groups && status == KV_OK; g++) {
            const int32_t block_size = step->cache->pools[g].block_size;
            status = kv_row_reserve(&state->rows[g], kv_columns(length, block_size));
        }
        if (status != KV_OK) {
            return status;
        }
    }
    return KV_OK;
}

static kv_status reserve_buffer(kv_step *step) {
    const int32_t groups = step->cache->num_groups;
    const int64_t sequences = step->num_sequences;
    int64_t size = 2 * sequences + 1;
    for (int32_t g = 0; g < groups; g++) {
        const kv_step_group *part = &step->groups[g];
        size += step->num_tokens + 3 * (part->num_copies + part->num_new_blocks);
    }
    if (!make_room((void **)&step->buffer, &step->buffer_capacity, size, sizeof *step->buffer) ||
        !make_room((void **)&step->pointers, &step->pointer_capacity, groups * sequences,
                   sizeof *step->pointers)) {
        return KV_ERR_NO_MEMORY;
    }
    step->buffer_size = size;
    int32_t *next = step->buffer + 2 * sequences + 1;
    for (int32_t g = 0; g < groups; g++) {
        kv_step_group *part = &step->groups[g];
        part->slots = next;
        part->copies = part->slots + step->num_tokens;
        part->new_blocks = part->copies + 3 * part->num_copies;
        next = part->new_blocks + 3 * part->num_new_blocks;
        part->block_rows = step->pointers + g * sequences;
    }
    return KV_OK;
}

typedef struct plan_writer {
    int32_t *slot, *copy, *new_block;
} plan_writer;

static void put_block(plan_writer *writer, kv_block_row *row, int32_t i, int32_t column,
                      int32_t block) {
    row->blocks[column] = block;
    *writer->new_block++ = i;
    *writer->new_block++ = column;
    *writer->new_block++ = block;
}

static void copy_on_write(kv_step *step, int32_t group, int32_t i, plan_writer *writer) {
    kv_cache *cache = step->cache;
    const int32_t block_size = cache->pools[group].block_size;
    const int32_t length = step->sequences[i].old_length;
    kv_block_row *row = &state_of(step, i)->rows[group];
    const int32_t column = length / block_size, from = row->blocks[column];
    const int32_t to = kv_cache_take_block(cache, group);
    *writer->copy++ = from; /* still held, by this step now, until commit or rollback */
    *writer->copy++ = to;
    *writer->copy++ = length % block_size;
    put_block(writer, row, i, column, to);
    cache->pools[group].copies++;
}

static void write_slots(plan_writer *writer, const int32_t *blocks, int32_t block_size,
                        int32_t start, int32_t stop) {
    for (int32_t position = start; position < stop; position++) {
        *writer->slot++ = blocks[position / block_size] * block_size + position % block_size;
    }
}

static void reserve_slots(kv_step *step, int32_t group) {
    kv_cache *cache = step->cache;
    const int32_t block_size = cache->pools[group].block_size;
    kv_step_group *part = &step->groups[group];
    plan_writer writer = {part->slots, part->copies, part->new_blocks};
    for (int32_t i = 0; i < step->num_sequences; i++) {
        const kv_step_sequence *entry = &step->sequences[i];
        const int32_t stop = entry->old_length + entry->num_new;
        kv_block_row *row = &state_of(step, i)->rows[group];
        if (entry->copy_groups >> group & 1) {
            copy_on_write(step, group, i, &writer);
        }
        while (row->count < kv_columns(stop, block_size)) {
            const int32_t column = row->count++;
            put_block(&writer, row, i, column, kv_cache_take_block(cache, group));
        }
        write_slots(&writer, row->blocks, block_size, entry->old_length, stop);
        part->block_rows[i] = row->blocks;
    }
}

static void note_tokens(kv_step *step, const kv_step_entry *entries) {
    int32_t *query_starts = step->buffer;
    int32_t *seq_lens = query_starts + step->num_sequences + 1;
    query_starts[0] = 0;
    for (int32_t i = 0; i < step->num_sequences; i++) {
        const kv_step_sequence *entry = &step->sequences[i];
        query_starts[i + 1] = query_starts[i] + entry->num_new;
        seq_lens[i] = entry->old_length + entry->num_new;
        if (entry->has_tokens) {
            memcpy(state_of(step, i)->tokens + entry->old_length, entries[i].tokens,
                   (size_t)entry->num_new * sizeof *entries[i].tokens);
        }
    }
}

static void open_step(kv_step *step, const kv_step_entry *entries) {
    kv_cache *cache = step->cache;
    note_tokens(step, entries);
    for (int32_t g = 0; g < cache->num_groups; g++) {
        reserve_slots(step, g);
    }
    memset(step->appended, 0, (size_t)cache->num_layers);
    step->open = 1;
    step->previous = NULL;
    step->next = cache->open_steps;
    if (step->next) {
        step->next->previous = step;
    }
    cache->open_steps = step;
    cache->num_open_steps++;
}

static kv_status begin(kv_cache *cache, const kv_step_entry *entries, int32_t count, kv_step **out,
                       kv_shortage *shortage) {
    kv_step *step = acquire_step(cache);
    if (!step) {
        return KV_ERR_NO_MEMORY;
    }
    kv_status status = lock_sequences(step, entries, count);
    if (status == KV_OK) {
        status = count_blocks(step, shortage);
        status = status == KV_OK ? reserve_rows(step) : status;
        status = status == KV_OK ? reserve_buffer(step) : status;
        if (status != KV_OK) {
            unlock_sequences(step, count);
        }
    }
    if (status != KV_OK) {
        recycle_step(step);
        return status;
    }
    open_step(step, entries);
    *out = step;
    return KV_OK;
}

kv_status kv_step_begin(kv_cache *cache, const kv_step_entry *entries, int32_t num_entries,
                        kv_step **out, kv_shortage *shortage) {
    if (!cache || !entries || !out) {
        return KV_ERR_NULL;
    }
    if (num_entries < 1) {
        return KV_ERR_VALUE;
    }
    kv_cache_lock(cache);
    const kv_status status = begin(cache, entries, num_entries, out, shortage);
    kv_cache_unlock(cache);
    return status;
}

/* ---- append and attend: what the books must allow --------------------------------------------- */

static kv_status check_layer(const kv_step *step, int32_t layer) {
    if (!step) {
        return KV_ERR_NULL;
    }
    if (!step->open) {
        return KV_ERR_STEP_CLOSED;
    }
    return layer < 0 || layer >= step->cache->num_layers ? KV_ERR_RANGE : KV_OK;
}

kv_status kv_step_check_append(const kv_step *step, int32_t layer) {
    const kv_status status = check_layer(step, layer);
    if (status != KV_OK) {
        return status;
    }
    if (step->cache->layers[layer].kv_source != layer) {
        return KV_ERR_NO_STORAGE;
    }
    return step->appended[layer] ? KV_ERR_ALREADY_APPENDED : KV_OK;
}

kv_status kv_step_mark_appended(kv_step *step, int32_t layer) {
    const kv_status status = kv_step_check_append(step, layer);
    if (status == KV_OK) {
        step->appended[layer] = 1;
    }
    return status;
}

kv_status kv_step_check_attend(const kv_step *step, int32_t layer) {
    const kv_status status = check_layer(step, layer);
    if (status != KV_OK) {
        return status;
    }
    return step->appended[step->cache->layers[layer].kv_source] ? KV_OK : KV_ERR_NOT_APPENDED;
}

/* ---- close ------------------------------------------------------------------------------------ */

static void close_step(kv_step *step) {
    kv_cache *cache = step->cache;
    unlock_sequences(step, step->num_sequences);
    if (step->previous) {
        step->previous->next = step->next;
    } else {
        cache->open_steps = step->next;
    }
    if (step->next) {
        step->next->previous = step->previous;
    }
    step->open = 0;
    cache->num_open_steps--;
    recycle_step(step);
}

/* Undoes reserve_slots in reverse order, so that the pool hands out the same blocks again. */
static void release_slots(kv_step *step, int32_t group) {
    kv_pool *pool = &step->cache->pools[group];
    const kv_step_group *part = &step->groups[group];
    int64_t copy = part->num_copies;
    for (int64_t n = part->num_new_blocks - 1; n >= 0; n--) {
        const int32_t *entry = part->new_blocks + 3 * n;
        kv_block_row *row = &state_of(step, entry[0])->rows[group];
        kv_pool_release(pool, entry[2]);
        const int32_t *pair = part->copies + 3 * (copy - 1);
        if (copy > 0 && pair[1] == entry[2]) {
            row->blocks[entry[1]] = pair[0];
            copy--;
        } else {
            row->count--;
        }
    }
}

static void rollback(kv_step *step) {
    for (int32_t g = step->cache->num_groups - 1; g >= 0; g--) {
        release_slots(step, g);
    }
    close_step(step);
}

static void release_copied(kv_step *step, int32_t group) {
    const kv_step_group *part = &step->groups[group];
    for (int64_t c = 0; c < part->num_copies; c++) {
        kv_pool_release(&step->cache->pools[group], part->copies[3 * c]);
    }
}

/* Releases the blocks behind what the next token reads, first to last: the order in which they would
 * be evicted does not depend on how the tokens were cut into steps. */
static void release_behind(kv_step *step, int32_t group, int32_t i) {
    kv_pool *pool = &step->cache->pools[group];
    const kv_sequence_state *state = state_of(step, i);
    kv_block_row *row = &state->rows[group];
    const int32_t kept = kv_first_column(pool, state->length - pool->slack);
    for (; row->first < kept; row->first++) {
        kv_pool_release(pool, row->blocks[row->first]);
        row->blocks[row->first] = KV_NO_BLOCK;
        pool->released++;
    }
}

static void commit(kv_step *step) {
    kv_cache *cache = step->cache;
    for (int32_t g = 0; g < cache->num_groups; g++) {
        release_copied(step, g);
    }
    for (int32_t i = 0; i < step->num_sequences; i++) {
        const kv_step_sequence *entry = &step->sequences[i];
        kv_sequence_state *state = state_of(step, i);
        state->length = entry->old_length + entry->num_new;
        if (entry->has_tokens) {
            state->num_known = state->length;
        }
        kv_cache_publish(cache, state);
        for (int32_t g = 0; g < cache->num_groups; g++) {
            release_behind(step, g, i);
        }
    }
    close_step(step);
}

static int is_complete(const kv_step *step) {
    for (int32_t i = 0; i < step->cache->num_layers; i++) {
        if (step->cache->layers[i].kv_source == i && !step->appended[i]) {
            return 0;
        }
    }
    return 1;
}

kv_status kv_step_commit(kv_step *step) {
    if (!step) {
        return KV_ERR_NULL;
    }
    if (!step->open) {
        return KV_ERR_STEP_CLOSED;
    }
    kv_cache *cache = step->cache;
    kv_cache_lock(cache);
    const int complete = is_complete(step);
    if (complete) {
        commit(step);
    } else {
        rollback(step);
    }
    kv_cache_unlock(cache);
    return complete ? KV_OK : KV_ERR_STEP_INCOMPLETE;
}

kv_status kv_step_rollback(kv_step *step) {
    if (!step) {
        return KV_ERR_NULL;
    }
    if (!step->open) {
        return KV_ERR_STEP_CLOSED;
    }
    kv_cache *cache = step->cache;
    kv_cache_lock(cache);
    rollback(step);
    kv_cache_unlock(cache);
    return KV_OK;
}

/* ---- the plan --------------------------------------------------------------------------------- */

kv_status kv_step_get_plan(const kv_step *step, int32_t group, kv_plan *out) {
    if (!step || !out) {
        return KV_ERR_NULL;
    }
    if (!step->open) {
        return KV_ERR_STEP_CLOSED;
    }
    if (group < 0 || group >= step->cache->num_groups) {
        return KV_ERR_RANGE;
    }
    const kv_step_group *part = &step->groups[group];
    *out = (kv_plan){
        .block_size = step->cache->pools[group].block_size,
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
    };
    return KV_OK;
}

kv_status kv_plan_block_tables(const kv_plan *plan, int32_t *out, int32_t width) {
    if (!plan || !out) {
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
