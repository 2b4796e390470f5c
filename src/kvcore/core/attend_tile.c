#include "attend_tile.h"

#include "raw_rows.h"
#include "storage.h"

#include <math.h>
#include <string.h>

int64_t kv_tile_lay_out(const kv_attend_call *call, int32_t num_rows, float *base, kv_tile *t) {
    const int64_t q_width = call->q_width, o_width = call->o_width;
    const int64_t rows = (num_rows + KV_ROW_ALIGN - 1) & -KV_ROW_ALIGN; /* all stays aligned */
    const int64_t blocks = (num_rows + KV_BLOCK_ROWS - 1) / KV_BLOCK_ROWS;
    const int many = num_rows >= KV_MANY_ROWS, undecoded = call->undecoded;
    /* Where some sequences' rows are read undecoded, others' may still be many. */
    const int64_t by_row = many && !undecoded ? 0 : rows * KV_SPLIT;
    const int64_t by_token = many ? KV_SPLIT * KV_BLOCK_ROWS : 0;
    const int64_t sizes[] = {rows * q_width,
                             many ? blocks * KV_BLOCK_ROWS * q_width : rows * q_width,
                             by_row > by_token ? by_row : by_token,
                             (many || call->decodes ? KV_SPLIT * (q_width + o_width) : 0) +
                                 (undecoded ? rows * KV_SPLIT : 0),
                             undecoded ? rows * (q_width + KV_ROW_ALIGN) : 0,
                             rows * o_width,
                             rows,
                             rows,
                             rows * o_width,
                             rows,
                             rows};
    float **const places[] = {&t->q,         &t->panels,    &t->scores,   &t->decoded,
                              &t->encoded,   &t->state.o,   &t->state.m,  &t->state.l,
                              &t->partial.o, &t->partial.m, &t->partial.l};
    int64_t used = 0;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        if (base)
            *places[i] = base + used;
        used += sizes[i];
    }
    return used;
}

kv_partial kv_partial_at(float *floats, int64_t num_rows, int32_t o_width, int64_t row) {
    float *m = floats + num_rows * o_width;
    return (kv_partial){m + row, m + num_rows + row, floats + row * o_width};
}

/* ---- loading --------------------------------------------------------------------------------- */

typedef struct query_row {
    int32_t sequence, token, head; /* new token of the sequence; query head */
} query_row;

static query_row locate_row(const kv_attend_call *call, const kv_unit *unit, int32_t r) {
    int32_t row = unit->first_row + r, s = unit->sequence;
    if (unit->share >= 0) {
        const kv_share *share = &call->shares.list[unit->share];
        const int32_t member = kv_share_member(&call->shares, share, row);
        row -= call->shares.first_rows[member];
        s = call->shares.members[member];
    }
    return (query_row){s, row / call->group_size,
                       unit->head * call->group_size + row % call->group_size};
}

/* kv_split_task's `dots`. It is a matter of the unit's sequence alone, so that no other sequence,
 * thread or sharer changes a row's bits; those that share a prefix have too few new tokens. */
static int32_t dots_of(const kv_attend_call *call, const kv_unit *unit) {
    const int32_t *starts = call->plan->query_starts + unit->sequence;
    return unit->share < 0 && starts[1] - starts[0] >= KV_DOT_TOKENS ? call->dots : 0;
}

/* Whether a unit reads encoded rows undecoded: for the same reason a matter of its sequence alone. */
static int is_undecoded(const kv_attend_call *call, const kv_unit *unit) {
    const int32_t *starts = call->plan->query_starts + unit->sequence;
    const int64_t rows = (int64_t)(starts[1] - starts[0]) * call->group_size;
    return call->undecoded && (unit->share >= 0 || rows <= KV_ENCODED_ROWS);
}

static void load_query(const kv_attend_call *call, const query_row *row, float scale, float *to) {
    const kv_rows *q = call->q;
    call->kernels->convert(kv_row(q, call->plan->query_starts, row->sequence, row->token) +
                               row->head * q->head_stride * kv_dtype_bytes(q->dtype),
                           kv_dtype_format(q->dtype), to, KV_FORMAT_FP32, q->head_dim);
    for (int32_t d = 0; d < q->head_dim; d++)
        to[d] *= scale;
    for (int32_t d = q->head_dim; d < call->q_width; d++)
        to[d] = 0.0f;
}

void kv_tile_load(const kv_attend_call *call, const kv_unit *unit, kv_tile *t) {
    const int32_t dots = dots_of(call, unit);
    const float scale = dots ? 1.0f : call->options->scale; /* which could cost a bf16 query bits */
    query_row before = {-1, -1, -1};
    for (int32_t r = 0; r < unit->num_rows; r++) {
        const query_row row = locate_row(call, unit, r);
        load_query(call, &row, scale, t->q + (int64_t)r * call->q_width);
        t->repeats[r] = row.sequence == before.sequence && row.token == before.token;
        t->views[r] =
            t->repeats[r] ? t->views[r - 1] : kv_look(&call->sight, row.sequence, row.token);
        if (call->options->alibi_slopes)
            t->slopes[r] = call->options->alibi_slopes[row.head];
        before = row;
    }
    if (is_undecoded(call, unit)) {
        const kv_channels channels = kv_head_channels(call->k, unit->head);
        call->kernels->pack_encoded(t->q, unit->num_rows, call->q_width, call->k->format, &channels,
                                    t->panels, t->encoded);
        return;
    }
    /* Quantized keys are decoded to float32. */
    call->kernels->pack_queries(
        t->q, unit->num_rows, call->q_width,
        kv_format_is_float(call->k->format) ? call->k->format : KV_FORMAT_FP32, dots, t->panels);
}

/* Tokens [j, j + count) of the unit's sequence, which lie in one block and are all read raw or all
 * encoded. */
static kv_run locate_run(const kv_attend_call *call, const kv_unit *unit, const kv_blocks *blocks,
                         int32_t j, int32_t count, int raw) {
    const int32_t s = unit->sequence;
    if (raw && blocks->raw)
        return (kv_run){.rows = kv_block_row(blocks->raw,
                                             call->plan->raw->block_rows[s][j / KV_RAW_BLOCK_SIZE],
                                             unit->head, j % KV_RAW_BLOCK_SIZE),
                        .stride = blocks->raw->token_stride,
                        .count = count,
                        .nbytes = blocks->head_dim * 2,
                        .raw = 1};
    const int32_t block = call->plan->block_rows[s][j >> call->block_shift];
    const int32_t offset = j & (blocks->block_size - 1);
    const int sealed = kv_format_kind_of(blocks->format) == KV_KIND_CHANNEL;
    const int32_t first = sealed ? offset % KV_RAW_BLOCK_SIZE : 0;
    return (kv_run){.rows = kv_block_row(blocks, block, unit->head, offset - first),
                    .metadata = kv_format_is_float(blocks->format)
                                    ? NULL
                                    : kv_block_metadata(blocks, block, unit->head, offset - first),
                    .stride = blocks->token_stride,
                    .count = count,
                    .nbytes = (int32_t)kv_format_code_bytes(blocks->format, blocks->head_dim),
                    .first = (int16_t)first};
}

void kv_tile_locate_split(const kv_attend_call *call, const kv_unit *unit, int32_t split,
                          kv_split_runs *runs) {
    const kv_blocks *quantized = call->sight.quantized;
    const int32_t block_size = call->k->block_size;
    const int32_t longest = block_size < KV_RUN ? block_size : KV_RUN;
    const int32_t begin = (kv_first_split(unit) + split) * KV_SPLIT, left = unit->end - begin;
    const int32_t end = begin + (left < KV_SPLIT ? left : KV_SPLIT);
    const int32_t raw_first = quantized ? quantized->raw_first : 0;
    runs->start = unit->begin > begin ? (unit->begin - begin) & -longest : 0;
    runs->num_runs = 0;
    for (int32_t j = begin + runs->start, stop; j < end; j = stop) {
        const int raw = j < raw_first || j >= unit->raw_begin;
        stop = (j & -longest) + longest;
        if (j < raw_first && raw_first < stop && raw_first < unit->raw_begin)
            stop = raw_first;
        stop = stop < end ? stop : end;
        runs->k[runs->num_runs] = locate_run(call, unit, call->k, j, stop - j, raw);
        runs->v[runs->num_runs] = locate_run(call, unit, call->v, j, stop - j, raw);
        runs->num_runs++;
    }
}

/* ---- running --------------------------------------------------------------------------------- */

/* Sets what each row sees of a split. Returns whether that is all up to its `visible`, which never
 * decreases; `seen` is then not set. */
static int find_visible(const kv_unit *unit, int32_t begin, kv_tile *t) {
    int prefixes = 1;
    for (int32_t r = 0; r < unit->num_rows; r++) {
        const kv_view *view = &t->views[r];
        const int32_t end = view->span.end - begin;
        t->visible[r] = end < 0 ? 0 : end < KV_SPLIT ? end : KV_SPLIT;
        prefixes &= !kv_is_scattered(view) && view->span.begin <= begin &&
                    (r == 0 || t->visible[r] >= t->visible[r - 1]);
    }
    for (int32_t r = 0; r < unit->num_rows && !prefixes; r++)
        if (t->repeats[r]) {
            t->visible[r] = t->visible[r - 1];
            memcpy(t->seen[r], t->seen[r - 1], sizeof(t->seen[r]));
        } else {
            t->visible[r] = kv_visible_bits(&t->views[r], begin, t->seen[r]);
        }
    return prefixes;
}

void kv_tile_run_split(const kv_attend_call *call, const kv_unit *unit, int32_t split, kv_tile *t,
                       const kv_partial *into) {
    const int32_t begin = (kv_first_split(unit) + split) * KV_SPLIT;
    if (unit->begin == unit->end) { /* there may be nothing to read at all */
        memset(into->l, 0, (size_t)unit->num_rows * sizeof(float));
        return;
    }
    for (int32_t r = 0; r < unit->num_rows; r++)
        t->distances[r] = (float)(t->views[r].position - begin);
    const int prefixes = find_visible(unit, begin, t);
    const int moved = call->options->alibi_slopes &&
                      kv_key_places(&call->sight, unit->sequence, begin, t->places);
    const kv_split_task task = {.panels = t->panels,
                                .encoded = is_undecoded(call, unit) ? t->encoded : NULL,
                                .dots = dots_of(call, unit),
                                .scale = call->options->scale,
                                .num_rows = unit->num_rows,
                                .q_width = call->q_width,
                                .o_width = call->o_width,
                                .visible = t->visible,
                                .seen = prefixes ? NULL : t->seen[0],
                                .softcap = call->options->softcap,
                                .slopes = call->options->alibi_slopes ? t->slopes : NULL,
                                .distances = t->distances,
                                .places = moved ? t->places : NULL,
                                .k_format = call->k->format,
                                .v_format = call->v->format,
                                .k_channels = kv_head_channels(call->k, unit->head),
                                .v_channels = kv_head_channels(call->v, unit->head),
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
static void add_sink(const kv_attend_call *call, const kv_partial *state, float logit) {
    float one = 1.0f, zeros[1024] = {0};
    const kv_partial sink = {&logit, &one, zeros};
    call->kernels->merge_partial(state, &sink, 1, call->o_width);
}

static void write_output(const kv_attend_call *call, const query_row *at, const kv_partial *state) {
    const kv_rows *out = call->out;
    if (call->options->sinks)
        add_sink(call, state, call->options->sinks[at->head]);
    const float m = *state->m, l = *state->l;
    float row[1024];
    if (l == 0.0f)
        memset(row, 0, sizeof(row));
    else
        call->kernels->normalize(state->o, l, row, call->o_width);
    call->kernels->convert(row, KV_FORMAT_FP32,
                           kv_row(out, call->plan->query_starts, at->sequence, at->token) +
                               at->head * out->head_stride * kv_dtype_bytes(out->dtype),
                           kv_dtype_format(out->dtype), out->head_dim);
    if (call->lse) {
        const int64_t t = call->plan->query_starts[at->sequence] + at->token;
        call->lse[t * out->num_heads + at->head] =
            l == 0.0f ? -INFINITY : (float)((double)m + log((double)l));
    }
}

void kv_tile_finish_row(const kv_attend_call *call, const kv_unit *unit, int32_t r,
                        const kv_partial *state) {
    if (unit->share < 0) {
        const query_row row = locate_row(call, unit, r);
        write_output(call, &row, state);
    } else {
        const kv_partial kept =
            kv_partial_at(call->states, call->state_rows, call->o_width, unit->state_row + r);
        *kept.m = *state->m;
        *kept.l = *state->l;
        memcpy(kept.o, state->o, (size_t)call->o_width * sizeof(float));
    }
}
