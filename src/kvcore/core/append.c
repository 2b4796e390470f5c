/* kv_append: rows of new tokens into blocks, encoded and raw. */

#include "dispatch.h"
#include "raw_rows.h"
#include "storage.h"
#include "threads.h"

#include <math.h>
#include <string.h>

enum { PART_BYTES = 256 * 1024 /* less than this is not worth waking a thread for */ };

#define LARGEST_SATURATED 65504.0f /* fp16's largest number */

typedef struct append_task {
    const kv_kernels *kernels;
    const kv_plan *plan;
    const kv_rows *rows;
    const kv_blocks *blocks;
    int32_t num_parts;
    uint8_t not_finite[KV_MAX_THREADS]; /* by part */
} append_task;

static int32_t part_begin(const append_task *task, int64_t count, int32_t part) {
    return (int32_t)kv_part_begin(count, part, task->num_parts);
}

/* ---- finite ---------------------------------------------------------------------------------- */

/* Calls `visit` with every row of a part's tokens: ragged rows need not know the sequences, as they
 * are like one. Stops where it returns 0, and returns that token and head. */
typedef int (*row_visitor)(const append_task *task, const char *row, int32_t token, int32_t head);

static int visit_rows(const append_task *task, int32_t begin, int32_t end, row_visitor visit,
                      int32_t *token, int32_t *head) {
    static const int32_t zero = 0;
    const kv_rows *rows = task->rows;
    const int64_t head_bytes = rows->head_stride * kv_dtype_bytes(rows->dtype);
    const int padded = rows->padded_length > 0;
    const int32_t *starts = padded ? task->plan->query_starts : &zero;
    int32_t s = 0;
    for (*token = begin; *token < end; ++*token) {
        while (padded && *token >= starts[s + 1])
            s++;
        const char *row = kv_row(rows, starts, s, *token - starts[s]);
        for (*head = 0; *head < rows->num_heads; ++*head)
            if (!visit(task, row + *head * head_bytes, *token, *head))
                return 0;
    }
    return 1;
}

static int row_is_finite(const append_task *task, const char *row, int32_t token, int32_t head) {
    (void)token, (void)head;
    return task->kernels->is_finite(row, kv_dtype_format(task->rows->dtype), task->rows->head_dim);
}

static void check_part(void *context, int32_t part) {
    append_task *task = context;
    const int64_t count = task->plan->num_tokens;
    int32_t token, head;
    task->not_finite[part] =
        !visit_rows(task, part_begin(task, count, part), part_begin(task, count, part + 1),
                    row_is_finite, &token, &head);
}

static int all_finite(append_task *task) {
    kv_run_parts(task->num_parts, check_part, task);
    for (int32_t part = 0; part < task->num_parts; part++)
        if (task->not_finite[part])
            return 0;
    return 1;
}

/* ---- rows ------------------------------------------------------------------------------------ */

static void saturate(float *row, int32_t head_dim) {
    for (int32_t d = 0; d < head_dim; d++)
        if (isnan(row[d]))
            row[d] = 0.0f;
        else if (isinf(row[d]))
            row[d] = row[d] < 0 ? -LARGEST_SATURATED : LARGEST_SATURATED;
}

static void store_raw(const append_task *task, const float *row, int32_t token, int32_t head) {
    const kv_blocks *raw = task->blocks->raw;
    const int32_t slot = task->plan->raw->slots[token];
    task->kernels->convert(
        row, KV_FORMAT_FP32,
        kv_block_row(raw, slot / KV_RAW_BLOCK_SIZE, head, slot % KV_RAW_BLOCK_SIZE), KV_FORMAT_BF16,
        raw->head_dim);
}

static int append_quantized(const append_task *task, const char *row, int32_t token, int32_t head) {
    const kv_blocks *blocks = task->blocks;
    const int32_t slot = task->plan->slots[token];
    float values[KV_MAX_HEAD_DIM] __attribute__((aligned(64)));
    task->kernels->convert(row, kv_dtype_format(task->rows->dtype), values, KV_FORMAT_FP32,
                           blocks->head_dim);
    if (blocks->saturate)
        saturate(values, blocks->head_dim);
    if (blocks->raw)
        store_raw(task, values, token, head);
    if (slot < 0 || kv_format_kind_of(blocks->format) != KV_KIND_ROW)
        return 1;
    const int32_t block = slot / blocks->block_size, offset = slot % blocks->block_size;
    const kv_channels channels = kv_head_channels(blocks, head);
    task->kernels->encode(blocks->format, values, 1, blocks->head_dim, &channels,
                          kv_block_row(blocks, block, head, offset),
                          kv_block_metadata(blocks, block, head, offset));
    return 1;
}

static int append_float(const append_task *task, const char *row, int32_t token, int32_t head) {
    const kv_blocks *blocks = task->blocks;
    const int32_t slot = task->plan->slots[token];
    if (slot >= 0)
        task->kernels->convert(
            row, kv_dtype_format(task->rows->dtype),
            kv_block_row(blocks, slot / blocks->block_size, head, slot % blocks->block_size),
            blocks->format, blocks->head_dim);
    return 1;
}

static void append_part(void *context, int32_t part) {
    const append_task *task = context;
    const int64_t count = task->plan->num_tokens;
    int32_t token, head;
    visit_rows(task, part_begin(task, count, part), part_begin(task, count, part + 1),
               kv_format_is_float(task->blocks->format) ? append_float : append_quantized, &token,
               &head);
}

/* ---- sealed groups --------------------------------------------------------------------------- */

/* Groups of KV_RAW_BLOCK_SIZE tokens that sequence s has whole, before the step and with it. */
static int32_t groups_before(const kv_plan *plan, int32_t s) {
    const int32_t num_new = plan->query_starts[s + 1] - plan->query_starts[s];
    return (plan->seq_lens[s] - num_new) / KV_RAW_BLOCK_SIZE;
}

static int32_t groups_after(const kv_plan *plan, int32_t s) {
    return plan->seq_lens[s] / KV_RAW_BLOCK_SIZE;
}

/* The first rows of a text are often far larger than the others, and are always read raw. Encoded,
 * they take the values of the row after them, so that no channel's range reaches out to them. */
static void leave_out_first(float *values, int32_t head_dim, int32_t raw_first) {
    for (int32_t t = 0; t < raw_first && raw_first < KV_RAW_BLOCK_SIZE; t++)
        memcpy(values + t * head_dim, values + raw_first * head_dim,
               (size_t)head_dim * sizeof(float));
}

/* Group `column` of sequence s, from its raw rows. */
static void seal_group(const append_task *task, int32_t s, int32_t column, int32_t head) {
    const kv_blocks *blocks = task->blocks, *raw = blocks->raw;
    const int32_t head_dim = blocks->head_dim, start = column * KV_RAW_BLOCK_SIZE;
    const int32_t raw_block = task->plan->raw->block_rows[s][column];
    const int32_t block = task->plan->block_rows[s][start / blocks->block_size];
    const int32_t offset = start % blocks->block_size;
    float values[KV_RAW_BLOCK_SIZE * KV_MAX_HEAD_DIM] __attribute__((aligned(64)));
    for (int32_t t = 0; t < KV_RAW_BLOCK_SIZE; t++)
        task->kernels->convert(kv_block_row(raw, raw_block, head, t), KV_FORMAT_BF16,
                               values + t * head_dim, KV_FORMAT_FP32, head_dim);
    if (column == 0)
        leave_out_first(values, head_dim, blocks->raw_first);
    const kv_channels channels = kv_head_channels(blocks, head);
    task->kernels->encode(blocks->format, values, KV_RAW_BLOCK_SIZE, head_dim, &channels,
                          kv_block_row(blocks, block, head, offset),
                          kv_block_metadata(blocks, block, head, offset));
}

/* A part's share of all (group, head) pairs that the step completes. */
static void seal_part(void *context, int32_t part) {
    const append_task *task = context;
    const kv_plan *plan = task->plan;
    const int32_t num_heads = task->blocks->num_heads;
    int64_t count = 0, before = 0;
    for (int32_t s = 0; s < plan->num_sequences; s++)
        count += groups_after(plan, s) - groups_before(plan, s);
    const int64_t begin = kv_part_begin(count * num_heads, part, task->num_parts);
    const int64_t end = kv_part_begin(count * num_heads, part + 1, task->num_parts);
    for (int32_t s = 0; s < plan->num_sequences && before < end; s++) {
        const int32_t first = groups_before(plan, s);
        const int64_t pairs = (int64_t)(groups_after(plan, s) - first) * num_heads;
        const int64_t low = begin > before ? begin - before : 0;
        const int64_t high = end - before < pairs ? end - before : pairs;
        for (int64_t i = low; i < high; i++)
            seal_group(task, s, first + (int32_t)(i / num_heads), (int32_t)(i % num_heads));
        before += pairs;
    }
}

/* ---- checks ---------------------------------------------------------------------------------- */

static kv_status check_slots(const int32_t *slots, const kv_plan *plan, const kv_blocks *blocks,
                             int32_t lowest) {
    const int64_t num_slots = (int64_t)blocks->num_blocks * blocks->block_size;
    if (plan->num_tokens > 0 && !slots)
        return KV_ERR_NULL;
    for (int32_t t = 0; t < plan->num_tokens; t++)
        if (slots[t] < lowest || slots[t] >= num_slots)
            return KV_ERR_RANGE;
    return KV_OK;
}

/* The blocks that groups are sealed from and into. */
static kv_status check_groups(const kv_plan *plan, const kv_blocks *blocks) {
    if (!plan->query_starts || !plan->seq_lens || !plan->block_rows || !plan->raw->block_rows)
        return KV_ERR_NULL;
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        const int32_t first = groups_before(plan, s), end = groups_after(plan, s);
        if (first < 0 || end < first)
            return KV_ERR_RANGE;
        if (first == end)
            continue;
        if (!plan->block_rows[s] || !plan->raw->block_rows[s])
            return KV_ERR_NULL;
        kv_status status = kv_check_block_ids(plan->raw->block_rows[s] + first, end - first,
                                              blocks->raw->num_blocks);
        const int32_t column = first * KV_RAW_BLOCK_SIZE / blocks->block_size;
        const int32_t last = (end * KV_RAW_BLOCK_SIZE - 1) / blocks->block_size;
        if (status == KV_OK)
            status = kv_check_block_ids(plan->block_rows[s] + column, last - column + 1,
                                        blocks->num_blocks);
        if (status != KV_OK)
            return status;
    }
    return KV_OK;
}

static kv_status check_raw(const kv_plan *plan, const kv_blocks *blocks) {
    if (!blocks->raw)
        return KV_OK;
    if (!plan->raw)
        return KV_ERR_NULL;
    const kv_status status = check_slots(plan->raw->slots, plan, blocks->raw, 0);
    if (status != KV_OK || kv_format_kind_of(blocks->format) != KV_KIND_CHANNEL)
        return status;
    return check_groups(plan, blocks);
}

static kv_status check_rows(const kv_plan *plan, const kv_rows *rows) {
    if (!plan || !rows)
        return KV_ERR_NULL;
    if (plan->num_sequences < 0 || plan->num_tokens < 0)
        return KV_ERR_VALUE;
    const kv_status status = kv_check_rows(rows, plan->num_sequences, plan->num_tokens, 0);
    if (status != KV_OK || rows->padded_length == 0)
        return status;
    return kv_check_queries(plan, rows->padded_length);
}

static kv_status check_append(const kv_plan *plan, const kv_rows *rows, const kv_blocks *blocks) {
    kv_status status;
    if ((status = check_rows(plan, rows)) != KV_OK || (status = kv_check_blocks(blocks)) != KV_OK)
        return status;
    if (rows->num_heads != blocks->num_heads || rows->head_dim != blocks->head_dim)
        return KV_ERR_VALUE;
    if ((status = check_slots(plan->slots, plan, blocks, -1)) != KV_OK)
        return status;
    return check_raw(plan, blocks);
}

/* ---- the calls ------------------------------------------------------------------------------- */

kv_status kv_check_finite(const kv_plan *plan, const kv_rows *rows, int32_t *token, int32_t *head) {
    const kv_status status = check_rows(plan, rows);
    const kv_kernels *kernels = kv_active_kernels();
    if (status != KV_OK)
        return status;
    if (!token || !head)
        return KV_ERR_NULL;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    const append_task task = {.kernels = kernels, .plan = plan, .rows = rows, .num_parts = 1};
    return visit_rows(&task, 0, plan->num_tokens, row_is_finite, token, head) ? KV_OK
                                                                              : KV_ERR_NOT_FINITE;
}

kv_status kv_append(const kv_plan *plan, const kv_rows *rows, const kv_blocks *blocks) {
    const kv_status status = check_append(plan, rows, blocks);
    const kv_kernels *kernels = kv_active_kernels();
    if (status != KV_OK)
        return status;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    const int64_t nbytes =
        (int64_t)plan->num_tokens * rows->num_heads * rows->head_dim * kv_dtype_bytes(rows->dtype);
    append_task task = {.kernels = kernels,
                        .plan = plan,
                        .rows = rows,
                        .blocks = blocks,
                        .num_parts = kv_num_parts(nbytes, PART_BYTES)};
    if (!kv_format_is_float(blocks->format) && !blocks->saturate && !all_finite(&task))
        return KV_ERR_NOT_FINITE;
    kv_run_parts(task.num_parts, append_part, &task);
    if (kv_format_kind_of(blocks->format) == KV_KIND_CHANNEL)
        kv_run_parts(task.num_parts, seal_part, &task);
    return KV_OK;
}
