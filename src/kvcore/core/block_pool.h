/* The blocks of one group, or of one group's raw rows: who holds them, which are free, which are kept for prefix reuse.
 *
 * A block is in exactly one of three states: in use (held by at least one sequence or step), cached
 * (held by nobody, but a prefix node lists it) or free. Every operation is O(1) and depends on
 * nothing but the calls before it, so that ranks which make the same calls get the same blocks. */
#ifndef KV_BLOCK_POOL_H
#define KV_BLOCK_POOL_H

#include "kvcore.h"

#define KV_NO_NODE (-1)
#define KV_NO_BLOCK (-1)

#define KV_NO_POOL (-1)

typedef struct kv_pool {
    int32_t block_size, num_blocks;
    int32_t retention; /* 0: every token is kept */
    int32_t slack;     /* tokens kept beyond it */
    int32_t pinned;    /* first columns that the retention never releases */
    int32_t raw;       /* the pool of this group's raw rows, or KV_NO_POOL */
    int32_t source;    /* the group whose rows this pool holds raw, or KV_NO_POOL */
    int32_t num_free, num_cached;
    int32_t *refcounts;     /* [N] */
    uint32_t *generations;  /* [N] raised each time the block is handed out */
    int32_t *nodes;         /* [N] the prefix node that lists the block, or KV_NO_NODE */
    int32_t *free_stack;    /* [N] the next block to hand out is on top */
    int32_t *older, *newer; /* [N] the cached blocks by last use, -1 at both ends */
    int32_t oldest, newest; /* the ends of that list, -1 when it is empty */
    int64_t allocations, evictions, copies, released, reencoded_rows;
} kv_pool;

/* A block and the generation it had, so that a stale reference is told from a live one. */
typedef struct kv_block_handle {
    int32_t block;
    uint32_t generation;
} kv_block_handle;

kv_status kv_pool_init(kv_pool *pool, const kv_group_config *config);
/* The pool of a group's raw rows. */
kv_status kv_pool_init_raw(kv_pool *pool, const kv_group_config *config, int32_t source);
void kv_pool_destroy(kv_pool *pool);

static inline int64_t kv_pool_available(const kv_pool *pool) {
    return (int64_t)pool->num_free + pool->num_cached;
}

/* The top free block, now held once. The pool must have one. */
int32_t kv_pool_take(kv_pool *pool);
void kv_pool_retain(kv_pool *pool, int32_t block);
/* Drops one hold. The last one makes the block cached when a node lists it, else free. */
void kv_pool_release(kv_pool *pool, int32_t block);

kv_block_handle kv_pool_handle(const kv_pool *pool, int32_t block);
int kv_pool_is_current(const kv_pool *pool, kv_block_handle handle);

/* Ties a held block to a prefix node; unlisting a cached block frees it. */
void kv_pool_list(kv_pool *pool, int32_t block, int32_t node);
void kv_pool_unlist(kv_pool *pool, int32_t block);

/* A shared or listed block must not be written: others may read it. */
static inline int kv_pool_is_shared(const kv_pool *pool, int32_t block) {
    return pool->refcounts[block] > 1 || pool->nodes[block] != KV_NO_NODE;
}

#endif
