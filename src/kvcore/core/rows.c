/* Moves rows between arrays of one format and another. */

#include "dispatch.h"
#include "storage.h"
#include "threads.h"

/* Less than this is not worth waking a thread for. */
enum { PART_BYTES = 256 * 1024 };

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
