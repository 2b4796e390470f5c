/* Which tokens of its sequence a new token sees: causality, masks and windows. */
#ifndef KVCORE_CORE_ATTEND_SIGHT_H
#define KVCORE_CORE_ATTEND_SIGHT_H

#include "kernels/kernels.h"

typedef struct kv_sight {
    const kv_plan *plan;
    const kv_attend_options *options;
    int narrowed; /* a mask or a window: what a token sees is not a prefix of what later ones see */
    int moved;    /* positions are given, and a token does not stand where it is stored */
    const kv_blocks *quantized; /* K or V where some of it is read raw; NULL: there is none */
} kv_sight;

/* Tokens [begin, end) of a sequence; empty as [0, 0). */
typedef struct kv_span {
    int32_t begin, end;
} kv_span;

/* What one new token sees. */
typedef struct kv_view {
    kv_span span;          /* holds all of it; all in it is seen unless `mask` or `placed` is set */
    int64_t position;      /* of the query */
    const uint8_t *mask;   /* a bit for each key, the lowest of a byte first; NULL: no mask */
    const int32_t *placed; /* positions of the keys from first_placed on, where they matter to a
                              window; NULL: keys stand where they are stored */
    int32_t first_placed, window;
} kv_view;

kv_sight kv_sight_of(const kv_plan *plan, const kv_attend_options *options);

/* From this key on new token `token` of sequence s reads raw rows, beside raw_first; INT32_MAX where
 * it reads none. */
int32_t kv_raw_begin(const kv_sight *sight, int32_t s, int32_t token);

kv_view kv_look(const kv_sight *sight, int32_t s, int32_t token);

/* The shortest span that holds all that new tokens [first, last] of sequence s see. */
kv_span kv_joint_span(const kv_sight *sight, int32_t s, int32_t first, int32_t last);

/* Whether a view has gaps. */
static inline int kv_is_scattered(const kv_view *view) { return view->mask || view->placed; }

/* Sets bit t % 32 of word t / 32 for each token begin + t of a split that is seen. Returns the end of
 * what is seen, counted from `begin`. */
int32_t kv_visible_bits(const kv_view *view, int32_t begin, uint32_t words[KV_SPLIT_WORDS]);

/* Where the keys of a split stand, counted from its first token, into places[KV_SPLIT]. Returns 0,
 * and sets nothing, when they stand where they are stored. */
int kv_key_places(const kv_sight *sight, int32_t s, int32_t begin, float *places);

/* Bytes of a mask row over seq_len keys. */
static inline int64_t kv_mask_row_bytes(int32_t seq_len) { return ((int64_t)seq_len + 7) / 8; }

#endif
