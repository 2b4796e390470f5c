/* Which tokens of its sequence a new token sees: causality, masks and windows. */
#ifndef KVCORE_CORE_ATTEND_SIGHT_H
#define KVCORE_CORE_ATTEND_SIGHT_H

#include "kernels/kernels.h"

typedef struct kv_sight {
    const kv_plan *plan;
    const kv_attend_options *options;
    int narrowed; /* a mask or a window: what a token sees is not a prefix of what later ones see */
} kv_sight;

/* Tokens [begin, end) of a sequence; empty as [0, 0). */
typedef struct kv_span {
    int32_t begin, end;
} kv_span;

static inline kv_sight kv_sight_of(const kv_plan *plan, const kv_attend_options *options) {
    return (kv_sight){plan, options, options->window > 0 || options->mask};
}

/* Where a query stands, by the caller's positions or by storage. */
int64_t kv_query_position(const kv_sight *sight, int32_t s, int32_t token);

/* The shortest span that holds all that new token `token` of sequence s sees. */
kv_span kv_visible_span(const kv_sight *sight, int32_t s, int32_t token);

/* The dense mask row of a new token, [seq_len]; NULL for a sequence without a mask. */
const uint8_t *kv_mask_row(const kv_sight *sight, int32_t s, int32_t token);

/* Sets bit t % 32 of word t / 32 for each token begin + t of a split that is seen, given the
 * token's span and mask row. Returns the end of what is seen, counted from `begin`. */
int32_t kv_visible_bits(kv_span span, const uint8_t *mask, int32_t begin,
                        uint32_t words[KV_SPLIT_WORDS]);

#endif
