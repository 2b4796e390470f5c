/* Moves rows between the caller's arrays and blocks: append, read, copy, quantize. */

#include "dispatch.h"
#include "storage.h"
#include "threads.h"

#include <string.h>

/* Less than this is not worth waking a thread for. */
enum { PART_BYTES = 256 * 1024 };

/* ---- append ---------------------------------------------------------------------------------- */

typedef struct append_task {
    const kv_kernels *kernels;
    const kv_plan *plan;
    const kv_rows *rows;
    const kv_blocks *blocks;
    int32_t num_parts;
} append_task;

static void append_token(const append_task *task, const char *row, int32_t slot) {
    const kv_rows *rows = task->rows;
    const kv_blocks *blocks = task->blocks;
    const int64_t head_bytes = rows->head_stride * kv_dtype_bytes(rows->dtype);
    const int32_t block = slot / blocks->block_size, offset = slot % blocks->block_size;
    for (int32_t head = 0; head < rows->num_heads; head++)
        task->kernels->convert(row + head * head_bytes, kv_dtype_format(rows->dtype),
                               kv_block_row(blocks, block, head, offset), blocks->format,
                               rows->head_dim);
}

static void append_part(void *context, int32_t part) {
    static const int32_t zero = 0;
    const append_task *task = context;
    const int64_t num_tokens = task->plan->num_tokens;
    const int32_t end = (int32_t)kv_part_begin(num_tokens, part + 1, task->num_parts);
    int32_t t = (int32_t)kv_part_begin(num_tokens, part, task->num_parts);
    /* Ragged rows need not know the sequences: they are like one. */
    const int padded = task->rows->padded_length > 0;
    const int32_t *starts = padded ? task->plan->query_starts : &zero;
    int32_t s = 0;
    for (; t < end; t++) {
        while (padded && t >= starts[s + 1])
            s++;
        if (task->plan->slots[t] >= 0)
            append_token(task, kv_row(task->rows, starts, s, t - starts[s]), task->plan->slots[t]);
    }
}

static kv_status check_slots(const kv_plan *plan, const kv_blocks *blocks) {
    const int64_t num_slots = (int64_t)blocks->num_blocks * blocks->block_size;
    if (plan->num_tokens > 0 && !plan->slots)
        return KV_ERR_NULL;
    for (int32_t t = 0; t < plan->num_tokens; t++)
        if (plan->slots[t] < -1 || plan->slots[t] >= num_slots)
            return KV_ERR_RANGE;
    return KV_OK;
}

static kv_status check_append(const kv_plan *plan, const kv_rows *rows, const kv_blocks *blocks) {
    kv_status status;
    if (!plan || !rows)
        return KV_ERR_NULL;
    if (plan->num_sequences < 0 || plan->num_tokens < 0)
        return KV_ERR_VALUE;
    if ((status = kv_check_blocks(blocks)) != KV_OK)
        return status;
    if ((status = kv_check_rows(rows, plan->num_sequences, plan->num_tokens, 0)) != KV_OK)
        return status;
    if (rows->padded_length > 0 && (status = kv_check_queries(plan, rows->padded_length)) != KV_OK)
        return status;
    if (rows->num_heads != blocks->num_heads || rows->head_dim != blocks->head_dim)
        return KV_ERR_VALUE;
    return check_slots(plan, blocks);
}

kv_status kv_append(const kv_plan *plan, const kv_rows *rows, const kv_blocks *blocks) {
    const kv_status status = check_append(plan, rows, blocks);
    const kv_kernels *kernels = kv_active_kernels();
    if (status != KV_OK)
        return status;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    const int64_t nbytes = (int64_t)plan->num_tokens * rows->num_heads *
                           kv_format_row_bytes(blocks->format, rows->head_dim);
    append_task task = {kernels, plan, rows, blocks, kv_num_parts(nbytes, PART_BYTES)};
    kv_run_parts(task.num_parts, append_part, &task);
    return KV_OK;
}

/* ---- read ------------------------------------------------------------------------------------ */

typedef struct read_task {
    const kv_kernels *kernels;
    const kv_blocks *blocks;
    const int32_t *block_row;
    const kv_rows *out;
    int32_t start, num_tokens, num_parts;
} read_task;

static void read_part(void *context, int32_t part) {
    static const int32_t zero = 0;
    const read_task *task = context;
    const kv_blocks *blocks = task->blocks;
    const kv_rows *out = task->out;
    const int64_t head_bytes = out->head_stride * kv_dtype_bytes(out->dtype);
    const int32_t end = (int32_t)kv_part_begin(task->num_tokens, part + 1, task->num_parts);
    for (int32_t i = (int32_t)kv_part_begin(task->num_tokens, part, task->num_parts); i < end;
         i++) {
        const int32_t j = task->start + i;
        const int32_t block = task->block_row[j / blocks->block_size];
        for (int32_t head = 0; head < out->num_heads; head++)
            task->kernels->convert(kv_block_row(blocks, block, head, j % blocks->block_size),
                                   blocks->format, kv_row(out, &zero, 0, i) + head * head_bytes,
                                   kv_dtype_format(out->dtype), out->head_dim);
    }
}

kv_status kv_read(const kv_blocks *blocks, const int32_t *block_row, int32_t num_columns,
                  int32_t start, int32_t stop, const kv_rows *out) {
    kv_status status;
    const kv_kernels *kernels = kv_active_kernels();
    if ((status = kv_check_blocks(blocks)) != KV_OK)
        return status;
    if (start < 0 || stop < start || num_columns < 0 ||
        stop > (int64_t)num_columns * blocks->block_size)
        return KV_ERR_RANGE;
    if ((status = kv_check_rows(out, 1, stop - start, 1)) != KV_OK)
        return status;
    if (out->padded_length != 0 || out->num_heads != blocks->num_heads ||
        out->head_dim != blocks->head_dim)
        return KV_ERR_VALUE;
    if (start == stop)
        return KV_OK;
    if (!block_row)
        return KV_ERR_NULL;
    const int32_t first = start / blocks->block_size, last = (stop - 1) / blocks->block_size;
    status = kv_check_block_ids(block_row + first, last - first + 1, blocks->num_blocks);
    if (status != KV_OK)
        return status;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    const int32_t num_tokens = stop - start;
    const int64_t nbytes = (int64_t)num_tokens * out->num_heads * out->head_dim * 4;
    read_task task = {
        kernels, blocks, block_row, out, start, num_tokens, kv_num_parts(nbytes, PART_BYTES)};
    kv_run_parts(task.num_parts, read_part, &task);
    return KV_OK;
}

/* ---- copy ------------------------------------------------------------------------------------ */

typedef struct copy_task {
    const kv_plan *plan;
    const kv_blocks *blocks;
    int32_t num_parts;
} copy_task;

static void copy_head(const kv_blocks *blocks, const int32_t *copy, int32_t head) {
    const int64_t row_bytes = kv_format_row_bytes(blocks->format, blocks->head_dim);
    const char *from = kv_block_row(blocks, copy[0], head, 0);
    char *to = kv_block_row(blocks, copy[1], head, 0);
    if (blocks->token_stride == row_bytes) {
        memcpy(to, from, (size_t)(copy[2] * row_bytes));
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

/* ---- quantize -------------------------------------------------------------------------------- */

typedef struct convert_task {
    const kv_kernels *kernels;
    const char *from;
    char *to;
    kv_format from_format, to_format;
    int64_t num_rows;
    int32_t head_dim, num_parts;
} convert_task;

static void convert_part(void *context, int32_t part) {
    const convert_task *task = context;
    const int64_t begin = kv_part_begin(task->num_rows, part, task->num_parts);
    const int64_t end = kv_part_begin(task->num_rows, part + 1, task->num_parts);
    task->kernels->convert(
        task->from + begin * kv_format_row_bytes(task->from_format, task->head_dim),
        task->from_format, task->to + begin * kv_format_row_bytes(task->to_format, task->head_dim),
        task->to_format, (end - begin) * task->head_dim);
}

static kv_status convert_rows(const void *from, kv_format from_format, void *to,
                              kv_format to_format, int64_t num_rows, int32_t head_dim) {
    int64_t nbytes;
    const kv_kernels *kernels = kv_active_kernels();
    if (!kv_head_dim_is_valid(head_dim) || num_rows < 0)
        return KV_ERR_VALUE;
    if (__builtin_mul_overflow(num_rows, (int64_t)head_dim * 4, &nbytes))
        return KV_ERR_OVERFLOW;
    if (num_rows == 0)
        return KV_OK;
    if (!from || !to)
        return KV_ERR_NULL;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    convert_task task = {kernels,   from,     to,       from_format,
                         to_format, num_rows, head_dim, kv_num_parts(nbytes, PART_BYTES)};
    kv_run_parts(task.num_parts, convert_part, &task);
    return KV_OK;
}

kv_status kv_quantize(const void *rows, kv_dtype dtype, kv_format format, int64_t num_rows,
                      int32_t head_dim, void *out) {
    if (!kv_dtype_is_valid(dtype) || !kv_format_is_valid(format))
        return KV_ERR_VALUE;
    if (!kv_format_is_float(format))
        return KV_ERR_UNSUPPORTED;
    return convert_rows(rows, kv_dtype_format(dtype), out, format, num_rows, head_dim);
}

kv_status kv_dequantize(const void *codes, kv_format format, int64_t num_rows, int32_t head_dim,
                        kv_dtype dtype, void *out) {
    if (!kv_dtype_is_valid(dtype) || !kv_format_is_valid(format))
        return KV_ERR_VALUE;
    if (!kv_format_is_float(format))
        return KV_ERR_UNSUPPORTED;
    return convert_rows(codes, format, out, kv_dtype_format(dtype), num_rows, head_dim);
}
