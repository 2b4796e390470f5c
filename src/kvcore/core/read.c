/* kv_read: what a sequence's next token would read, as plain rows. */

#include "dispatch.h"
#include "raw_rows.h"
#include "storage.h"
#include "threads.h"

enum { PART_BYTES = 256 * 1024 /* less than this is not worth waking a thread for */ };

typedef struct read_task {
    const kv_kernels *kernels;
    const kv_blocks *blocks;
    const kv_read_source *sequence;
    const kv_rows *out;
    int32_t start, num_tokens, num_parts;
} read_task;

static int is_raw(const read_task *task, int32_t j) {
    const kv_blocks *blocks = task->blocks;
    const int32_t length = task->sequence->length;
    int32_t start = kv_raw_start(blocks, length);
    if (kv_format_kind_of(blocks->format) == KV_KIND_CHANNEL && start > length) {
        start = length / KV_GROUP_TOKENS * KV_GROUP_TOKENS; /* sealed with the next token */
    }
    return blocks->raw && task->sequence->raw_row && (j < blocks->raw_first || j >= start);
}

/* Raw rows that were lost are what restoring would make of them. */
static void read_quantized(const read_task *task, int32_t j, int32_t head, void *to) {
    const kv_blocks *blocks = task->blocks, *raw = blocks->raw;
    const int32_t head_dim = blocks->head_dim;
    const kv_format format = kv_dtype_format(task->out->dtype);
    const int32_t raw_block = is_raw(task, j) ? task->sequence->raw_row[j / KV_RAW_BLOCK_SIZE] : -1;
    float row[KV_MAX_HEAD_DIM] __attribute__((aligned(64)));
    uint16_t rounded[KV_MAX_HEAD_DIM];
    if (raw_block >= 0) {
        task->kernels->convert(kv_block_row(raw, raw_block, head, j % KV_RAW_BLOCK_SIZE),
                               KV_FORMAT_BF16, to, format, head_dim);
        return;
    }
    kv_decode_token(task->kernels, blocks, task->sequence->block_row[j / blocks->block_size], head,
                    j % blocks->block_size, row);
    if (!is_raw(task, j)) {
        task->kernels->convert(row, KV_FORMAT_FP32, to, format, head_dim);
        return;
    }
    task->kernels->convert(row, KV_FORMAT_FP32, rounded, KV_FORMAT_BF16, head_dim);
    task->kernels->convert(rounded, KV_FORMAT_BF16, to, format, head_dim);
}

static void read_row(const read_task *task, int32_t j, int32_t head, void *to) {
    const kv_blocks *blocks = task->blocks;
    if (!kv_format_is_float(blocks->format)) {
        read_quantized(task, j, head, to);
        return;
    }
    const int32_t block = task->sequence->block_row[j / blocks->block_size];
    task->kernels->convert(kv_block_row(blocks, block, head, j % blocks->block_size),
                           blocks->format, to, kv_dtype_format(task->out->dtype), blocks->head_dim);
}

static void read_part(void *context, int32_t part) {
    static const int32_t zero = 0;
    const read_task *task = context;
    const kv_rows *out = task->out;
    const int64_t head_bytes = out->head_stride * kv_dtype_bytes(out->dtype);
    const int32_t end = (int32_t)kv_part_begin(task->num_tokens, part + 1, task->num_parts);
    for (int32_t i = (int32_t)kv_part_begin(task->num_tokens, part, task->num_parts); i < end; i++)
        for (int32_t head = 0; head < out->num_heads; head++)
            read_row(task, task->start + i, head, kv_row(out, &zero, 0, i) + head * head_bytes);
}

/* Raw blocks that are there lie in their pool; whether they are there is looked at row by row. */
static kv_status check_raw_row(const kv_blocks *blocks, const kv_read_source *sequence,
                               int32_t stop) {
    if (!blocks->raw || !sequence->raw_row)
        return KV_OK;
    if (sequence->length < stop ||
        sequence->length > (int64_t)sequence->num_raw_columns * KV_RAW_BLOCK_SIZE)
        return KV_ERR_RANGE;
    for (int32_t i = 0; i < sequence->num_raw_columns; i++)
        if (sequence->raw_row[i] < -1 || sequence->raw_row[i] >= blocks->raw->num_blocks)
            return KV_ERR_RANGE;
    return KV_OK;
}

static kv_status check_read(const kv_blocks *blocks, const kv_read_source *sequence, int32_t start,
                            int32_t stop, const kv_rows *out) {
    kv_status status;
    if ((status = kv_check_blocks(blocks)) != KV_OK)
        return status;
    if (!sequence)
        return KV_ERR_NULL;
    if (start < 0 || stop < start || sequence->num_columns < 0 ||
        stop > (int64_t)sequence->num_columns * blocks->block_size)
        return KV_ERR_RANGE;
    if ((status = kv_check_rows(out, 1, stop - start, 1)) != KV_OK)
        return status;
    if (out->padded_length != 0 || out->num_heads != blocks->num_heads ||
        out->head_dim != blocks->head_dim)
        return KV_ERR_VALUE;
    if (start == stop)
        return KV_OK;
    if (!sequence->block_row)
        return KV_ERR_NULL;
    const int32_t first = start / blocks->block_size, last = (stop - 1) / blocks->block_size;
    status = kv_check_block_ids(sequence->block_row + first, last - first + 1, blocks->num_blocks);
    return status == KV_OK ? check_raw_row(blocks, sequence, stop) : status;
}

kv_status kv_read(const kv_blocks *blocks, const kv_read_source *sequence, int32_t start,
                  int32_t stop, const kv_rows *out) {
    const kv_status status = check_read(blocks, sequence, start, stop, out);
    const kv_kernels *kernels = kv_active_kernels();
    if (status != KV_OK || start == stop)
        return status;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    const int32_t num_tokens = stop - start;
    const int64_t nbytes = (int64_t)num_tokens * out->num_heads * out->head_dim * 4;
    read_task task = {
        kernels, blocks, sequence, out, start, num_tokens, kv_num_parts(nbytes, PART_BYTES)};
    kv_run_parts(task.num_parts, read_part, &task);
    return KV_OK;
}
