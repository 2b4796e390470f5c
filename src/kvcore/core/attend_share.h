/* Sequences of one call that begin with the same physical blocks, so that these need to be read only
 * once for all their queries. */
#ifndef KVCORE_CORE_ATTEND_SHARE_H
#define KVCORE_CORE_ATTEND_SHARE_H

#include "attend_sight.h"

/* A shared prefix: its members all see every token of their first num_splits splits, and these lie
 * in the same blocks. */
typedef struct kv_share {
    int32_t first_member, num_members;
    int32_t num_splits;
    int32_t num_rows;    /* query rows of all members, for one KV head */
    int32_t rows_before; /* ... of all shares before */
} kv_share;

typedef struct kv_shares {
    kv_share *list;
    int32_t count;
    int32_t *members;    /* sequences, share after share */
    int32_t *first_rows; /* [members] rows of the share's members before this one */
    int32_t *share_of;   /* [S] -1: the sequence shares nothing */
    int32_t *member_of;  /* [S] its place in `members` */
} kv_shares;

/* Bytes that the arrays for num_sequences take. */
int64_t kv_shares_nbytes(int32_t num_sequences);

/* Fills `out`, whose arrays lie in `memory`. Where several cuts are possible, that which spares the
 * most reading is taken. */
void kv_find_shares(const kv_sight *sight, int32_t group_size, void *memory, kv_shares *out);

/* The member that a row of a share belongs to. */
int32_t kv_share_member(const kv_shares *shares, const kv_share *share, int32_t row);

#endif
