#include "prefix_index.h"

#include <stdlib.h>
#include <string.h>

static int32_t blocks_of(const kv_prefix_index *index, int32_t p) {
    return index->span / index->pools[p].block_size;
}

static int may_lack(const kv_prefix_index *index, int32_t p) {
    const kv_pool *pool = &index->pools[p];
    return pool->source != KV_NO_POOL || pool->retention != index->retention;
}

static int32_t longest_retention(const kv_pool *pools, int32_t num_pools) {
    int32_t longest = pools[0].retention;
    for (int32_t g = 1; g < num_pools && pools[g].source == KV_NO_POOL && longest > 0; g++) {
        const int32_t retention = pools[g].retention;
        longest = retention == 0 || retention > longest ? retention : longest;
    }
    return longest;
}

/* No pool can list more spans than it has room for, so the tables never grow. */
static int32_t count_nodes(const kv_prefix_index *index) {
    int32_t least = INT32_MAX;
    for (int32_t g = 0; g < index->num_pools; g++) {
        const int32_t nodes = index->pools[g].num_blocks / blocks_of(index, g);
        least = nodes < least && !may_lack(index, g) ? nodes : least;
    }
    return least;
}

kv_status kv_prefix_init(kv_prefix_index *index, kv_pool *pools, int32_t num_pools) {
    *index = (kv_prefix_index){.pools = pools,
                               .num_pools = num_pools,
                               .retention = longest_retention(pools, num_pools),
                               .free_node = -1};
    for (int32_t g = 0; g < num_pools; g++) {
        index->span = pools[g].block_size > index->span ? pools[g].block_size : index->span;
    }
    for (int32_t g = 0; g < num_pools; g++) {
        index->blocks_per_node += blocks_of(index, g);
    }
    index->num_nodes = count_nodes(index);
    const size_t nodes = (size_t)index->num_nodes;
    uint64_t buckets = 16;
    while (buckets < nodes) {
        buckets *= 2;
    }
    index->bucket_mask = buckets - 1;
    /* One element more, so that a pool smaller than a span is not an allocation of nothing. */
    index->nodes = calloc(nodes + 1, sizeof *index->nodes);
    index->tokens = malloc((nodes * (size_t)index->span + 1) * sizeof *index->tokens);
    index->blocks = malloc((nodes * (size_t)index->blocks_per_node + 1) * sizeof *index->blocks);
    index->buckets = malloc((size_t)buckets * sizeof *index->buckets);
    if (!index->nodes || !index->tokens || !index->blocks || !index->buckets) {
        kv_prefix_destroy(index);
        return KV_ERR_NO_MEMORY;
    }
    for (uint64_t b = 0; b < buckets; b++) {
        index->buckets[b] = -1;
    }
    for (int32_t n = index->num_nodes - 1; n >= 0; n--) {
        index->nodes[n].next = index->free_node;
        index->free_node = n;
    }
    return KV_OK;
}

void kv_prefix_destroy(kv_prefix_index *index) {
    free(index->nodes);
    free(index->tokens);
    free(index->blocks);
    free(index->buckets);
    *index = (kv_prefix_index){0};
}

static int32_t *node_tokens(const kv_prefix_index *index, int32_t node) {
    return index->tokens + (size_t)node * (size_t)index->span;
}

static kv_block_handle *node_blocks(const kv_prefix_index *index, int32_t node, int32_t p) {
    kv_block_handle *blocks = index->blocks + (size_t)node * (size_t)index->blocks_per_node;
    for (int32_t g = 0; g < p; g++) {
        blocks += blocks_of(index, g);
    }
    return blocks;
}

const kv_block_handle *kv_prefix_blocks(const kv_prefix_index *index, int32_t node, int32_t p) {
    return node_blocks(index, node, p);
}

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014), one round a token. */
static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t hash_span(uint64_t hash, const int32_t *tokens, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        hash = mix(hash + 0x9e3779b97f4a7c15u + (uint32_t)tokens[i]);
    }
    return hash;
}

kv_prefix_cursor kv_prefix_root(uint64_t salt) {
    return (kv_prefix_cursor){.salt = salt, .hash = mix(salt), .node = -1};
}

int kv_prefix_cursor_is_current(const kv_prefix_index *index, const kv_prefix_cursor *cursor) {
    return cursor->node < 0 || index->nodes[cursor->node].serial == cursor->parent;
}

static void move_over(const kv_prefix_index *index, kv_prefix_cursor *cursor, int32_t node) {
    cursor->parent = index->nodes[node].serial;
    cursor->hash = index->nodes[node].hash;
    cursor->node = node;
}

int kv_prefix_advance(const kv_prefix_index *index, kv_prefix_cursor *cursor,
                      const int32_t *tokens) {
    const uint64_t hash = hash_span(cursor->hash, tokens, index->span);
    const size_t nbytes = (size_t)index->span * sizeof *tokens;
    int32_t n = index->buckets[hash & index->bucket_mask];
    for (; n >= 0; n = index->nodes[n].next) {
        const kv_prefix_node *node = &index->nodes[n];
        if (node->hash == hash && node->parent == cursor->parent && node->salt == cursor->salt &&
            memcmp(node_tokens(index, n), tokens, nbytes) == 0) {
            move_over(index, cursor, n);
            return 1;
        }
    }
    return 0;
}

static int is_listed(const kv_pool *pool, int32_t block) {
    return pool->nodes[block] != KV_NO_NODE;
}

static int can_insert(const kv_prefix_index *index, const int32_t *const *blocks) {
    for (int32_t g = 0; g < index->num_pools; g++) {
        for (int32_t i = 0; i < blocks_of(index, g) && !may_lack(index, g); i++) {
            const int32_t block = blocks[g][i];
            if (block == KV_NO_BLOCK || is_listed(&index->pools[g], block)) {
                return 0;
            }
        }
    }
    return 1;
}

void kv_prefix_fill(kv_prefix_index *index, int32_t n, const int32_t *const *blocks) {
    for (int32_t g = 0; g < index->num_pools; g++) {
        kv_pool *pool = &index->pools[g];
        kv_block_handle *handles = node_blocks(index, n, g);
        for (int32_t i = 0; i < blocks_of(index, g); i++) {
            const int32_t block = blocks[g][i];
            if (handles[i].block == KV_NO_BLOCK && block != KV_NO_BLOCK &&
                !is_listed(pool, block)) {
                handles[i] = kv_pool_handle(pool, block);
                kv_pool_list(pool, block, n);
            }
        }
    }
}

int kv_prefix_insert(kv_prefix_index *index, kv_prefix_cursor *cursor, const int32_t *tokens,
                     const int32_t *const *blocks) {
    if (!can_insert(index, blocks)) {
        return 0;
    }
    /* One is free: a pool has no unlisted span without a node to spare. */
    const int32_t n = index->free_node;
    kv_prefix_node *node = &index->nodes[n];
    index->free_node = node->next;

    node->serial = ++index->last_serial;
    node->parent = cursor->parent;
    node->salt = cursor->salt;
    node->hash = hash_span(cursor->hash, tokens, index->span);
    memcpy(node_tokens(index, n), tokens, (size_t)index->span * sizeof *tokens);
    int32_t *bucket = &index->buckets[node->hash & index->bucket_mask];
    node->next = *bucket;
    *bucket = n;
    kv_block_handle *handles = node_blocks(index, n, 0);
    for (int32_t i = 0; i < index->blocks_per_node; i++) {
        handles[i] = (kv_block_handle){.block = KV_NO_BLOCK};
    }
    kv_prefix_fill(index, n, blocks);
    move_over(index, cursor, n);
    return 1;
}

/* Forgets a node. Its blocks that nobody holds become free. */
static void remove_node(kv_prefix_index *index, int32_t n) {
    kv_prefix_node *node = &index->nodes[n];
    int32_t *link = &index->buckets[node->hash & index->bucket_mask];
    while (*link != n) {
        link = &index->nodes[*link].next;
    }
    *link = node->next;
    node->serial = 0;
    node->next = index->free_node;
    index->free_node = n;
    for (int32_t g = 0; g < index->num_pools; g++) {
        const kv_block_handle *handles = node_blocks(index, n, g);
        /* Backwards, so that the first block of the span is the first to be handed out again. */
        for (int32_t i = blocks_of(index, g) - 1; i >= 0; i--) {
            if (handles[i].block != KV_NO_BLOCK) {
                kv_pool_unlist(&index->pools[g], handles[i].block);
            }
        }
    }
}

void kv_prefix_evict(kv_prefix_index *index, int32_t p) {
    kv_pool *pool = &index->pools[p];
    const int32_t block = pool->oldest, n = pool->nodes[block];
    if (!may_lack(index, p)) {
        remove_node(index, n);
        return;
    }
    kv_block_handle *handle = node_blocks(index, n, p);
    while (handle->block != block) {
        handle++;
    }
    handle->block = KV_NO_BLOCK;
    kv_pool_unlist(pool, block);
}

static int32_t count_reachable(const kv_prefix_index *index) {
    int32_t reached = 0;
    for (uint64_t b = 0; b <= index->bucket_mask; b++) {
        for (int32_t n = index->buckets[b]; n >= 0; n = index->nodes[n].next) {
            if (index->nodes[n].serial == 0 || ++reached > index->num_nodes) {
                return -1;
            }
        }
    }
    return reached;
}

static int64_t count_listed(const kv_prefix_index *index) {
    int64_t listed = 0;
    for (int32_t g = 0; g < index->num_pools; g++) {
        for (int32_t block = 0; block < index->pools[g].num_blocks; block++) {
            listed += is_listed(&index->pools[g], block);
        }
    }
    return listed;
}

const char *kv_prefix_check(const kv_prefix_index *index) {
    int32_t live = 0;
    int64_t listed = 0;
    for (int32_t n = 0; n < index->num_nodes; n++) {
        if (index->nodes[n].serial == 0) {
            continue;
        }
        live++;
        for (int32_t g = 0; g < index->num_pools; g++) {
            const kv_block_handle *handles = node_blocks(index, n, g);
            for (int32_t i = 0; i < blocks_of(index, g); i++) {
                const kv_pool *pool = &index->pools[g];
                if (handles[i].block == KV_NO_BLOCK && may_lack(index, g)) {
                    continue;
                }
                if (handles[i].block == KV_NO_BLOCK || pool->nodes[handles[i].block] != n ||
                    !kv_pool_is_current(pool, handles[i])) {
                    return "a prefix node lists a block that is no longer its own";
                }
                listed++;
            }
        }
    }
    if (listed != count_listed(index)) {
        return "a block belongs to a prefix node that does not list it";
    }
    return count_reachable(index) == live ? NULL : "a prefix node cannot be found by its hash";
}
