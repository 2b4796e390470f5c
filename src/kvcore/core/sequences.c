#include "sequences.h"

#include <stdlib.h>

/* A handle is cache id (16 bits), generation (24), place + 1 (24): never 0. */
#define PLACE_BITS 24
#define PLACE_MASK ((1u << PLACE_BITS) - 1)
#define GENERATION_MASK ((1u << 24) - 1)

void kv_sequences_init(kv_sequence_table *table, int32_t num_pools, uint32_t cache_id) {
    *table = (kv_sequence_table){.first_free = -1, .num_pools = num_pools, .cache_id = cache_id};
}

void kv_sequences_destroy(kv_sequence_table *table) {
    for (int32_t i = 0; i < table->count; i++) {
        kv_sequence_state *state = &table->states[i];
        for (int32_t g = 0; g < table->num_pools; g++) {
            free(state->rows[g].blocks);
        }
        free(state->rows);
        free(state->tokens);
    }
    free(table->states);
    *table = (kv_sequence_table){0};
}

static kv_status add_slot(kv_sequence_table *table) {
    if (table->count == table->capacity) {
        const int32_t capacity = table->capacity ? table->capacity * 2 : 16;
        if ((uint32_t)capacity > PLACE_MASK) {
            return KV_ERR_OVERFLOW;
        }
        kv_sequence_state *grown = realloc(table->states, (size_t)capacity * sizeof *table->states);
        if (!grown) {
            return KV_ERR_NO_MEMORY;
        }
        table->states = grown;
        table->capacity = capacity;
    }
    kv_block_row *rows = calloc((size_t)table->num_pools, sizeof *rows);
    if (!rows) {
        return KV_ERR_NO_MEMORY;
    }
    table->states[table->count] = (kv_sequence_state){.rows = rows, .next_free = table->first_free};
    table->first_free = table->count++;
    return KV_OK;
}

kv_status kv_sequences_add(kv_sequence_table *table, int32_t *out) {
    if (table->first_free < 0) {
        const kv_status status = add_slot(table);
        if (status != KV_OK) {
            return status;
        }
    }
    *out = table->first_free;
    kv_sequence_state *state = &table->states[*out];
    table->first_free = state->next_free;
    state->generation = (state->generation + 1) & GENERATION_MASK;
    state->live = 1;
    state->step = NULL;
    state->length = 0;
    state->num_known = 0;
    state->num_published = 0;
    state->cursor = kv_prefix_root(0);
    table->num_live++;
    return KV_OK;
}

void kv_sequences_remove(kv_sequence_table *table, int32_t place) {
    kv_sequence_state *state = &table->states[place];
    state->live = 0;
    state->next_free = table->first_free;
    table->first_free = place;
    table->num_live--;
}

kv_sequence kv_sequences_handle(const kv_sequence_table *table, int32_t place) {
    return (uint64_t)table->cache_id << 48 |
           (uint64_t)table->states[place].generation << PLACE_BITS | (uint64_t)(place + 1);
}

kv_status kv_sequences_find(const kv_sequence_table *table, kv_sequence sequence, int32_t *out) {
    if (sequence >> 48 != table->cache_id) {
        return KV_ERR_FOREIGN_SEQUENCE;
    }
    const int32_t place = (int32_t)(sequence & PLACE_MASK) - 1;
    const uint32_t generation = (uint32_t)(sequence >> PLACE_BITS) & GENERATION_MASK;
    if (place < 0 || place >= table->count || !table->states[place].live ||
        table->states[place].generation != generation) {
        return KV_ERR_STALE_SEQUENCE;
    }
    *out = place;
    return KV_OK;
}

static kv_status reserve(int32_t **array, int32_t *capacity, int32_t wanted) {
    if (wanted <= *capacity) {
        return KV_OK;
    }
    int64_t grown = *capacity ? *capacity : 16;
    while (grown < wanted) {
        grown *= 2;
    }
    grown = grown < INT32_MAX ? grown : INT32_MAX;
    int32_t *moved = realloc(*array, (size_t)grown * sizeof **array);
    if (!moved) {
        return KV_ERR_NO_MEMORY;
    }
    *array = moved;
    *capacity = (int32_t)grown;
    return KV_OK;
}

kv_status kv_row_reserve(kv_block_row *row, int32_t capacity) {
    return reserve(&row->blocks, &row->capacity, capacity);
}

kv_status kv_tokens_reserve(kv_sequence_state *state, int32_t capacity) {
    return reserve(&state->tokens, &state->token_capacity, capacity);
}
