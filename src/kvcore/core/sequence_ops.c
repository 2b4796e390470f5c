/* The operations on sequences that the door offers. */
#include <stdlib.h>
#include <string.h>

#include "cache.h"

static void release_columns(kv_cache *cache, kv_sequence_state *state, int32_t length) {
    for (int32_t p = 0; p < cache->num_pools; p++) {
        kv_pool *pool = &cache->pools[p];
        kv_block_row *row = &state->rows[p];
        const int32_t kept = kv_columns(length, pool->block_size);
        /* Backwards: a prefix is only found from its start, so its end is to be evicted first. */
        while (row->count > kept) {
            const int32_t column = --row->count;
            if (kv_row_holds(pool, row, column)) {
                kv_pool_release(pool, row->blocks[column]);
            }
        }
        row->first = row->first < row->count ? row->first : row->count;
    }
}

kv_status kv_sequence_create(kv_cache *cache, kv_sequence *out) {
    if (!cache || !out) {
        return KV_ERR_NULL;
    }
    int32_t place;
    kv_cache_lock(cache);
    const kv_status status = kv_sequences_add(&cache->sequences, &place);
    if (status == KV_OK) {
        *out = kv_sequences_handle(&cache->sequences, place);
    }
    kv_cache_unlock(cache);
    return status;
}

static kv_status reserve_rows(kv_cache *cache, kv_sequence_state *state, int32_t length) {
    for (int32_t g = 0; g < cache->num_pools; g++) {
        const int32_t columns = kv_columns(length, cache->pools[g].block_size);
        const kv_status status = kv_row_reserve(&state->rows[g], columns);
        if (status != KV_OK) {
            return status;
        }
    }
    return KV_OK;
}

/* Takes over a node's blocks, for a sequence that will have `length` tokens. */
static void adopt_span(kv_cache *cache, kv_sequence_state *state, int32_t length) {
    const int32_t span = cache->prefixes.span;
    for (int32_t g = 0; g < cache->num_pools; g++) {
        kv_pool *pool = &cache->pools[g];
        kv_block_row *row = &state->rows[g];
        const kv_block_handle *blocks = kv_prefix_blocks(&cache->prefixes, state->cursor.node, g);
        row->first = kv_first_column(pool, length);
        for (int32_t i = 0; i < span / pool->block_size; i++) {
            const int kept = kv_row_holds(pool, row, row->count);
            if (kept) {
                kv_pool_retain(pool, blocks[i].block);
            }
            row->blocks[row->count++] = kept ? blocks[i].block : KV_NO_BLOCK;
        }
    }
    state->num_published++;
    state->length += span;
}

/* Which of a pool's blocks the nodes of a chain have, as far as a match has come. */
typedef struct kv_presence {
    int32_t first, last; /* unbroken runs of blocks: those at the start, and those before the end */
} kv_presence;

static void note_blocks(kv_presence *presence, const kv_block_handle *blocks, int32_t start,
                        int32_t count) {
    for (int32_t b = 0; b < count; b++) {
        const int there = blocks[b].block != KV_NO_BLOCK;
        presence->first += there && presence->first == start + b;
        presence->last = there ? presence->last + 1 : 0;
    }
}

/* The spans of the longest prefix of `tokens`, at most max_spans, that a sequence can start from: in
 * every pool the blocks which its next token may read are still there. */
static int32_t match_prefix(const kv_cache *cache, kv_prefix_cursor cursor, const int32_t *tokens,
                            int32_t max_spans) {
    const kv_prefix_index *prefixes = &cache->prefixes;
    const int32_t span = prefixes->span;
    kv_presence present[KV_MAX_GROUPS] = {0};
    int32_t usable = 0;
    for (int32_t i = 0; i < max_spans; i++) {
        if (!kv_prefix_advance(prefixes, &cursor, tokens + (size_t)i * (size_t)span)) {
            break;
        }
        const int32_t length = (i + 1) * span;
        int complete = 1;
        for (int32_t p = 0; p < cache->num_pools; p++) {
            const kv_pool *pool = &cache->pools[p];
            const int32_t count = span / pool->block_size, columns = length / pool->block_size;
            note_blocks(&present[p], kv_prefix_blocks(prefixes, cursor.node, p), i * count, count);
            complete &= present[p].first >= pool->pinned &&
                        present[p].last >= columns - kv_first_column(pool, length);
        }
        usable = complete ? i + 1 : usable;
    }
    return usable;
}

static kv_status adopt_prefix(kv_cache *cache, kv_sequence_state *state, const int32_t *tokens,
                              int32_t num_tokens, uint64_t salt) {
    const kv_prefix_index *prefixes = &cache->prefixes;
    const int32_t span = prefixes->span;
    /* The last token is left out: its logits are still to be computed. */
    const int32_t max_spans = num_tokens > 0 ? (num_tokens - 1) / span : 0;
    state->cursor = kv_prefix_root(salt);
    const int32_t matched = match_prefix(cache, state->cursor, tokens, max_spans);
    kv_status status = reserve_rows(cache, state, matched * span);
    if (status == KV_OK) {
        status = kv_tokens_reserve(state, matched * span);
    }
    if (status != KV_OK) {
        return status;
    }
    for (int32_t i = 0; i < matched; i++) {
        kv_prefix_advance(prefixes, &state->cursor, tokens + (size_t)i * (size_t)span);
        adopt_span(cache, state, matched * span);
    }
    if (state->length > 0) {
        memcpy(state->tokens, tokens, (size_t)state->length * sizeof *tokens);
    }
    state->num_known = state->length;
    cache->prefix_queries += num_tokens > 0;
    cache->prefix_hits += matched > 0;
    cache->prefix_hit_tokens += state->length;
    return KV_OK;
}

kv_status kv_sequence_create_cached(kv_cache *cache, const int32_t *tokens, int32_t num_tokens,
                                    uint64_t salt, kv_sequence *out) {
    if (!cache || !out || (!tokens && num_tokens > 0)) {
        return KV_ERR_NULL;
    }
    if (num_tokens < 0) {
        return KV_ERR_VALUE;
    }
    int32_t place;
    kv_cache_lock(cache);
    kv_status status = kv_sequences_add(&cache->sequences, &place);
    if (status == KV_OK) {
        status = adopt_prefix(cache, &cache->sequences.states[place], tokens, num_tokens, salt);
        if (status == KV_OK) {
            *out = kv_sequences_handle(&cache->sequences, place);
        } else {
            kv_sequences_remove(&cache->sequences, place);
        }
    }
    kv_cache_unlock(cache);
    return status;
}

/* Whether the sequence, cut to `length` tokens, would hold all that its next token may read: in the
 * groups, and if `exact` in the pools of raw rows too, which could be restored. */
static int can_shorten(const kv_cache *cache, const kv_sequence_state *state, int32_t length,
                       int exact) {
    for (int32_t p = 0; p < (exact ? cache->num_pools : cache->num_groups); p++) {
        const kv_lost_columns lost = kv_row_lost(&cache->pools[p], &state->rows[p], length);
        if (lost.first < lost.stop) {
            return 0;
        }
    }
    return 1;
}

static void share_columns(kv_cache *cache, const kv_sequence_state *from, kv_sequence_state *to,
                          int32_t length) {
    for (int32_t g = 0; g < cache->num_pools; g++) {
        kv_pool *pool = &cache->pools[g];
        const kv_block_row *source = &from->rows[g];
        kv_block_row *row = &to->rows[g];
        row->count = kv_columns(length, pool->block_size);
        row->first = source->first < row->count ? source->first : row->count;
        for (int32_t i = 0; i < row->count; i++) {
            row->blocks[i] = source->blocks[i];
            if (kv_row_holds(pool, row, i)) {
                kv_pool_retain(pool, row->blocks[i]);
            }
        }
    }
}

static kv_status fork_state(kv_cache *cache, kv_sequence source, int32_t length, kv_sequence *out) {
    kv_sequence_state *from;
    kv_status status = kv_cache_find_idle(cache, source, &from);
    if (status != KV_OK) {
        return status;
    }
    length = length == -1 ? from->length : length;
    if (length < 0 || length > from->length) {
        return KV_ERR_RANGE;
    }
    if (!can_shorten(cache, from, length, 0)) {
        return KV_ERR_RELEASED;
    }
    int32_t from_place, place;
    kv_sequences_find(&cache->sequences, source, &from_place);
    status = kv_sequences_add(&cache->sequences, &place);
    if (status != KV_OK) {
        return status;
    }
    from = &cache->sequences.states[from_place]; /* adding may have moved the states */
    kv_sequence_state *to = &cache->sequences.states[place];
    const int32_t known = from->num_known < length ? from->num_known : length;
    status = reserve_rows(cache, to, length);
    if (status == KV_OK) {
        status = kv_tokens_reserve(to, known);
    }
    if (status != KV_OK) {
        kv_sequences_remove(&cache->sequences, place);
        return status;
    }
    share_columns(cache, from, to, length);
    if (known > 0) {
        memcpy(to->tokens, from->tokens, (size_t)known * sizeof *to->tokens);
    }
    to->length = length;
    to->num_known = known;
    to->cursor = kv_prefix_root(from->cursor.salt); /* publishing leads it to where it belongs */
    *out = kv_sequences_handle(&cache->sequences, place);
    return KV_OK;
}

kv_status kv_sequence_fork(kv_cache *cache, kv_sequence source, int32_t length, kv_sequence *out) {
    if (!cache || !out) {
        return KV_ERR_NULL;
    }
    kv_cache_lock(cache);
    const kv_status status = fork_state(cache, source, length, out);
    kv_cache_unlock(cache);
    return status;
}

static kv_status truncate_state(kv_cache *cache, kv_sequence_state *state, int32_t length,
                                int exact) {
    if (length < 0 || length > state->length) {
        return KV_ERR_RANGE;
    }
    if (!can_shorten(cache, state, length, exact)) {
        return KV_ERR_RELEASED;
    }
    release_columns(cache, state, length);
    state->length = length;
    state->num_known = state->num_known < length ? state->num_known : length;
    if ((int64_t)state->num_published * cache->prefixes.span > length) {
        state->cursor = kv_prefix_root(state->cursor.salt);
        state->num_published = 0;
    }
    return KV_OK;
}

kv_status kv_sequence_truncate(kv_cache *cache, kv_sequence sequence, int32_t length,
                               int32_t exact) {
    if (!cache) {
        return KV_ERR_NULL;
    }
    kv_sequence_state *state;
    kv_cache_lock(cache);
    kv_status status = kv_cache_find_idle(cache, sequence, &state);
    if (status == KV_OK) {
        status = truncate_state(cache, state, length, exact);
    }
    kv_cache_unlock(cache);
    return status;
}

kv_status kv_sequence_free(kv_cache *cache, kv_sequence sequence) {
    if (!cache) {
        return KV_ERR_NULL;
    }
    kv_sequence_state *state;
    kv_cache_lock(cache);
    const kv_status status = kv_cache_find_idle(cache, sequence, &state);
    if (status == KV_OK) {
        release_columns(cache, state, 0);
        kv_sequences_remove(&cache->sequences, (int32_t)(state - cache->sequences.states));
    }
    kv_cache_unlock(cache);
    return status;
}

kv_status kv_sequence_length(const kv_cache *cache, kv_sequence sequence, int32_t *out) {
    if (!cache || !out) {
        return KV_ERR_NULL;
    }
    int32_t place;
    kv_cache_lock(cache);
    const kv_status status = kv_sequences_find(&cache->sequences, sequence, &place);
    if (status == KV_OK) {
        *out = cache->sequences.states[place].length;
    }
    kv_cache_unlock(cache);
    return status;
}

static kv_status list_blocks(const kv_cache *cache, kv_sequence sequence, int32_t group,
                             int32_t *out, int32_t capacity, int32_t *count) {
    int32_t place;
    const kv_status status = kv_sequences_find(&cache->sequences, sequence, &place);
    if (status != KV_OK) {
        return status;
    }
    const kv_sequence_state *state = &cache->sequences.states[place];
    /* In an open step the row already has the step's blocks: only the committed ones are told. */
    *count = kv_columns(state->length, cache->pools[group].block_size);
    const int32_t written = *count < capacity ? *count : capacity;
    if (written > 0) {
        memcpy(out, state->rows[group].blocks, (size_t)written * sizeof *out);
    }
    return KV_OK;
}

kv_status kv_sequence_blocks(const kv_cache *cache, kv_sequence sequence, int32_t group,
                             int32_t *out, int32_t capacity, int32_t *count) {
    if (!cache || !count || (!out && capacity > 0)) {
        return KV_ERR_NULL;
    }
    if (group < 0 || group >= cache->num_pools || capacity < 0) {
        return KV_ERR_RANGE;
    }
    kv_cache_lock(cache);
    const kv_status status = list_blocks(cache, sequence, group, out, capacity, count);
    kv_cache_unlock(cache);
    return status;
}
