#include "attend_work.h"

#include <string.h>

enum {
    TOKEN_COST = 4, /* reading a token of K and V costs about as much as four rows' arithmetic */
    WHOLE_UNITS = 8 /* a unit below 1 / WHOLE_UNITS of a part's cost is not cut */
};

static int64_t num_query_rows(const kv_plan *plan, int32_t s, int32_t group_size) {
    return (int64_t)(plan->query_starts[s + 1] - plan->query_starts[s]) * group_size;
}

static int64_t num_tiles(int64_t num_rows) { return (num_rows + KV_TILE_ROWS - 1) / KV_TILE_ROWS; }

/* Rows of the tile of sequence s that begins with `row`. All of them read the same keys raw. */
static int32_t tile_rows(const kv_work *work, int32_t s, int64_t row) {
    const kv_sight *sight = work->sight;
    const int64_t left = num_query_rows(sight->plan, s, work->group_size) - row;
    const int32_t most = left < KV_TILE_ROWS ? (int32_t)left : KV_TILE_ROWS;
    if (!sight->quantized)
        return most;
    const int32_t first = (int32_t)(row / work->group_size);
    const int32_t begin = kv_raw_begin(sight, s, first);
    int32_t token = first + 1;
    while ((int64_t)(token - first) * work->group_size < most &&
           kv_raw_begin(sight, s, token) == begin)
        token++;
    const int64_t same = (int64_t)token * work->group_size - row;
    return same < most ? (int32_t)same : most;
}

static int64_t count_tiles(const kv_work *work, int32_t s) {
    const int64_t num_rows = num_query_rows(work->sight->plan, s, work->group_size);
    if (!work->sight->quantized)
        return num_tiles(num_rows);
    int64_t tiles = 0;
    for (int64_t row = 0; row < num_rows; row += tile_rows(work, s, row))
        tiles++;
    return tiles;
}

int64_t kv_count_units(const kv_work *work) {
    int64_t tiles = 0;
    for (int32_t s = 0; s < work->sight->plan->num_sequences; s++)
        tiles += count_tiles(work, s);
    return tiles * work->num_heads;
}

int64_t kv_count_shared_units(const kv_work *work) {
    int64_t tiles = 0;
    for (int32_t i = 0; i < work->shares->count; i++)
        tiles += num_tiles(work->shares->list[i].num_rows);
    return tiles * work->num_heads;
}

int64_t kv_count_state_rows(const kv_work *work) {
    if (work->shares->count == 0)
        return 0;
    const kv_share *last = &work->shares->list[work->shares->count - 1];
    return (int64_t)(last->rows_before + last->num_rows) * work->num_heads;
}

static int64_t row_cost(const kv_unit *unit) { return unit->num_rows + TOKEN_COST; }

/* Where everything lies that the unit's rows see. */
static void find_span(const kv_sight *sight, int32_t group_size, kv_unit *unit) {
    const int32_t last = (unit->first_row + unit->num_rows - 1) / group_size;
    const kv_span span = kv_joint_span(sight, unit->sequence, unit->first_row / group_size, last);
    unit->begin = span.begin;
    unit->end = span.end;
}

/* Sets where the unit stands on the line; returns where the next one does. */
static int64_t place_unit(kv_unit *unit, int64_t start) {
    unit->start = start;
    return start + row_cost(unit) * (unit->end - unit->begin / KV_SPLIT * KV_SPLIT);
}

static kv_unit tile_at(int64_t row, int32_t num_rows, int32_t head) {
    return (kv_unit){.share = -1,
                     .head = head,
                     .first_row = (int32_t)row,
                     .num_rows = num_rows,
                     .raw_begin = INT32_MAX,
                     .state_row = -1};
}

/* Leaves out what the first line has read; there is always something after it. */
static void skip_shared(const kv_work *work, kv_unit *unit) {
    const kv_shares *shares = work->shares;
    const kv_share *share = &shares->list[shares->share_of[unit->sequence]];
    unit->begin = share->num_splits * KV_SPLIT;
    unit->state_row = (int64_t)share->rows_before * work->num_heads +
                      (int64_t)share->num_rows * unit->head +
                      shares->first_rows[shares->member_of[unit->sequence]] + unit->first_row;
}

int64_t kv_list_units(const kv_work *work, kv_unit *units) {
    const kv_plan *plan = work->sight->plan;
    int64_t cost = 0;
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        const int64_t num_rows = num_query_rows(plan, s, work->group_size);
        const int64_t tiles = count_tiles(work, s);
        const int shares = work->shares->count > 0 && work->shares->share_of[s] >= 0;
        for (int32_t head = 0; head < work->num_heads; head++)
            for (int64_t row = 0; row < num_rows; row += units[-1].num_rows) {
                kv_unit *unit = units++;
                if (head == 0) {
                    *unit = tile_at(row, tile_rows(work, s, row), head);
                    unit->sequence = s;
                    unit->raw_begin =
                        kv_raw_begin(work->sight, s, (int32_t)(row / work->group_size));
                    find_span(work->sight, work->group_size, unit);
                } else {
                    *unit = unit[-tiles];
                    unit->head = head;
                }
                if (shares)
                    skip_shared(work, unit);
                cost = place_unit(unit, cost);
            }
    }
    units->start = cost;
    return cost;
}

int64_t kv_list_shared_units(const kv_work *work, kv_unit *units) {
    int64_t cost = 0, state_row = 0;
    for (int32_t i = 0; i < work->shares->count; i++) {
        const kv_share *share = &work->shares->list[i];
        for (int32_t head = 0; head < work->num_heads; head++)
            for (int64_t row = 0; row < share->num_rows; row += KV_TILE_ROWS) {
                kv_unit *unit = units++;
                const int64_t left = share->num_rows - row;
                *unit = tile_at(row, left < KV_TILE_ROWS ? (int32_t)left : KV_TILE_ROWS, head);
                unit->share = i;
                unit->sequence = work->shares->members[share->first_member];
                unit->end = share->num_splits * KV_SPLIT;
                unit->state_row = state_row;
                state_row += unit->num_rows;
                cost = place_unit(unit, cost);
            }
    }
    units->start = cost;
    return cost;
}

/* The last unit that starts at or before `target`. */
static int64_t find_unit(const kv_unit *units, int64_t num_units, int64_t target) {
    int64_t low = 0, high = num_units - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (units[middle].start <= target)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* The unit's start or its end, whichever is nearer to what is `into` of its cost. */
static kv_bound whole_bound(int64_t u, int64_t into, int64_t cost) {
    return (kv_bound){(int32_t)(2 * into < cost ? u : u + 1), 0, -1};
}

/* Slots that a unit has from its first cut on. */
static int64_t num_slot_rows(const kv_unit *unit, int32_t split) {
    return (int64_t)(kv_num_splits(unit) - split + 1) * unit->num_rows;
}

static kv_bound split_bound(const kv_unit *units, int64_t u, int64_t into) {
    const int64_t split_cost = row_cost(&units[u]) * KV_SPLIT;
    const int32_t split = (int32_t)((into + split_cost / 2) / split_cost);
    return split >= kv_num_splits(&units[u]) ? (kv_bound){(int32_t)u + 1, 0, -1}
                                             : (kv_bound){(int32_t)u, split, -1};
}

/* Cuts a unit in two between rows. */
static kv_bound row_bound(kv_unit *units, int64_t *num_units, int64_t u, int64_t into,
                          int64_t cost) {
    kv_unit *unit = &units[u];
    const int64_t rows = unit->num_rows;
    const int32_t row =
        (int32_t)((into * rows / cost + KV_MANY_ROWS / 2) / KV_MANY_ROWS * KV_MANY_ROWS);
    if (row == 0 || row >= rows)
        return (kv_bound){(int32_t)(row == 0 ? u : u + 1), 0, -1};
    memmove(unit + 1, unit, (size_t)(*num_units + 1 - u) * sizeof(*unit));
    ++*num_units;
    unit[0].num_rows = row;
    unit[1].num_rows -= row;
    unit[1].first_row += row;
    unit[1].state_row += unit[1].state_row >= 0 ? row : 0;
    unit[1].start += cost * row / rows;
    return (kv_bound){(int32_t)u + 1, 0, -1};
}

/* The possible bound that is nearest to `target` on the line. most_slot_rows: of one cut. */
static kv_bound nearest_bound(kv_unit *units, int64_t *num_units, int64_t target, int64_t part_cost,
                              int64_t most_slot_rows) {
    const int64_t u = find_unit(units, *num_units, target);
    const int64_t cost = units[u + 1].start - units[u].start, into = target - units[u].start;
    if (cost * WHOLE_UNITS <= part_cost)
        return whole_bound(u, into, cost);
    const kv_bound bound = split_bound(units, u, into);
    if (bound.split == 0 || num_slot_rows(&units[u], bound.split) <= most_slot_rows)
        return bound;
    if (units[u].num_rows >= 2 * KV_MANY_ROWS)
        return row_bound(units, num_units, u, into, cost);
    return whole_bound(u, into, cost);
}

static int32_t cut_work(kv_unit *units, int64_t *num_units, int32_t num_parts,
                        int64_t most_slot_rows, kv_bound *bounds, kv_cut *cuts,
                        int64_t *slot_rows) {
    const int64_t total = units[*num_units].start;
    int32_t num_cuts = 0;
    *slot_rows = 0;
    bounds[0] = (kv_bound){0, 0, -1};
    for (int32_t part = 1; part < num_parts; part++) {
        kv_bound *bound = &bounds[part];
        *bound = bound[-1];
        if (bound->unit == *num_units) /* a bound before may have been moved to the end */
            continue;
        const int64_t before = units[bound->unit].start;
        const int64_t target = total / num_parts * part + total % num_parts * part / num_parts;
        *bound = nearest_bound(units, num_units, target > before ? target : before,
                               total / num_parts, most_slot_rows);
        if (bound->split == 0)
            continue;
        if (num_cuts == 0 || cuts[num_cuts - 1].unit != bound->unit) {
            cuts[num_cuts++] = (kv_cut){bound->unit, bound->split, *slot_rows};
            *slot_rows += num_slot_rows(&units[bound->unit], bound->split);
        }
        bound->cut = num_cuts - 1;
    }
    bounds[num_parts] = (kv_bound){(int32_t)*num_units, 0, -1};
    return num_cuts;
}

int32_t kv_cut_work(kv_unit *units, int64_t *num_units, int32_t num_parts, int64_t most_slot_rows,
                    kv_bound *bounds, kv_cut *cuts, int64_t *slot_rows) {
    const int32_t num_cuts =
        cut_work(units, num_units, num_parts, INT64_MAX, bounds, cuts, slot_rows);
    return *slot_rows <= most_slot_rows
               ? num_cuts
               : cut_work(units, num_units, num_parts, most_slot_rows / num_parts, bounds, cuts,
                          slot_rows);
}
