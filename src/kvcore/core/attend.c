/* kv_attend: checks, lists the work and runs it. */

#include "attend_check.h"
#include "attend_line.h"
#include "dispatch.h"
#include "storage.h"
#include "threads.h"
#include "workspace.h"

#include <string.h>

enum {
    ZERO_BYTES = 1024 * 1024, /* of padding */
    SPARED_BYTES = 256 * 1024 /* reading less than this twice is cheaper than a second line */
};

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

/* Buffers of the workspace: the lists of units, the scratch, the shares. */
enum { LISTS, SCRATCH, SHARES };

static int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* Bytes of K and V that are read once instead of once for each member. */
static int64_t spared_bytes(const kv_attend_call *call) {
    const int64_t token_bytes =
        call->k->num_heads * (kv_format_row_bytes(call->k->format, call->k->head_dim) +
                              kv_format_row_bytes(call->v->format, call->v->head_dim));
    int64_t tokens = 0;
    for (int32_t i = 0; i < call->shares.count; i++) {
        const kv_share *share = &call->shares.list[i];
        tokens += (int64_t)(share->num_members - 1) * share->num_splits * KV_SPLIT;
    }
    return tokens * token_bytes;
}

static kv_status find_shares(kv_attend_call *call, kv_workspace *workspace) {
    const int32_t num_sequences = call->plan->num_sequences;
    if (num_sequences < 2)
        return KV_OK;
    void *memory = kv_workspace_reserve(workspace, SHARES, (size_t)kv_shares_nbytes(num_sequences));
    if (!memory)
        return KV_ERR_NO_MEMORY;
    kv_find_shares(&call->sight, call->group_size, memory, &call->shares);
    if (spared_bytes(call) < SPARED_BYTES)
        call->shares.count = 0;
    return KV_OK;
}

/* Bytes of a line's lists; with `memory`, also hands them out. */
static int64_t lay_out_lists(int64_t num_units, char *memory, kv_line *line) {
    const int64_t places = num_units + KV_MAX_THREADS; /* cuts may add units; and an end mark */
    const int64_t units = round_up(places * (int64_t)sizeof(kv_unit), 64);
    const int64_t cuts = KV_MAX_THREADS * (int64_t)sizeof(kv_cut);
    if (memory) {
        line->num_units = num_units;
        line->units = (kv_unit *)memory;
        line->cuts = (kv_cut *)(memory + units);
        line->bounds = (kv_bound *)(memory + units + cuts);
    }
    return round_up(units + cuts + (KV_MAX_THREADS + 1) * (int64_t)sizeof(kv_bound), 64);
}

/* Lists and cuts the work: shared prefixes on the first line, what each sequence has beyond on the
 * second. */
static kv_status list_work(kv_attend_call *call, kv_workspace *workspace, kv_line lines[2]) {
    const kv_work work = {&call->sight, &call->shares, call->k->num_heads, call->group_size};
    const int64_t num_shared = kv_count_shared_units(&work), num_own = kv_count_units(&work);
    const int64_t shared_bytes = lay_out_lists(num_shared, NULL, NULL);
    char *lists = kv_workspace_reserve(workspace, LISTS,
                                       (size_t)(shared_bytes + lay_out_lists(num_own, NULL, NULL)));
    if (!lists)
        return KV_ERR_NO_MEMORY;
    lay_out_lists(num_shared, lists, &lines[0]);
    lay_out_lists(num_own, lists + shared_bytes, &lines[1]);
    kv_line_cut(&lines[0], kv_list_shared_units(&work, lines[0].units));
    kv_line_cut(&lines[1], kv_list_units(&work, lines[1].units));
    call->state_rows = kv_count_state_rows(&work);
    return KV_OK;
}

static kv_status run(kv_attend_call *call, kv_workspace *workspace) {
    kv_line lines[2] = {{.call = call}, {.call = call}};
    kv_status status = find_shares(call, workspace);
    if (status == KV_OK)
        status = list_work(call, workspace, lines);
    if (status != KV_OK)
        return status;
    const int64_t first = kv_line_nbytes(&lines[0]), second = kv_line_nbytes(&lines[1]);
    const int64_t scratch = first > second ? first : second;
    const int64_t states = call->state_rows * (call->o_width + 2) * (int64_t)sizeof(float);
    char *memory = kv_workspace_reserve(workspace, SCRATCH, (size_t)(scratch + states));
    if (!memory)
        return KV_ERR_NO_MEMORY;
    call->states = (float *)(memory + scratch);
    if (lines[0].num_units > 0)
        kv_line_run(&lines[0], memory);
    kv_line_run(&lines[1], memory);
    return KV_OK;
}

/* Whether long prompts are attended to by dot products of bf16 pairs: in how many bf16 terms queries
 * are then given. One is exact for bf16 queries, and two keep 16 bits of others, whose rounding to one
 * would show more the larger the scores are. */
static int32_t num_dots(const kv_kernels *kernels, const kv_rows *q, const kv_blocks *k,
                        const kv_blocks *v, const kv_attend_options *options) {
    if (!kernels->has_dot_bf16 || options->exact || k->format != KV_FORMAT_BF16 ||
        v->format != KV_FORMAT_BF16)
        return 0;
    return q->dtype == KV_DTYPE_BF16 ? 1 : 2;
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
    kv_attend_call call = {.kernels = kernels,
                           .plan = plan,
                           .q = q,
                           .out = out,
                           .k = k,
                           .v = v,
                           .options = &known,
                           .lse = lse,
                           .sight = kv_sight_of(plan, &known),
                           .group_size = q->num_heads / k->num_heads,
                           .dots = num_dots(kernels, q, k, v, &known),
                           .q_width = (int32_t)round_up(k->head_dim, KV_ROW_ALIGN),
                           .o_width = (int32_t)round_up(v->head_dim, KV_ROW_ALIGN)};
    call.sight.quantized = k->raw ? k : v->raw ? v : NULL;
    call.decodes = !kv_format_is_float(k->format) || !kv_format_is_float(v->format);
    call.undecoded = call.decodes && !known.exact;
    while ((1 << call.block_shift) < k->block_size)
        call.block_shift++;
    if (plan->num_tokens > 0) {
        kv_workspace *workspace = kv_workspace_acquire();
        if (!workspace)
            return KV_ERR_NO_MEMORY;
        status = run(&call, workspace);
        kv_workspace_release(workspace);
        if (status != KV_OK)
            return status;
    }
    zero_padding(plan, out);
    return KV_OK;
}
