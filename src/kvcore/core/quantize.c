/* Plain arrays of rows in and out of a format. */

#include "dispatch.h"
#include "formats.h"
#include "threads.h"
#include "workspace.h"

/* Less than this is not worth waking a thread for. */
enum { PART_BYTES = 256 * 1024 };

/* Rows lie in units, which are encoded and decoded as one: 32 rows of a CHANNEL format, or a row. */
typedef struct quantize_task {
    const kv_kernels *kernels;
    const kv_channels *channels;
    kv_format format;       /* of the encoded side */
    kv_format float_format; /* of the plain side */
    const char *from;
    char *to;
    int32_t head_dim, unit_rows, num_parts;
    int64_t num_units;
    int64_t encoded_bytes, code_bytes, plain_bytes; /* of a unit */
    float *scratch;                                 /* [num_parts, unit_rows, head_dim] */
} quantize_task;

typedef struct span {
    int64_t begin, end;
    float *scratch;
} span;

static span span_of(const quantize_task *task, int32_t part) {
    const int64_t size = (int64_t)task->unit_rows * task->head_dim;
    return (span){.begin = kv_part_begin(task->num_units, part, task->num_parts),
                  .end = kv_part_begin(task->num_units, part + 1, task->num_parts),
                  .scratch = task->scratch ? task->scratch + part * size : NULL};
}

static void encode_part(void *context, int32_t part) {
    const quantize_task *task = context;
    const int64_t size = (int64_t)task->unit_rows * task->head_dim;
    const span units = span_of(task, part);
    for (int64_t i = units.begin; i < units.end; i++) {
        const char *from = task->from + i * task->plain_bytes;
        char *to = task->to + i * task->encoded_bytes;
        if (units.scratch)
            task->kernels->convert(from, task->float_format, units.scratch, KV_FORMAT_FP32, size);
        task->kernels->encode(task->format, units.scratch ? units.scratch : (const float *)from,
                              task->unit_rows, task->head_dim, task->channels, to,
                              to + task->code_bytes);
    }
}

static void decode_part(void *context, int32_t part) {
    const quantize_task *task = context;
    const int64_t size = (int64_t)task->unit_rows * task->head_dim;
    const span units = span_of(task, part);
    for (int64_t i = units.begin; i < units.end; i++) {
        const char *from = task->from + i * task->encoded_bytes;
        char *to = task->to + i * task->plain_bytes;
        task->kernels->decode(task->format, from, from + task->code_bytes, 0, task->unit_rows,
                              task->head_dim, task->channels,
                              units.scratch ? units.scratch : (float *)to, task->head_dim);
        if (units.scratch)
            task->kernels->convert(units.scratch, KV_FORMAT_FP32, to, task->float_format, size);
    }
}

/* From one float format to another. */
static void convert_part(const quantize_task *task, int32_t part, kv_format from_format,
                         kv_format to_format) {
    const span rows = span_of(task, part);
    const int64_t from_bytes = kv_format_row_bytes(from_format, task->head_dim);
    const int64_t to_bytes = kv_format_row_bytes(to_format, task->head_dim);
    task->kernels->convert(task->from + rows.begin * from_bytes, from_format,
                           task->to + rows.begin * to_bytes, to_format,
                           (rows.end - rows.begin) * task->head_dim);
}

static void narrow_part(void *context, int32_t part) {
    const quantize_task *task = context;
    convert_part(task, part, task->float_format, task->format);
}

static void widen_part(void *context, int32_t part) {
    const quantize_task *task = context;
    convert_part(task, part, task->format, task->float_format);
}

/* ---- the calls ------------------------------------------------------------------------------- */

static int are_scales(const float *scales, int32_t head_dim) {
    for (int32_t i = 0; i < head_dim; i++)
        if (!(scales[i] > 0))
            return 0;
    return 1;
}

static kv_status check_channels(const quantize_task *task) {
    const float *bias = task->channels->bias, *scales = task->channels->scales;
    if (kv_format_is_float(task->format))
        return bias || scales ? KV_ERR_VALUE : KV_OK;
    if ((task->format == KV_FORMAT_INT8_STATIC) != (scales != NULL))
        return scales ? KV_ERR_VALUE : KV_ERR_NULL;
    if ((bias && !task->kernels->is_finite(bias, KV_FORMAT_FP32, task->head_dim)) ||
        (scales && !(task->kernels->is_finite(scales, KV_FORMAT_FP32, task->head_dim) &&
                     are_scales(scales, task->head_dim))))
        return KV_ERR_VALUE;
    return KV_OK;
}

/* Fills in what follows from the fields that the caller set. */
static kv_status prepare(quantize_task *task, kv_dtype dtype, int64_t num_rows) {
    static const kv_channels none;
    int64_t nbytes;
    const int32_t head_dim = task->head_dim;
    if (!task->channels)
        task->channels = &none;
    if (!kv_dtype_is_valid(dtype) || !kv_format_is_valid(task->format) || num_rows < 0 ||
        !kv_format_takes_head_dim(task->format, head_dim))
        return KV_ERR_VALUE;
    task->unit_rows = kv_format_kind_of(task->format) == KV_KIND_CHANNEL ? KV_GROUP_TOKENS : 1;
    if (num_rows % task->unit_rows != 0)
        return KV_ERR_VALUE;
    if (__builtin_mul_overflow(num_rows, (int64_t)head_dim * 4, &nbytes))
        return KV_ERR_OVERFLOW;
    if (num_rows > 0 && (!task->from || !task->to))
        return KV_ERR_NULL;
    if (!(task->kernels = kv_active_kernels()))
        return KV_ERR_UNSUPPORTED;
    task->num_units = num_rows / task->unit_rows;
    task->num_parts = kv_num_parts(nbytes, PART_BYTES);
    task->float_format = kv_dtype_format(dtype);
    task->code_bytes = task->unit_rows * kv_format_code_bytes(task->format, head_dim);
    task->encoded_bytes = task->unit_rows * kv_format_row_bytes(task->format, head_dim);
    task->plain_bytes = task->unit_rows * kv_format_row_bytes(task->float_format, head_dim);
    return check_channels(task);
}

/* Encodes or decodes, by way of float32 rows where the plain side has others. */
static kv_status run_units(quantize_task *task, kv_part_function function) {
    if (task->float_format == KV_FORMAT_FP32) {
        kv_run_parts(task->num_parts, function, task);
        return KV_OK;
    }
    kv_workspace *workspace = kv_workspace_acquire();
    if (!workspace)
        return KV_ERR_NO_MEMORY;
    const size_t rows = (size_t)task->num_parts * (size_t)task->unit_rows;
    task->scratch =
        kv_workspace_reserve(workspace, 0, rows * (size_t)task->head_dim * sizeof(float));
    if (task->scratch)
        kv_run_parts(task->num_parts, function, task);
    kv_workspace_release(workspace);
    return task->scratch ? KV_OK : KV_ERR_NO_MEMORY;
}

kv_status kv_quantize(const void *rows, kv_dtype dtype, kv_format format, int64_t num_rows,
                      int32_t head_dim, const kv_channels *channels, void *out) {
    quantize_task task = {
        .channels = channels, .format = format, .head_dim = head_dim, .from = rows, .to = out};
    const kv_status status = prepare(&task, dtype, num_rows);
    if (status != KV_OK || num_rows == 0)
        return status;
    if (kv_format_is_float(format)) {
        kv_run_parts(task.num_parts, narrow_part, &task);
        return KV_OK;
    }
    if (!task.kernels->is_finite(rows, task.float_format, num_rows * head_dim))
        return KV_ERR_NOT_FINITE;
    return run_units(&task, encode_part);
}

kv_status kv_dequantize(const void *codes, kv_format format, int64_t num_rows, int32_t head_dim,
                        const kv_channels *channels, kv_dtype dtype, void *out) {
    quantize_task task = {
        .channels = channels, .format = format, .head_dim = head_dim, .from = codes, .to = out};
    const kv_status status = prepare(&task, dtype, num_rows);
    if (status != KV_OK || num_rows == 0)
        return status;
    if (kv_format_is_float(format)) {
        kv_run_parts(task.num_parts, widen_part, &task);
        return KV_OK;
    }
    return run_units(&task, decode_part);
}
