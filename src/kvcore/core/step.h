/* The step transaction: reserve slots for new tokens, then commit or roll back. */
#ifndef KV_STEP_H
#define KV_STEP_H

#include "cache.h"

typedef struct kv_step_sequence {
    int32_t place; /* in the cache's sequence table */
    int32_t old_length, num_new;
    int has_tokens;
    uint32_t copy_pools; /* bit p: its last block of pool p is copied before it is written */
} kv_step_sequence;

/* What the step does in one pool; see kv_plan. */
typedef struct kv_step_pool {
    int64_t num_copies, num_new_blocks, num_restores;
    int32_t *slots, *copies, *new_blocks, *restores; /* in the step's buffer */
    const int32_t **block_rows;                      /* [num_sequences], in the step's pointers */
} kv_step_pool;

struct kv_step {
    kv_cache *cache;
    kv_step *previous, *next; /* among the open steps, or the spare ones */
    int open;
    int32_t num_sequences, num_tokens, max_new;
    kv_step_sequence *sequences; /* [num_sequences] */
    int32_t sequence_capacity;
    kv_step_pool *pools; /* [num_pools] */
    kv_plan *plans;      /* [num_pools] */
    uint8_t *appended;   /* [num_layers] */
    int32_t *buffer;     /* query starts, sequence lengths, then each pool's arrays */
    int64_t buffer_size, buffer_capacity;
    const int32_t **pointers; /* [num_pools, num_sequences] */
    int64_t pointer_capacity;
};

void kv_step_free_memory(kv_step *step);

/* Makes room for `wanted` elements; old contents are not kept. 0: the system gave no memory. */
int kv_step_make_room(void **array, int64_t *capacity, int64_t wanted, size_t element_size);

static inline kv_sequence_state *kv_step_state(const kv_step *step, int32_t i) {
    return &step->cache->sequences.states[step->sequences[i].place];
}

/* ---- slots: what a step takes from the pools, in the order of a transaction -------------------- */

/* Counts the blocks that the step's sequences need. KV_ERR_OUT_OF_BLOCKS when a pool has too few. */
kv_status kv_step_count_blocks(kv_step *step, kv_shortage *shortage);
/* Makes room for the plans' arrays. */
kv_status kv_step_reserve_buffer(kv_step *step);
/* Takes the blocks and writes the plans' arrays. */
void kv_step_take_slots(kv_step *step);
/* Undoes kv_step_take_slots, so that the pools hand out the same blocks again. */
void kv_step_return_slots(kv_step *step);
/* Lets go of the blocks that copies replaced, and counts the restored rows. */
void kv_step_keep_slots(kv_step *step);

/* Fills step->plans once the slots are taken. */
void kv_step_fill_plans(kv_step *step);

#endif
