/* The step transaction: reserve slots for new tokens, then commit or roll back. */
#ifndef KV_STEP_H
#define KV_STEP_H

#include "cache.h"

typedef struct kv_step_sequence {
    int32_t place; /* in the cache's sequence table */
    int32_t old_length, num_new;
    int has_tokens;
    uint32_t copy_groups; /* bit g: its last block of group g is copied before it is written */
} kv_step_sequence;

typedef struct kv_step_group {
    int64_t num_copies, num_new_blocks;
    int32_t *slots, *copies, *new_blocks; /* in the step's buffer */
    const int32_t **block_rows;           /* [num_sequences], in the step's pointers */
} kv_step_group;

struct kv_step {
    kv_cache *cache;
    kv_step *previous, *next; /* among the open steps, or the spare ones */
    int open;
    int32_t num_sequences, num_tokens, max_new;
    kv_step_sequence *sequences; /* [num_sequences] */
    int32_t sequence_capacity;
    kv_step_group *groups; /* [num_groups] */
    uint8_t *appended;     /* [num_layers] */
    int32_t *buffer;       /* query starts, sequence lengths, then each group's arrays */
    int64_t buffer_size, buffer_capacity;
    const int32_t **pointers; /* [num_groups, num_sequences] */
    int64_t pointer_capacity;
};

void kv_step_free_memory(kv_step *step);

#endif
