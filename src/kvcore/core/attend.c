/* kv_attend: divides the work, runs tiles and joins what was cut. */

#include "attend_check.h"
#include "attend_work.h"
#include "dispatch.h"
#include "storage.h"
#include "threads.h"
#include "workspace.h"

#include <math.h>
#include <string.h>

enum {
    /* Some 30 microseconds' worth: less is not worth waking a thread for. */
    PART_WORK = 1 << 20,     /* cost * head_dim */
    ZERO_BYTES = 1024 * 1024 /* of padding */
};

/* One call. Buffers of the workspace: 0 holds the lists, 1 the scratch. */
typedef struct attend_call {
    const kv_kernels *kernels;
    const kv_plan *plan;
    const kv_rows *q, *out;
    const kv_blocks *k, *v;
    const kv_attend_options *options;
    kv_sight sight;
    float *lse;
    int32_t group_size, q_width, o_width;
    int32_t block_shift; /* log2 of block_size */

    kv_unit *units;
    kv_bound *bounds;
    kv_cut *cuts;
    int64_t num_units, slot_rows;
    int32_t tile_rows; /* of the unit that has the most */
    int32_t num_parts, num_cuts, num_join_parts;

    float *slots;  /* [slot_rows] o, then m, then l */
    char *scratch; /* [num_parts] of scratch_bytes */
    int64_t scratch_bytes;
} attend_call;

/* What one part works in: pointers into its scratch, and the tile at hand. */
typedef struct tile {
    float *q, *scores, *decoded;
    kv_partial state, partial;
    kv_span spans[KV_TILE_ROWS];        /* what a row sees in all */
    const uint8_t *masks[KV_TILE_ROWS]; /* ... and of that, where not NULL */
    int32_t visible[KV_TILE_ROWS];      /* the end of what it sees in the split at hand */
    uint32_t seen[KV_TILE_ROWS][KV_SPLIT_WORDS];
    float slopes[KV_TILE_ROWS], distances[KV_TILE_ROWS];
    int64_t positions[KV_TILE_ROWS];
    kv_split_runs runs[2]; /* of this split and of the next */
} tile;

/* ---- a tile ---------------------------------------------------------------------------------- */

static int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* Floats of one part's scratch; with `base`, also hands them out. */
static int64_t lay_out_tile(const attend_call *call, float *base, tile *t) {
    const int64_t q_width = call->q_width, o_width = call->o_width;
    const int64_t rows = round_up(call->tile_rows, KV_ROW_ALIGN); /* keeps every buffer aligned */
    const int64_t widest = q_width > o_width ? q_width : o_width;
    const int64_t sizes[] = {rows * q_width,
                             rows * KV_SPLIT,
                             KV_RUN * widest,
                             rows * o_width,
                             rows,
                             rows,
                             rows * o_width,
                             rows,
                             rows};
    float **const places[] = {&t->q,       &t->scores,    &t->decoded,   &t->state.o,  &t->state.m,
                              &t->state.l, &t->partial.o, &t->partial.m, &t->partial.l};
    int64_t used = 0;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        if (base)
            *places[i] = base + used;
        used += sizes[i];
    }
    return used;
}

/* The new token and query head of a unit's row. */
static void locate_row(const attend_call *call, const kv_unit *unit, int32_t r, int32_t *token,
                       int32_t *head) {
    const int32_t row = unit->first_row + r;
    *token = row / call->group_size;
    *head = unit->head * call->group_size + row % call->group_size;
}

static void load_queries(const attend_call *call, const kv_unit *unit, tile *t) {
    const kv_rows *q = call->q;
    const int32_t *starts = call->plan->query_starts, s = unit->sequence;
    const float scale = call->options->scale;
    for (int32_t r = 0; r < unit->num_rows; r++) {
        int32_t token, head;
        float *row = t->q + (int64_t)r * call->q_width;
        locate_row(call, unit, r, &token, &head);
        call->kernels->convert(kv_row(q, starts, s, token) +
                                   head * q->head_stride * kv_dtype_bytes(q->dtype),
                               kv_dtype_format(q->dtype), row, KV_FORMAT_FP32, q->head_dim);
        for (int32_t d = 0; d < q->head_dim; d++)
            row[d] *= scale;
        for (int32_t d = q->head_dim; d < call->q_width; d++)
            row[d] = 0.0f;
    }
}

/* What each row sees and where it stands. */
static void load_sight(const attend_call *call, const kv_unit *unit, tile *t) {
    for (int32_t r = 0; r < unit->num_rows; r++) {
        int32_t token, head;
        locate_row(call, unit, r, &token, &head);
        if (r > 0 && head > unit->head * call->group_size) { /* the same token as before */
            t->spans[r] = t->spans[r - 1];
            t->masks[r] = t->masks[r - 1];
            t->positions[r] = t->positions[r - 1];
        } else {
            t->spans[r] = kv_visible_span(&call->sight, unit->sequence, token);
            t->masks[r] = kv_mask_row(&call->sight, unit->sequence, token);
            t->positions[r] = kv_query_position(&call->sight, unit->sequence, token);
        }
        if (call->options->alibi_slopes)
            t->slopes[r] = call->options->alibi_slopes[head];
    }
}

/* The rows of a split as runs inside blocks. */
static void locate_split(const attend_call *call, const kv_unit *unit, int32_t split,
                         kv_split_runs *runs) {
    const int32_t *block_row = call->plan->block_rows[unit->sequence];
    const int32_t block_size = call->k->block_size, mask = block_size - 1;
    const int32_t longest = block_size < KV_RUN ? block_size : KV_RUN;
    const int32_t begin = (kv_first_split(unit) + split) * KV_SPLIT, left = unit->end - begin;
    const int32_t count = left < KV_SPLIT ? left : KV_SPLIT;
    runs->start = unit->begin > begin ? (unit->begin - begin) & -longest : 0;
    runs->num_runs = 0;
    for (int32_t j = runs->start; j < count; j += longest) {
        const int32_t block = block_row[(begin + j) >> call->block_shift];
        const int32_t offset = (begin + j) & mask;
        const int32_t length = count - j < longest ? count - j : longest;
        runs->k[runs->num_runs] = (kv_run){kv_block_row(call->k, block, unit->head, offset),
                                           call->k->token_stride, length};
        runs->v[runs->num_runs] = (kv_run){kv_block_row(call->v, block, unit->head, offset),
                                           call->v->token_stride, length};
        runs->num_runs++;
    }
}

/* Sets what each row sees of a split. Returns whether that is all up to its `visible`, which never
 * decreases; `seen` is then not set. */
static int find_visible(const kv_unit *unit, int32_t begin, tile *t) {
    int prefixes = 1;
    for (int32_t r = 0; r < unit->num_rows; r++) {
        const int32_t end = t->spans[r].end - begin;
        t->visible[r] = end < 0 ? 0 : end < KV_SPLIT ? end : KV_SPLIT;
        prefixes &= !t->masks[r] && t->spans[r].begin <= begin &&
                    (r == 0 || t->visible[r] >= t->visible[r - 1]);
    }
    for (int32_t r = 0; r < unit->num_rows && !prefixes; r++)
        t->visible[r] = kv_visible_bits(t->spans[r], t->masks[r], begin, t->seen[r]);
    return prefixes;
}

static void run_split(const attend_call *call, const kv_unit *unit, int32_t split, tile *t,
                      const kv_partial *into) {
    const int32_t begin = (kv_first_split(unit) + split) * KV_SPLIT;
    if (unit->begin == unit->end) { /* there may be nothing to read at all */
        memset(into->l, 0, (size_t)unit->num_rows * sizeof(float));
        return;
    }
    for (int32_t r = 0; r < unit->num_rows; r++)
        t->distances[r] = (float)(t->positions[r] - begin);
    const int prefixes = find_visible(unit, begin, t);
    const kv_split_task task = {.q = t->q,
                                .num_rows = unit->num_rows,
                                .q_width = call->q_width,
                                .o_width = call->o_width,
                                .visible = t->visible,
                                .seen = prefixes ? NULL : t->seen[0],
                                .softcap = call->options->softcap,
                                .slopes = call->options->alibi_slopes ? t->slopes : NULL,
                                .distances = t->distances,
                                .k_format = call->k->format,
                                .v_format = call->v->format,
                                .head_dim = call->k->head_dim,
                                .head_dim_v = call->v->head_dim,
                                .runs = &t->runs[0],
                                .next = &t->runs[1],
                                .scores = t->scores,
                                .decoded = t->decoded,
                                .out = *into};
    call->kernels->attend_split(&task);
}

/* A sink is one more token that comes last and whose value is 0. */
static void add_sink(const attend_call *call, const kv_partial *state, int32_t r, float logit) {
    float one = 1.0f, zeros[1024] = {0};
    const kv_partial row = {state->m + r, state->l + r, state->o + (int64_t)r * call->o_width};
    const kv_partial sink = {&logit, &one, zeros};
    call->kernels->merge_partial(&row, &sink, 1, call->o_width);
}

static void finish_row(const attend_call *call, const kv_unit *unit, int32_t r,
                       const kv_partial *state) {
    const kv_rows *out = call->out;
    int32_t token, head;
    locate_row(call, unit, r, &token, &head);
    if (call->options->sinks)
        add_sink(call, state, r, call->options->sinks[head]);
    const float m = state->m[r], l = state->l[r];
    float row[1024];
    if (l == 0.0f)
        memset(row, 0, sizeof(row));
    else
        call->kernels->normalize(state->o + (int64_t)r * call->o_width, l, row, call->o_width);
    call->kernels->convert(row, KV_FORMAT_FP32,
                           kv_row(out, call->plan->query_starts, unit->sequence, token) +
                               head * out->head_stride * kv_dtype_bytes(out->dtype),
                           kv_dtype_format(out->dtype), out->head_dim);
    if (call->lse) {
        const int64_t t = call->plan->query_starts[unit->sequence] + token;
        call->lse[t * out->num_heads + head] =
            l == 0.0f ? -INFINITY : (float)((double)m + log((double)l));
    }
}

/* ---- parts ----------------------------------------------------------------------------------- */

/* The partial that `row` rows of slots precede. */
static kv_partial slot_at(const attend_call *call, int64_t row) {
    float *m = call->slots + call->slot_rows * call->o_width;
    return (kv_partial){m + row, m + call->slot_rows + row, call->slots + row * call->o_width};
}

/* Where splits of a unit go from the first cut on. */
static kv_partial split_slot(const attend_call *call, const kv_cut *cut, int32_t split) {
    const int64_t slot = split - cut->first_split + 1;
    return slot_at(call, cut->first_slot_row + slot * call->units[cut->unit].num_rows);
}

/* The split after (unit, split) that this part reads; nothing at its end. */
static void locate_next(const attend_call *call, int32_t unit, int32_t split, int32_t stop,
                        const kv_bound *end, kv_split_runs *runs) {
    runs->num_runs = 0;
    if (split + 1 < stop)
        locate_split(call, &call->units[unit], split + 1, runs);
    else if (unit + 1 < end->unit || (unit + 1 == end->unit && end->split > 0))
        locate_split(call, &call->units[unit + 1], 0, runs);
}

/* Splits [begin, stop) of a unit. The first part of a unit folds them; a later part stores them. */
static void run_unit(const attend_call *call, int32_t u, int32_t begin, int32_t stop,
                     const kv_bound *end, const kv_cut *cut, tile *t) {
    const kv_unit *unit = &call->units[u];
    const kv_partial state = cut ? slot_at(call, cut->first_slot_row) : t->state;
    load_queries(call, unit, t);
    load_sight(call, unit, t);
    locate_split(call, unit, begin, &t->runs[0]);
    for (int32_t split = begin; split < stop; split++) {
        locate_next(call, u, split, stop, end, &t->runs[1]);
        if (begin > 0) {
            const kv_partial slot = split_slot(call, cut, split);
            run_split(call, unit, split, t, &slot);
        } else if (split == 0) {
            run_split(call, unit, split, t, &state);
        } else {
            run_split(call, unit, split, t, &t->partial);
            call->kernels->merge_partial(&state, &t->partial, unit->num_rows, call->o_width);
        }
        t->runs[0] = t->runs[1];
    }
    if (!cut)
        for (int32_t r = 0; r < unit->num_rows; r++)
            finish_row(call, unit, r, &state);
}

static void attend_part(void *context, int32_t part) {
    const attend_call *call = context;
    const kv_bound *begin = &call->bounds[part], *end = begin + 1;
    tile t;
    lay_out_tile(call, (float *)(call->scratch + part * call->scratch_bytes), &t);
    for (int32_t u = begin->unit; u < end->unit || (u == end->unit && end->split > 0); u++) {
        const int starts_inside = u == begin->unit && begin->split > 0;
        const int stops_inside = u == end->unit;
        const int32_t cut = starts_inside ? begin->cut : stops_inside ? end->cut : -1;
        run_unit(call, u, starts_inside ? begin->split : 0,
                 stops_inside ? end->split : kv_num_splits(&call->units[u]), end,
                 cut >= 0 ? &call->cuts[cut] : NULL, &t);
    }
}

/* Joins the partials of the units that were cut, split after split: rows of all cut units, divided
 * evenly. */
static void join_part(void *context, int32_t part) {
    const attend_call *call = context;
    const int64_t count = (int64_t)call->num_cuts * KV_TILE_ROWS;
    const int64_t end = kv_part_begin(count, part + 1, call->num_join_parts);
    for (int64_t i = kv_part_begin(count, part, call->num_join_parts); i < end; i++) {
        const kv_cut *cut = &call->cuts[i / KV_TILE_ROWS];
        const kv_unit *unit = &call->units[cut->unit];
        const int32_t r = (int32_t)(i % KV_TILE_ROWS), num_splits = kv_num_splits(unit);
        if (r >= unit->num_rows)
            continue;
        const kv_partial first = slot_at(call, cut->first_slot_row);
        const kv_partial state = slot_at(call, cut->first_slot_row + r);
        for (int32_t split = cut->first_split; split < num_splits; split++) {
            const int64_t slot = split - cut->first_split + 1;
            const kv_partial partial =
                slot_at(call, cut->first_slot_row + slot * unit->num_rows + r);
            call->kernels->merge_partial(&state, &partial, 1, call->o_width);
        }
        finish_row(call, unit, r, &first);
    }
}

/* ---- padding --------------------------------------------------------------------------------- */

typedef struct zero_task {
    const kv_plan *plan;
    const kv_rows *out;
    int32_t num_parts;
} zero_task;

static void zero_part(void *context, int32_t part) {
    const zero_task *task = context;
    const kv_rows *out = task->out;
    const int32_t *starts = task->plan->query_starts, length = out->padded_length;
    const int64_t count = (int64_t)task->plan->num_sequences * length;
    const int64_t end = kv_part_begin(count, part + 1, task->num_parts);
    const size_t row_bytes = (size_t)out->head_dim * (size_t)kv_dtype_bytes(out->dtype);
    for (int64_t i = kv_part_begin(count, part, task->num_parts); i < end; i++) {
        const int32_t s = (int32_t)(i / length), token = (int32_t)(i % length);
        if (token < starts[s + 1] - starts[s])
            continue;
        char *row = kv_row(out, starts, s, token);
        for (int32_t head = 0; head < out->num_heads; head++)
            memset(row + head * out->head_stride * kv_dtype_bytes(out->dtype), 0, row_bytes);
    }
}

static void zero_padding(const kv_plan *plan, const kv_rows *out) {
    const int64_t rows = (int64_t)plan->num_sequences * out->padded_length - plan->num_tokens;
    if (out->padded_length == 0 || rows == 0)
        return;
    const int64_t nbytes = rows * out->num_heads * out->head_dim * kv_dtype_bytes(out->dtype);
    zero_task task = {plan, out, kv_num_parts(nbytes, ZERO_BYTES)};
    kv_run_parts(task.num_parts, zero_part, &task);
}

/* ---- the call -------------------------------------------------------------------------------- */

/* Lists units, bounds and cuts in buffer 0 and lays out scratch in buffer 1. */
static kv_status prepare(attend_call *call, kv_workspace *workspace) {
    const int32_t num_heads = call->k->num_heads;
    call->num_units = kv_count_units(call->plan, num_heads, call->group_size);
    const int64_t units_bytes = round_up((call->num_units + 1) * (int64_t)sizeof(kv_unit), 64);
    const int64_t bounds_bytes = (KV_MAX_THREADS + 1) * (int64_t)sizeof(kv_bound);
    char *lists = kv_workspace_reserve(
        workspace, 0,
        (size_t)(units_bytes + bounds_bytes + KV_MAX_THREADS * (int64_t)sizeof(kv_cut)));
    if (!lists)
        return KV_ERR_NO_MEMORY;
    call->units = (kv_unit *)lists;
    call->cuts = (kv_cut *)(lists + units_bytes);
    call->bounds = (kv_bound *)(call->cuts + KV_MAX_THREADS);

    const int64_t cost = kv_list_units(&call->sight, num_heads, call->group_size, call->units);
    for (int64_t u = 0; u < call->num_units; u++)
        if (call->units[u].num_rows > call->tile_rows)
            call->tile_rows = call->units[u].num_rows;
    call->num_parts = kv_num_parts(cost, PART_WORK / call->k->head_dim);
    call->num_cuts = kv_cut_work(call->units, call->num_units, call->num_parts, call->bounds,
                                 call->cuts, &call->slot_rows);

    tile unused;
    call->scratch_bytes = round_up(lay_out_tile(call, NULL, &unused) * (int64_t)sizeof(float), 64);
    const int64_t slots_bytes =
        round_up(call->slot_rows * (call->o_width + 2) * (int64_t)sizeof(float), 64);
    call->scratch = kv_workspace_reserve(
        workspace, 1, (size_t)(call->scratch_bytes * call->num_parts + slots_bytes));
    if (!call->scratch)
        return KV_ERR_NO_MEMORY;
    call->slots = (float *)(call->scratch + call->scratch_bytes * call->num_parts);
    return KV_OK;
}

static void run(attend_call *call) {
    kv_run_parts(call->num_parts, attend_part, call);
    const int64_t work = call->slot_rows * call->o_width;
    call->num_join_parts = kv_num_parts(work, PART_WORK);
    if (call->num_cuts > 0)
        kv_run_parts(call->num_join_parts, join_part, call);
}

kv_status kv_attend(const kv_plan *plan, const kv_rows *q, const kv_blocks *k, const kv_blocks *v,
                    const kv_attend_options *options, const kv_rows *out, float *lse) {
    kv_attend_options known;
    kv_status status = kv_check_attend(plan, q, k, v, options, out, &known);
    if (status != KV_OK)
        return status;
    const kv_kernels *kernels = kv_active_kernels();
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    attend_call call = {.kernels = kernels,
                        .plan = plan,
                        .q = q,
                        .out = out,
                        .k = k,
                        .v = v,
                        .options = &known,
                        .sight = kv_sight_of(plan, &known),
                        .lse = lse,
                        .group_size = q->num_heads / k->num_heads,
                        .q_width = (int32_t)round_up(k->head_dim, KV_ROW_ALIGN),
                        .o_width = (int32_t)round_up(v->head_dim, KV_ROW_ALIGN)};
    while ((1 << call.block_shift) < k->block_size)
        call.block_shift++;

    kv_workspace *workspace = kv_workspace_acquire();
    if (!workspace)
        return KV_ERR_NO_MEMORY;
    status = plan->num_tokens > 0 ? prepare(&call, workspace) : KV_OK;
    if (status == KV_OK) {
        if (plan->num_tokens > 0)
            run(&call);
        zero_padding(plan, out);
    }
    kv_workspace_release(workspace);
    return status;
}
