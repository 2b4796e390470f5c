#include "attend_line.h"

#include "threads.h"

#include <string.h>

/* Some 30 microseconds' worth: less is not worth waking a thread for. */
enum { PART_WORK = 1 << 20 }; /* cost * head_dim */

enum { MAX_SLOT_BYTES = 64 << 20 };

static int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* ---- parts ----------------------------------------------------------------------------------- */

static kv_partial slot_at(const kv_line *line, int64_t row) {
    return kv_partial_at(line->slots, line->slot_rows, line->call->o_width, row);
}

static kv_partial row_of(const kv_line *line, const kv_partial *rows, int32_t r) {
    return (kv_partial){rows->m + r, rows->l + r, rows->o + (int64_t)r * line->call->o_width};
}

/* Where splits of a unit go from the first cut on. */
static kv_partial split_slot(const kv_line *line, const kv_cut *cut, int32_t split) {
    const int64_t slot = split - cut->first_split + 1;
    return slot_at(line, cut->first_slot_row + slot * line->units[cut->unit].num_rows);
}

/* The split after (unit, split) that this part reads; nothing at its end. */
static void locate_next(const kv_line *line, int32_t unit, int32_t split, int32_t stop,
                        const kv_bound *end, kv_split_runs *runs) {
    runs->num_runs = 0;
    if (split + 1 < stop)
        kv_tile_locate_split(line->call, &line->units[unit], split + 1, runs);
    else if (unit + 1 < end->unit || (unit + 1 == end->unit && end->split > 0))
        kv_tile_locate_split(line->call, &line->units[unit + 1], 0, runs);
}

/* What the unit goes on from; returns whether there is anything. */
static int take_state(const kv_line *line, const kv_unit *unit, const kv_partial *state) {
    const kv_attend_call *call = line->call;
    if (unit->share >= 0 || unit->state_row < 0)
        return 0;
    const kv_partial kept =
        kv_partial_at(call->states, call->state_rows, call->o_width, unit->state_row);
    const size_t rows = (size_t)unit->num_rows;
    memcpy(state->m, kept.m, rows * sizeof(float));
    memcpy(state->l, kept.l, rows * sizeof(float));
    memcpy(state->o, kept.o, rows * (size_t)call->o_width * sizeof(float));
    return 1;
}

/* Splits [begin, stop) of a unit. The first part of a unit folds them; a later part stores them. */
static void run_unit(const kv_line *line, int32_t u, int32_t begin, int32_t stop,
                     const kv_bound *end, const kv_cut *cut, kv_tile *t) {
    const kv_attend_call *call = line->call;
    const kv_unit *unit = &line->units[u];
    const kv_partial state = cut ? slot_at(line, cut->first_slot_row) : t->state;
    int started = begin == 0 && take_state(line, unit, &state);
    kv_tile_load(call, unit, t);
    kv_tile_locate_split(call, unit, begin, &t->runs[0]);
    for (int32_t split = begin; split < stop; split++) {
        locate_next(line, u, split, stop, end, &t->runs[1]);
        if (begin > 0) {
            const kv_partial slot = split_slot(line, cut, split);
            kv_tile_run_split(call, unit, split, t, &slot);
        } else if (!started) {
            kv_tile_run_split(call, unit, split, t, &state);
            started = 1;
        } else {
            kv_tile_run_split(call, unit, split, t, &t->partial);
            call->kernels->merge_partial(&state, &t->partial, unit->num_rows, call->o_width);
        }
        t->runs[0] = t->runs[1];
    }
    for (int32_t r = 0; r < unit->num_rows && !cut; r++) {
        const kv_partial row = row_of(line, &state, r);
        kv_tile_finish_row(call, unit, r, &row);
    }
}

static void run_part(void *context, int32_t part) {
    const kv_line *line = context;
    const kv_bound *begin = &line->bounds[part], *end = begin + 1;
    kv_tile t;
    float *scratch = (float *)(line->scratch + part * line->scratch_bytes);
    kv_tile_lay_out(line->call, line->tile_rows, scratch, &t);
    for (int32_t u = begin->unit; u < end->unit || (u == end->unit && end->split > 0); u++) {
        const int starts_inside = u == begin->unit && begin->split > 0;
        const int stops_inside = u == end->unit;
        const int32_t cut = starts_inside ? begin->cut : stops_inside ? end->cut : -1;
        run_unit(line, u, starts_inside ? begin->split : 0,
                 stops_inside ? end->split : kv_num_splits(&line->units[u]), end,
                 cut >= 0 ? &line->cuts[cut] : NULL, &t);
    }
}

/* Joins the partials of the units that were cut, split after split: rows of all cut units, divided
 * evenly. */
static void join_part(void *context, int32_t part) {
    const kv_line *line = context;
    const int64_t count = (int64_t)line->num_cuts * KV_TILE_ROWS;
    const int64_t end = kv_part_begin(count, part + 1, line->num_join_parts);
    for (int64_t i = kv_part_begin(count, part, line->num_join_parts); i < end; i++) {
        const kv_cut *cut = &line->cuts[i / KV_TILE_ROWS];
        const kv_unit *unit = &line->units[cut->unit];
        const int32_t r = (int32_t)(i % KV_TILE_ROWS), num_splits = kv_num_splits(unit);
        if (r >= unit->num_rows)
            continue;
        const kv_partial state = slot_at(line, cut->first_slot_row + r);
        for (int32_t split = cut->first_split; split < num_splits; split++) {
            const kv_partial slot = split_slot(line, cut, split);
            const kv_partial partial = row_of(line, &slot, r);
            line->call->kernels->merge_partial(&state, &partial, 1, line->call->o_width);
        }
        kv_tile_finish_row(line->call, unit, r, &state);
    }
}

/* ---- the line -------------------------------------------------------------------------------- */

void kv_line_cut(kv_line *line, int64_t cost) {
    for (int64_t u = 0; u < line->num_units; u++)
        if (line->units[u].num_rows > line->tile_rows)
            line->tile_rows = line->units[u].num_rows;
    line->num_parts = kv_num_parts(cost, PART_WORK / line->call->k->head_dim);
    const int64_t row_bytes = (line->call->o_width + 2) * (int64_t)sizeof(float);
    line->num_cuts =
        kv_cut_work(line->units, &line->num_units, line->num_parts, MAX_SLOT_BYTES / row_bytes,
                    line->bounds, line->cuts, &line->slot_rows);
}

int64_t kv_line_nbytes(kv_line *line) {
    const int64_t slots = line->slot_rows * (line->call->o_width + 2);
    kv_tile unused;
    const int64_t floats = kv_tile_lay_out(line->call, line->tile_rows, NULL, &unused);
    line->scratch_bytes = round_up(floats * (int64_t)sizeof(float), 64);
    return line->scratch_bytes * line->num_parts + round_up(slots * (int64_t)sizeof(float), 64);
}

void kv_line_run(kv_line *line, char *memory) {
    line->scratch = memory;
    line->slots = (float *)(memory + line->scratch_bytes * line->num_parts);
    kv_run_parts(line->num_parts, run_part, line);
    line->num_join_parts = kv_num_parts(line->slot_rows * line->call->o_width, PART_WORK);
    if (line->num_cuts > 0)
        kv_run_parts(line->num_join_parts, join_part, line);
}
