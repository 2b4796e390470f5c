#include "step.h"

#include <stdlib.h>
#include <string.h>

/* ---- memory: steps keep their buffers and are used again -------------------------------------- */

void kv_step_free_memory(kv_step *step) {
    free(step->sequences);
    free(step->pools);
    free(step->plans);
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
    step->pools = calloc((size_t)cache->num_pools, sizeof *step->pools);
    step->plans = calloc((size_t)cache->num_pools, sizeof *step->plans);
    step->appended = calloc((size_t)cache->num_layers, sizeof *step->appended);
    if (!step->pools || !step->plans || !step->appended) {
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

int kv_step_make_room(void **array, int64_t *capacity, int64_t wanted, size_t element_size) {
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

static void unlock_sequences(kv_step *step, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        kv_step_state(step, i)->step = NULL;
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
    if (!kv_step_make_room((void **)&step->sequences, &capacity, count, sizeof *step->sequences)) {
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

static kv_status reserve_rows(kv_step *step) {
    for (int32_t i = 0; i < step->num_sequences; i++) {
        const kv_step_sequence *entry = &step->sequences[i];
        kv_sequence_state *state = kv_step_state(step, i);
        const int32_t length = entry->old_length + entry->num_new;
        kv_status status = entry->has_tokens ? kv_tokens_reserve(state, length) : KV_OK;
        for (int32_t p = 0; p < step->cache->num_pools && status == KV_OK; p++) {
            const int32_t block_size = step->cache->pools[p].block_size;
            status = kv_row_reserve(&state->rows[p], kv_columns(length, block_size));
        }
        if (status != KV_OK) {
            return status;
        }
    }
    return KV_OK;
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
            memcpy(kv_step_state(step, i)->tokens + entry->old_length, entries[i].tokens,
                   (size_t)entry->num_new * sizeof *entries[i].tokens);
        }
    }
}

static void open_step(kv_step *step, const kv_step_entry *entries) {
    kv_cache *cache = step->cache;
    note_tokens(step, entries);
    kv_step_take_slots(step);
    kv_step_fill_plans(step);
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
        status = kv_step_count_blocks(step, shortage);
        status = status == KV_OK ? reserve_rows(step) : status;
        status = status == KV_OK ? kv_step_reserve_buffer(step) : status;
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

static void rollback(kv_step *step) {
    kv_step_return_slots(step);
    close_step(step);
}

/* Releases the blocks behind what the next token reads, first to last: the order in which they would
 * be evicted does not depend on how the tokens were cut into steps. */
static void release_behind(kv_step *step, int32_t p, int32_t i) {
    kv_pool *pool = &step->cache->pools[p];
    const kv_sequence_state *state = kv_step_state(step, i);
    kv_block_row *row = &state->rows[p];
    const int32_t kept = kv_first_column(pool, state->length - pool->slack);
    for (; row->first < kept; row->first++) {
        if (row->first >= pool->pinned) {
            kv_pool_release(pool, row->blocks[row->first]);
            row->blocks[row->first] = KV_NO_BLOCK;
            pool->released++;
        }
    }
}

/* Rows that were restored differ from those that the sequence's tokens gave, and whatever follows
 * from them does too: from there on its tokens count as unknown, and nothing is published. */
static void forget_restored(kv_step *step) {
    for (int32_t p = step->cache->num_groups; p < step->cache->num_pools; p++) {
        const kv_step_pool *part = &step->pools[p];
        for (int64_t r = 0; r < part->num_restores; r++) {
            const int32_t i = part->restores[3 * r];
            const int32_t start = part->restores[3 * r + 1] * KV_RAW_BLOCK_SIZE;
            kv_sequence_state *state = kv_step_state(step, i);
            state->num_known = start < state->num_known ? start : state->num_known;
            step->sequences[i].has_tokens = 0;
        }
    }
}

static void commit(kv_step *step) {
    kv_cache *cache = step->cache;
    kv_step_keep_slots(step);
    forget_restored(step);
    for (int32_t i = 0; i < step->num_sequences; i++) {
        const kv_step_sequence *entry = &step->sequences[i];
        kv_sequence_state *state = kv_step_state(step, i);
        state->length = entry->old_length + entry->num_new;
        if (entry->has_tokens) {
            state->num_known = state->length;
        }
        kv_cache_publish(cache, state);
        for (int32_t p = 0; p < cache->num_pools; p++) {
            release_behind(step, p, i);
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
