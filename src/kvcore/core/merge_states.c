#include "dispatch.h"
#include "formats.h"
#include "threads.h"

enum { PART_ELEMENTS = 128 * 1024 }; /* less is not worth waking a thread for */

typedef struct merge_task {
    const kv_kernels *kernels;
    const float *outs, *lses;
    float *out, *lse;
    int64_t num_rows;
    int32_t num_partials, head_dim, num_parts;
} merge_task;

static void merge_part(void *context, int32_t part) {
    const merge_task *task = context;
    task->kernels->merge_states(
        task->outs, task->lses, task->num_partials, task->num_rows, task->head_dim,
        kv_part_begin(task->num_rows, part, task->num_parts),
        kv_part_begin(task->num_rows, part + 1, task->num_parts), task->out, task->lse);
}

kv_status kv_merge_states(const float *outs, const float *lses, int32_t num_partials,
                          int64_t num_rows, int32_t head_dim, float *out, float *lse) {
    int64_t elements, nbytes;
    const kv_kernels *kernels = kv_active_kernels();
    if (num_partials <= 0 || num_rows < 0 || !kv_head_dim_is_valid(head_dim))
        return KV_ERR_VALUE;
    if (__builtin_mul_overflow(num_rows, (int64_t)num_partials * head_dim, &elements) ||
        __builtin_mul_overflow(elements, 4, &nbytes))
        return KV_ERR_OVERFLOW;
    if (num_rows == 0)
        return KV_OK;
    if (!outs || !lses || !out)
        return KV_ERR_NULL;
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    merge_task task = {kernels,      outs,     lses,
                       out,          lse,      num_rows,
                       num_partials, head_dim, kv_num_parts(elements, PART_ELEMENTS)};
    kv_run_parts(task.num_parts, merge_part, &task);
    return KV_OK;
}
