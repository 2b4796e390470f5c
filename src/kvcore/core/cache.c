/* Creation, statistics and what the sequences and steps share. */
#include "cache.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "step.h"

static uint32_t next_cache_id(void) {
    static atomic_uint last;
    uint32_t id;
    do {
        id = (atomic_fetch_add(&last, 1) + 1) & 0xffff;
    } while (id == 0); /* so that a zeroed handle is foreign everywhere */
    return id;
}

static kv_status check_layers(const kv_cache_config *config) {
    for (int32_t i = 0; i < config->num_layers; i++) {
        const kv_layer_config *layer = &config->layers[i];
        if (layer->group < 0 || layer->group >= config->num_groups) {
            return KV_ERR_RANGE;
        }
        if (layer->kv_source < 0 || layer->kv_source > i) {
            return KV_ERR_RANGE;
        }
        const kv_layer_config *source = &config->layers[layer->kv_source];
        if (source->kv_source != layer->kv_source || source->group != layer->group) {
            return KV_ERR_VALUE;
        }
    }
    return KV_OK;
}

/* KV_ERR_VALUE also for raw rows that have no blocks to lie in. */
static kv_status count_pools(const kv_cache_config *config, int32_t *out) {
    *out = config->num_groups;
    for (int32_t g = 0; g < config->num_groups; g++) {
        const kv_group_config *group = &config->groups[g];
        if (group->raw_blocks < 0 ||
            (group->raw_blocks == 0 && (group->raw_first != 0 || group->raw_last != 0))) {
            return KV_ERR_VALUE;
        }
        *out += group->raw_blocks > 0;
    }
    return *out <= KV_MAX_GROUPS ? KV_OK : KV_ERR_VALUE;
}

static kv_status init_pools(kv_cache *cache, const kv_cache_config *config) {
    for (int32_t g = 0; g < config->num_groups; g++) {
        const kv_status status = kv_pool_init(&cache->pools[g], &config->groups[g]);
        if (status != KV_OK) {
            return status;
        }
    }
    int32_t raw = config->num_groups;
    for (int32_t g = 0; g < config->num_groups; g++) {
        if (config->groups[g].raw_blocks == 0) {
            continue;
        }
        const kv_status status = kv_pool_init_raw(&cache->pools[raw], &config->groups[g], g);
        if (status != KV_OK) {
            return status;
        }
        cache->pools[g].raw = raw++;
    }
    return kv_prefix_init(&cache->prefixes, cache->pools, cache->num_pools);
}

static void free_cache(kv_cache *cache) {
    while (cache->spare_steps) {
        kv_step *step = cache->spare_steps;
        cache->spare_steps = step->next;
        kv_step_free_memory(step);
    }
    kv_sequences_destroy(&cache->sequences);
    kv_prefix_destroy(&cache->prefixes);
    for (int32_t p = 0; cache->pools && p < cache->num_pools; p++) {
        kv_pool_destroy(&cache->pools[p]);
    }
    free(cache->pools);
    free(cache->layers);
    pthread_mutex_destroy(&cache->lock);
    free(cache);
}

kv_status kv_cache_create(const kv_cache_config *config, kv_cache **out) {
    if (!config || !out || !config->groups || !config->layers) {
        return KV_ERR_NULL;
    }
    if (config->struct_size != sizeof *config || config->num_groups < 1 ||
        config->num_groups > KV_MAX_GROUPS || config->num_layers < 1) {
        return KV_ERR_VALUE;
    }
    int32_t num_pools = 0;
    kv_status status = check_layers(config);
    status = status == KV_OK ? count_pools(config, &num_pools) : status;
    if (status != KV_OK) {
        return status;
    }
    kv_cache *cache = calloc(1, sizeof *cache);
    if (!cache) {
        return KV_ERR_NO_MEMORY;
    }
    pthread_mutex_init(&cache->lock, NULL);
    cache->num_groups = config->num_groups;
    cache->num_pools = num_pools;
    cache->num_layers = config->num_layers;
    kv_sequences_init(&cache->sequences, num_pools, next_cache_id());
    cache->pools = calloc((size_t)num_pools, sizeof *cache->pools);
    cache->layers = malloc((size_t)config->num_layers * sizeof *cache->layers);
    if (cache->pools && cache->layers) {
        memcpy(cache->layers, config->layers, (size_t)config->num_layers * sizeof *cache->layers);
        status = init_pools(cache, config);
    } else {
        status = KV_ERR_NO_MEMORY;
    }
    if (status != KV_OK) {
        free_cache(cache);
        return status;
    }
    *out = cache;
    return KV_OK;
}

kv_status kv_cache_destroy(kv_cache *cache) {
    if (!cache) {
        return KV_OK;
    }
    if (cache->open_steps) {
        return KV_ERR_SEQUENCE_BUSY;
    }
    free_cache(cache);
    return KV_OK;
}

int32_t kv_cache_take_block(kv_cache *cache, int32_t pool) {
    kv_pool *from = &cache->pools[pool];
    if (from->num_free == 0) {
        kv_prefix_evict(&cache->prefixes, pool);
        from->evictions++;
    }
    return kv_pool_take(from);
}

static int publish_span(kv_cache *cache, kv_sequence_state *state) {
    kv_prefix_index *prefixes = &cache->prefixes;
    const int32_t *tokens = state->tokens + (size_t)state->num_published * (size_t)prefixes->span;
    const int32_t *blocks[KV_MAX_GROUPS];
    for (int32_t p = 0; p < cache->num_pools; p++) {
        const int32_t per_span = prefixes->span / cache->pools[p].block_size;
        blocks[p] = state->rows[p].blocks + (size_t)state->num_published * (size_t)per_span;
    }
    if (kv_prefix_advance(prefixes, &state->cursor, tokens)) {
        /* Another sequence published the same tokens: this one keeps its own blocks. */
        kv_prefix_fill(prefixes, state->cursor.node, blocks);
        return 1;
    }
    return kv_prefix_insert(prefixes, &state->cursor, tokens, blocks);
}

void kv_cache_publish(kv_cache *cache, kv_sequence_state *state) {
    const int32_t span = cache->prefixes.span;
    const int32_t known = state->num_known < state->length ? state->num_known : state->length;
    if (known / span <= state->num_published) {
        return;
    }
    if (!kv_prefix_cursor_is_current(&cache->prefixes, &state->cursor)) {
        /* The node before the next span was evicted: lead the chain anew from the root. */
        state->cursor = kv_prefix_root(state->cursor.salt);
        state->num_published = 0;
    }
    while (state->num_published < known / span && publish_span(cache, state)) {
        state->num_published++;
    }
}

kv_status kv_cache_find_idle(kv_cache *cache, kv_sequence sequence, kv_sequence_state **out) {
    int32_t place;
    const kv_status status = kv_sequences_find(&cache->sequences, sequence, &place);
    if (status != KV_OK) {
        return status;
    }
    *out = &cache->sequences.states[place];
    return (*out)->step ? KV_ERR_SEQUENCE_BUSY : KV_OK;
}

kv_status kv_cache_get_stats(const kv_cache *cache, kv_cache_stats *out) {
    if (!cache || !out) {
        return KV_ERR_NULL;
    }
    if (out->struct_size != sizeof *out) {
        return KV_ERR_VALUE;
    }
    kv_cache_lock(cache);
    out->num_sequences = cache->sequences.num_live;
    out->open_steps = cache->num_open_steps;
    out->prefix_queries = cache->prefix_queries;
    out->prefix_hits = cache->prefix_hits;
    out->prefix_hit_tokens = cache->prefix_hit_tokens;
    kv_cache_unlock(cache);
    return KV_OK;
}

kv_status kv_cache_get_group_stats(const kv_cache *cache, int32_t group, kv_group_stats *out) {
    if (!cache || !out) {
        return KV_ERR_NULL;
    }
    if (out->struct_size != sizeof *out) {
        return KV_ERR_VALUE;
    }
    if (group < 0 || group >= cache->num_pools) {
        return KV_ERR_RANGE;
    }
    kv_cache_lock(cache);
    const kv_pool *pool = &cache->pools[group];
    out->total = pool->num_blocks;
    out->cached = pool->num_cached;
    out->free = pool->num_free;
    out->in_use = pool->num_blocks - pool->num_cached - pool->num_free;
    out->allocations = pool->allocations;
    out->evictions = pool->evictions;
    out->copies = pool->copies;
    out->released = pool->released;
    out->reencoded_rows = pool->reencoded_rows;
    kv_cache_unlock(cache);
    return KV_OK;
}

kv_status kv_cache_drop_prefixes(kv_cache *cache) {
    if (!cache) {
        return KV_ERR_NULL;
    }
    kv_cache_lock(cache);
    for (int32_t p = 0; p < cache->num_pools; p++) {
        while (cache->pools[p].num_cached > 0) {
            kv_prefix_evict(&cache->prefixes, p);
        }
    }
    kv_cache_unlock(cache);
    return KV_OK;
}
