/* Which blocks hold which tokens, so that a new sequence can start from what is already computed.
 *
 * A node stands for one span of tokens after its parent's: a chain of nodes is a prefix. A span is
 * the largest block size of all pools, so that every pool has whole blocks for it. A match compares
 * the salt, the parent and every token; the hash only finds candidates. Nodes never keep a block in
 * use: a block that only its node knows is cached, and may be evicted for a new one.
 *
 * A node lives as long as its blocks of the groups that retain most (all tokens, as a rule): the first
 * of these to be evicted takes the node along. In groups that retain less, and in pools of raw rows, a
 * node may lack blocks: a prefix can be used without those that lie behind its end's reach, and a
 * later sequence of the same tokens fills in the others. */
#ifndef KV_PREFIX_INDEX_H
#define KV_PREFIX_INDEX_H

#include "block_pool.h"

typedef struct kv_prefix_node {
    uint64_t serial; /* never used twice; 0: the node is free */
    uint64_t parent; /* the parent's serial, 0 for the first span */
    uint64_t salt;
    uint64_t hash; /* of the whole chain */
    int32_t next;  /* in its bucket, or in the list of free nodes; -1 ends it */
} kv_prefix_node;

/* A place in a chain: where the next span is looked up. */
typedef struct kv_prefix_cursor {
    uint64_t salt;
    uint64_t parent; /* serial, 0 at the root */
    uint64_t hash;
    int32_t node; /* -1 at the root */
} kv_prefix_cursor;

typedef struct kv_prefix_index {
    kv_pool *pools;
    int32_t num_pools;
    int32_t retention;       /* of the groups that retain most; 0: all tokens */
    int32_t span;            /* tokens of a node */
    int32_t blocks_per_node; /* of all pools together */
    int32_t num_nodes;
    int32_t free_node; /* head of the free list, -1: none */
    uint64_t last_serial;
    kv_prefix_node *nodes;   /* [num_nodes] */
    int32_t *tokens;         /* [num_nodes, span] */
    kv_block_handle *blocks; /* [num_nodes, blocks_per_node], pool by pool; KV_NO_BLOCK: lacking */
    int32_t *buckets;        /* [bucket_mask + 1] */
    uint64_t bucket_mask;
} kv_prefix_index;

kv_status kv_prefix_init(kv_prefix_index *index, kv_pool *pools, int32_t num_pools);
void kv_prefix_destroy(kv_prefix_index *index);

kv_prefix_cursor kv_prefix_root(uint64_t salt);
/* Whether the cursor's node still is what it was when the cursor passed it. */
int kv_prefix_cursor_is_current(const kv_prefix_index *index, const kv_prefix_cursor *cursor);

/* Moves the cursor over the span `tokens` when a node for it exists; says whether it did. */
int kv_prefix_advance(const kv_prefix_index *index, kv_prefix_cursor *cursor,
                      const int32_t *tokens);
/* The node's blocks of one pool: span / block_size of them. */
const kv_block_handle *kv_prefix_blocks(const kv_prefix_index *index, int32_t node, int32_t p);
/* Adds a node after the cursor and moves over it. blocks[p]: the sequence's blocks of pool p for
 * this span, in use or KV_NO_BLOCK. Returns 0, with nothing changed, when one that nodes may not
 * lack is missing or listed by another node. */
int kv_prefix_insert(kv_prefix_index *index, kv_prefix_cursor *cursor, const int32_t *tokens,
                     const int32_t *const *blocks);
/* Gives a node that lacks blocks those of a sequence with the same tokens; `blocks` as above. */
void kv_prefix_fill(kv_prefix_index *index, int32_t node, const int32_t *const *blocks);
/* Frees the pool's least recently used cached block, with its node where that cannot lack it. */
void kv_prefix_evict(kv_prefix_index *index, int32_t p);

/* Counts live nodes and verifies their links; returns NULL or what is wrong. */
const char *kv_prefix_check(const kv_prefix_index *index);

#endif
