/* A tile: the query rows of one unit, loaded, and their pass over the unit's splits. */
#ifndef KVCORE_CORE_ATTEND_TILE_H
#define KVCORE_CORE_ATTEND_TILE_H

#include "attend_work.h"

/* What all tiles of one call of kv_attend have in common. */
typedef struct kv_attend_call {
    const kv_kernels *kernels;
    const kv_plan *plan;
    const kv_rows *q, *out;
    const kv_blocks *k, *v;
    const kv_attend_options *options;
    float *lse;
    kv_sight sight;
    kv_shares shares;
    int32_t group_size, q_width, o_width;
    int32_t block_shift; /* log2 of block_size */
    int32_t dots;        /* of tasks with KV_DOT_TOKENS new tokens or more: kv_split_task */
    int decodes;         /* whether K or V is quantized */
    int undecoded;       /* ... and few rows read it undecoded */
    float *states;       /* [state_rows] o, then m, then l: what shared prefixes come to */
    int64_t state_rows;
} kv_attend_call;

/* What a part works in: pointers into its scratch, and the tile at hand. */
typedef struct kv_tile {
    float *q, *panels, *encoded, *scores, *decoded;
    kv_partial state, partial;
    kv_view views[KV_TILE_ROWS];   /* what a row sees in all */
    int32_t visible[KV_TILE_ROWS]; /* the end of what it sees in the split at hand */
    uint32_t seen[KV_TILE_ROWS][KV_SPLIT_WORDS];
    float slopes[KV_TILE_ROWS], distances[KV_TILE_ROWS];
    uint8_t repeats[KV_TILE_ROWS]; /* whether it is of the same token as the row before */
    float places[KV_SPLIT];        /* where the split's keys stand, if not where they are stored */
    kv_split_runs runs[2];         /* of this split and of the next */
} kv_tile;

/* Floats of scratch that a tile of up to num_rows rows takes; with `base`, also hands them out. */
int64_t kv_tile_lay_out(const kv_attend_call *call, int32_t num_rows, float *base, kv_tile *tile);

/* Partials from row `row` on of `floats`, which holds num_rows rows: o, then m, then l. */
kv_partial kv_partial_at(float *floats, int64_t num_rows, int32_t o_width, int64_t row);

/* Loads the queries of the unit's rows and what they see. */
void kv_tile_load(const kv_attend_call *call, const kv_unit *unit, kv_tile *tile);

/* The rows of a split, counted from the unit's first, as runs inside blocks. */
void kv_tile_locate_split(const kv_attend_call *call, const kv_unit *unit, int32_t split,
                          kv_split_runs *runs);

/* The tile over one split, whose runs are tile->runs[0], into `into`. */
void kv_tile_run_split(const kv_attend_call *call, const kv_unit *unit, int32_t split,
                       kv_tile *tile, const kv_partial *into);

/* Row r of the unit is done, its state being the first of `state`: writes its output, or keeps the
 * state for the second line when the unit is a share's. */
void kv_tile_finish_row(const kv_attend_call *call, const kv_unit *unit, int32_t r,
                        const kv_partial *state);

#endif
