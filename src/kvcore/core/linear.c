#include "dispatch.h"
#include "threads.h"

enum {
    PART_BYTES = 256 * 1024, /* of weights: less is not worth waking a thread for */
    GRAIN = 8,               /* outputs; the kernel reads this many weight rows at a time */
    LARGEST = INT32_MAX / 2  /* so that sums of two sizes are int32 */
};

typedef struct linear_context {
    const kv_kernels *kernels;
    kv_linear_task task;
    int32_t num_parts;
} linear_context;

static int32_t part_begin(const linear_context *context, int32_t part) {
    const int32_t num_outputs = context->task.num_outputs;
    const int64_t grains = ((int64_t)num_outputs + GRAIN - 1) / GRAIN;
    const int64_t begin = kv_part_begin(grains, part, context->num_parts) * GRAIN;
    return begin < num_outputs ? (int32_t)begin : num_outputs;
}

static void linear_part(void *argument, int32_t part) {
    const linear_context *context = argument;
    context->kernels->linear(&context->task, part_begin(context, part),
                             part_begin(context, part + 1));
}

/* Whether `count` rows `stride` apart of `length` elements each are apart and can be addressed. */
static int rows_are_sound(int64_t stride, int32_t count, int32_t length) {
    int64_t elements;
    return count == 1 || (stride >= length && !__builtin_mul_overflow(stride, count, &elements) &&
                          elements < INT64_MAX / 8);
}

kv_status kv_linear(const float *x, int64_t x_stride, const float *w, int64_t w_stride,
                    const float *bias, float *y, int64_t y_stride, int32_t num_rows,
                    int32_t num_outputs, int32_t num_inputs) {
    const kv_kernels *kernels = kv_active_kernels();
    if (num_rows < 0 || num_outputs <= 0 || num_inputs <= 0)
        return KV_ERR_VALUE;
    if (num_rows == 0)
        return KV_OK;
    if (!x || !w || !y)
        return KV_ERR_NULL;
    if (!rows_are_sound(x_stride, num_rows, num_inputs) ||
        !rows_are_sound(w_stride, num_outputs, num_inputs) ||
        !rows_are_sound(y_stride, num_rows, num_outputs))
        return KV_ERR_VALUE;
    if (num_rows > LARGEST || num_outputs > LARGEST || num_inputs > LARGEST)
        return KV_ERR_OVERFLOW;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    const int64_t nbytes = (int64_t)num_outputs * num_inputs * (int64_t)sizeof(float);
    linear_context context = {
        kernels,
        {x, w, bias, y, x_stride, w_stride, y_stride, num_rows, num_inputs, num_outputs},
        kv_num_parts(nbytes, PART_BYTES)};
    kv_run_parts(context.num_parts, linear_part, &context);
    return KV_OK;
}
