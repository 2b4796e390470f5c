/* Sequences: which blocks hold a sequence's tokens, in order, and the tokens where they are known. */
#ifndef KV_SEQUENCES_H
#define KV_SEQUENCES_H

#include "block_pool.h"
#include "prefix_index.h"

typedef struct kv_block_row {
    int32_t *blocks; /* KV_NO_BLOCK in the columns that kv_row_holds denies */
    int32_t first, count, capacity;
} kv_block_row;

typedef struct kv_sequence_state {
    uint32_t generation;
    int32_t next_free; /* in the table's free list while not live */
    int live;
    const kv_step *step; /* the open step that holds it, or NULL */
    int32_t length;
    kv_block_row *rows; /* [num_pools] */
    /* Prefix reuse: token ids are known for the first num_known tokens. */
    int32_t *tokens;
    int32_t num_known, token_capacity;
    kv_prefix_cursor cursor; /* after the spans published or adopted so far */
    int32_t num_published;   /* how many spans those are */
} kv_sequence_state;

typedef struct kv_sequence_table {
    kv_sequence_state *states;
    int32_t count, capacity; /* slots ever used, slots allocated */
    int32_t num_live;
    int32_t first_free; /* -1: none */
    uint32_t cache_id;  /* 16 bits of every handle */
    int32_t num_pools;
} kv_sequence_table;

void kv_sequences_init(kv_sequence_table *table, int32_t num_pools, uint32_t cache_id);
void kv_sequences_destroy(kv_sequence_table *table);

kv_status kv_sequences_add(kv_sequence_table *table, int32_t *out);
/* The state keeps its arrays for the next sequence that takes its slot. */
void kv_sequences_remove(kv_sequence_table *table, int32_t place);
kv_sequence kv_sequences_handle(const kv_sequence_table *table, int32_t place);
/* KV_ERR_FOREIGN_SEQUENCE or KV_ERR_STALE_SEQUENCE when the handle names no live sequence here. */
kv_status kv_sequences_find(const kv_sequence_table *table, kv_sequence sequence, int32_t *out);

kv_status kv_row_reserve(kv_block_row *row, int32_t capacity);
kv_status kv_tokens_reserve(kv_sequence_state *state, int32_t capacity);

/* ceil(tokens / block_size) */
static inline int32_t kv_columns(int32_t tokens, int32_t block_size) {
    return tokens / block_size + (tokens % block_size != 0);
}

/* The first column that the next token of a sequence of `length` tokens may read. */
static inline int32_t kv_first_column(const kv_pool *pool, int32_t length) {
    const int32_t retention = pool->retention;
    return retention > 0 && length >= retention ? (length - retention + 1) / pool->block_size : 0;
}

/* Whether the row has a block in a column below its count. */
static inline int kv_row_holds(const kv_pool *pool, const kv_block_row *row, int32_t column) {
    return column >= row->first || column < pool->pinned;
}

/* Columns [first, stop) that the next token of a sequence of `length` tokens may read, but that the
 * row does not hold. */
typedef struct kv_lost_columns {
    int32_t first, stop; /* stop <= first: none */
} kv_lost_columns;

static inline kv_lost_columns kv_row_lost(const kv_pool *pool, const kv_block_row *row,
                                          int32_t length) {
    const int32_t first = kv_first_column(pool, length);
    const int32_t columns = kv_columns(length, pool->block_size);
    return (kv_lost_columns){first > pool->pinned ? first : pool->pinned,
                             row->first < columns ? row->first : columns};
}

#endif
