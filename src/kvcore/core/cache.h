/* The control plane's state: pools, prefix index and sequences under one lock. */
#ifndef KV_CACHE_H
#define KV_CACHE_H

#include <pthread.h>

#include "block_pool.h"
#include "prefix_index.h"
#include "sequences.h"

struct kv_cache {
    pthread_mutex_t lock;
    int32_t num_groups, num_pools, num_layers;
    kv_pool *pools;          /* [num_pools] the groups', then those of raw rows */
    kv_layer_config *layers; /* [num_layers] */
    kv_prefix_index prefixes;
    kv_sequence_table sequences;
    kv_step *open_steps;  /* doubly linked */
    kv_step *spare_steps; /* closed, kept for their buffers; singly linked */
    int64_t num_open_steps;
    int64_t prefix_queries, prefix_hits, prefix_hit_tokens;
};

/* All below run under the lock. */

/* A free block of a pool, evicting the least recently used prefix when none is. One must be
 * available. */
int32_t kv_cache_take_block(kv_cache *cache, int32_t pool);
/* Makes the whole spans of a sequence whose tokens are known findable by later sequences. */
void kv_cache_publish(kv_cache *cache, kv_sequence_state *state);
/* The live sequence behind a handle, when no step holds it. */
kv_status kv_cache_find_idle(kv_cache *cache, kv_sequence sequence, kv_sequence_state **out);

static inline void kv_cache_lock(const kv_cache *cache) {
    pthread_mutex_lock((pthread_mutex_t *)&cache->lock);
}

static inline void kv_cache_unlock(const kv_cache *cache) {
    pthread_mutex_unlock((pthread_mutex_t *)&cache->lock);
}

#endif
