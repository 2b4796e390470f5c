/* Copies blocks before they are written, and brings raw rows back that were lost. */

#include "dispatch.h"
#include "raw_rows.h"
#include "storage.h"
#include "threads.h"

#include <string.h>

enum { PART_BYTES = 256 * 1024 /* less than this is not worth waking a thread for */ };

/* ---- copy ------------------------------------------------------------------------------------ */

typedef struct copy_task {
    const kv_plan *plan;
    const kv_blocks *blocks;
    int32_t num_parts;
} copy_task;

/* Rows without gaps; of a sealed group all, as none of it can be read alone. */
static int64_t copied_rows(const kv_blocks *blocks, int32_t num_rows) {
    return kv_format_kind_of(blocks->format) == KV_KIND_CHANNEL
               ? (num_rows + KV_RAW_BLOCK_SIZE - 1) / KV_RAW_BLOCK_SIZE * KV_RAW_BLOCK_SIZE
               : num_rows;
}

static void copy_head(const kv_blocks *blocks, const int32_t *copy, int32_t head) {
    const int64_t row_bytes = kv_format_code_bytes(blocks->format, blocks->head_dim);
    const char *from = kv_block_row(blocks, copy[0], head, 0);
    char *to = kv_block_row(blocks, copy[1], head, 0);
    if (blocks->token_stride == row_bytes) {
        const int64_t num_rows = copied_rows(blocks, copy[2]);
        memcpy(to, from, (size_t)(num_rows * row_bytes));
        if (!kv_format_is_float(blocks->format))
            memcpy(to + blocks->metadata_offset, from + blocks->metadata_offset,
                   (size_t)(num_rows * kv_format_metadata_bytes(blocks->format, blocks->head_dim)));
        return;
    }
    for (int32_t i = 0; i < copy[2]; i++)
        memcpy(to + i * blocks->token_stride, from + i * blocks->token_stride, (size_t)row_bytes);
}

static void copy_part(void *context, int32_t part) {
    const copy_task *task = context;
    const int32_t num_heads = task->blocks->num_heads;
    const int64_t count = (int64_t)task->plan->num_copies * num_heads;
    const int64_t end = kv_part_begin(count, part + 1, task->num_parts);
    for (int64_t i = kv_part_begin(count, part, task->num_parts); i < end; i++)
        copy_head(task->blocks, task->plan->copies + 3 * (i / num_heads), (int32_t)(i % num_heads));
}

kv_status kv_copy_blocks(const kv_plan *plan, const kv_blocks *blocks) {
    int64_t num_rows = 0;
    if (!plan)
        return KV_ERR_NULL;
    const kv_status status = kv_check_blocks(blocks);
    if (status != KV_OK)
        return status;
    if (plan->num_copies < 0)
        return KV_ERR_VALUE;
    if (plan->num_copies > 0 && !plan->copies)
        return KV_ERR_NULL;
    for (int64_t i = 0; i < plan->num_copies; i++) {
        const int32_t *copy = plan->copies + 3 * i;
        if (kv_check_block_ids(copy, 2, blocks->num_blocks) != KV_OK || copy[0] == copy[1] ||
            copy[2] < 0 || copy[2] > blocks->block_size)
            return KV_ERR_RANGE;
        num_rows += copy[2];
    }
    const int64_t nbytes =
        num_rows * blocks->num_heads * kv_format_row_bytes(blocks->format, blocks->head_dim);
    copy_task task = {plan, blocks, kv_num_parts(nbytes, PART_BYTES)};
    kv_run_parts(task.num_parts, copy_part, &task);
    return KV_OK;
}

/* ---- restore --------------------------------------------------------------------------------- */

typedef struct restore_task {
    const kv_kernels *kernels;
    const kv_plan *plan;
    const kv_blocks *blocks;
    int32_t num_parts;
} restore_task;

static void restore_rows(const restore_task *task, const int32_t *restore, int32_t head) {
    const kv_blocks *blocks = task->blocks, *raw = blocks->raw;
    const int32_t s = restore[0], column = restore[1], start = column * KV_RAW_BLOCK_SIZE;
    const int32_t raw_block = task->plan->raw->block_rows[s][column];
    float row[KV_MAX_HEAD_DIM] __attribute__((aligned(64)));
    for (int32_t i = 0; i < restore[2]; i++) {
        const int32_t j = start + i, block = task->plan->block_rows[s][j / blocks->block_size];
        if (block < 0) /* released behind a window: nothing reads it */
            continue;
        kv_decode_token(task->kernels, blocks, block, head, j % blocks->block_size, row);
        task->kernels->convert(row, KV_FORMAT_FP32, kv_block_row(raw, raw_block, head, i),
                               KV_FORMAT_BF16, raw->head_dim);
    }
}

static void restore_part(void *context, int32_t part) {
    const restore_task *task = context;
    const int32_t num_heads = task->blocks->num_heads;
    const int64_t count = (int64_t)task->plan->raw->num_restores * num_heads;
    const int64_t end = kv_part_begin(count, part + 1, task->num_parts);
    for (int64_t i = kv_part_begin(count, part, task->num_parts); i < end; i++)
        restore_rows(task, task->plan->raw->restores + 3 * (i / num_heads),
                     (int32_t)(i % num_heads));
}

static kv_status check_restores(const kv_plan *plan, const kv_blocks *blocks) {
    const kv_plan *raw = plan->raw;
    if (raw->num_restores < 0)
        return KV_ERR_VALUE;
    if (raw->num_restores > 0 && (!raw->restores || !raw->block_rows || !plan->block_rows))
        return KV_ERR_NULL;
    for (int32_t i = 0; i < raw->num_restores; i++) {
        const int32_t *restore = raw->restores + 3 * (int64_t)i;
        const int32_t s = restore[0], column = restore[1];
        if (s < 0 || s >= plan->num_sequences || column < 0 || restore[2] < 1 ||
            restore[2] > KV_RAW_BLOCK_SIZE || column > INT32_MAX / KV_RAW_BLOCK_SIZE - 1)
            return KV_ERR_RANGE;
        const int32_t first = column * KV_RAW_BLOCK_SIZE / blocks->block_size;
        const int32_t last = (column * KV_RAW_BLOCK_SIZE + restore[2] - 1) / blocks->block_size;
        kv_status status =
            kv_check_block_ids(raw->block_rows[s] + column, 1, blocks->raw->num_blocks);
        for (int32_t c = first; status == KV_OK && c <= last; c++)
            if (plan->block_rows[s][c] != -1)
                status = kv_check_block_ids(plan->block_rows[s] + c, 1, blocks->num_blocks);
        if (status != KV_OK)
            return status;
    }
    return KV_OK;
}

kv_status kv_restore_raw(const kv_plan *plan, const kv_blocks *blocks) {
    if (!plan)
        return KV_ERR_NULL;
    kv_status status = kv_check_blocks(blocks);
    const kv_kernels *kernels = kv_active_kernels();
    if (status != KV_OK || !blocks->raw || !plan->raw)
        return status;
    if ((status = check_restores(plan, blocks)) != KV_OK)
        return status;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    const int64_t nbytes = (int64_t)plan->raw->num_restores * KV_RAW_BLOCK_SIZE *
                           blocks->num_heads * blocks->head_dim * 4;
    restore_task task = {kernels, plan, blocks, kv_num_parts(nbytes, PART_BYTES)};
    kv_run_parts(task.num_parts, restore_part, &task);
    return KV_OK;
}
