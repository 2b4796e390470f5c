/* How the work of one attention call is divided. A unit is one tile of query rows of one KV head; it
 * runs over the splits of its keys. All splits of all units lie on a line, which is cut into parts
 * of equal cost. A cut may fall inside a unit: its splits after the cut are then kept as separate
 * partials and merged in order at the end, so that where cuts fall never shows. Where these would take
 * too much memory, units are cut between rows, which needs none, but lets two parts read the same.
 *
 * A call has one line, or two where sequences share prefixes: the first runs over these for the rows
 * of all that share them, and the second goes on from there for each sequence alone. */
#ifndef KVCORE_CORE_ATTEND_WORK_H
#define KVCORE_CORE_ATTEND_WORK_H

#include "attend_share.h"

typedef struct kv_unit {
    int32_t share;               /* the share whose rows these are, or -1: those of one sequence */
    int32_t sequence, head;      /* whose blocks are read; KV head */
    int32_t first_row, num_rows; /* rows count (member of the share, new token, query head of the
                                    group), the first being the slowest */
    int32_t begin, end;          /* tokens between which lies all that its rows see here */
    int32_t raw_begin;           /* from this token on all its rows read raw rows */
    int64_t state_row; /* where the rows' states over a shared prefix are kept; -1: there is none */
    int64_t start;     /* cost of all units before */
} kv_unit;

/* Where a part begins: at a split of a unit. */
typedef struct kv_bound {
    int32_t unit, split;
    int32_t cut; /* index of the unit's kv_cut; -1 when the part begins with a whole unit */
} kv_bound;

/* A unit that several parts share. Its partials are slots: first what the first part has folded,
 * then one for each later split. */
typedef struct kv_cut {
    int32_t unit, first_split; /* the first split that has a slot of its own */
    int64_t first_slot_row;    /* rows of all slots before */
} kv_cut;

/* What the units of a call depend on. */
typedef struct kv_work {
    const kv_sight *sight;
    const kv_shares *shares;
    int32_t num_heads, group_size; /* KV heads; query heads of each */
} kv_work;

/* The units of each line. */
int64_t kv_count_units(const kv_work *work);
int64_t kv_count_shared_units(const kv_work *work);

/* Fill units[count + 1], the last being an end mark, and return the cost of all. */
int64_t kv_list_units(const kv_work *work, kv_unit *units);
int64_t kv_list_shared_units(const kv_work *work, kv_unit *units);

/* Rows of all states that the first line leaves for the second. */
int64_t kv_count_state_rows(const kv_work *work);

/* The first split that a unit reads; its splits are counted from there. */
static inline int32_t kv_first_split(const kv_unit *unit) { return unit->begin / KV_SPLIT; }

/* At least one, so that every unit has a place on the line. */
static inline int32_t kv_num_splits(const kv_unit *unit) {
    const int64_t last = ((int64_t)unit->end + KV_SPLIT - 1) / KV_SPLIT;
    return last > kv_first_split(unit) ? (int32_t)last - kv_first_split(unit) : 1;
}

/* Fills bounds[num_parts + 1] and at most num_parts - 1 cuts; returns how many cuts there are.
 * *slot_rows is the number of rows that all slots have, at most most_slot_rows. Cuts between rows add
 * up to num_parts - 1 units, for which `units` has room. */
int32_t kv_cut_work(kv_unit *units, int64_t *num_units, int32_t num_parts, int64_t most_slot_rows,
                    kv_bound *bounds, kv_cut *cuts, int64_t *slot_rows);

#endif
