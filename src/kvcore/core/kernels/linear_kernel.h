/* Kernel text: y = x w^T for few rows. A panel of eight outputs is read from memory once and meets
 * every row while it is in the cache. */

enum {
    KV_PANEL = 8,
    KV_LINEAR_AHEAD = 512 /* floats of each weight row between compute and prefetch */
};

/* num_outputs weight rows from w on against num_rows rows of x. `next` is the row that follows the
 * panel for each of these, or NULL when nothing is to be prefetched. */
KV_INLINE void kv_linear_tile(const kv_linear_task *task, int num_rows, int num_outputs,
                              const float *x, const float *w, const float *next, float *sums)
{
    const int32_t count = task->num_inputs;
    kv_vec sum[KV_ACCUMULATORS];
    KV_UNROLL
    for (int i = 0; i < KV_ACCUMULATORS; i++)
        sum[i] = kv_zero();
    for (int32_t k = 0; k < count; k += KV_LANES) {
        const int n = count - k < KV_LANES ? count - k : KV_LANES;
        kv_vec a[4];
        KV_UNROLL
        for (int r = 0; r < num_rows; r++)
            a[r] = kv_load_elements(KV_FORMAT_FP32, (const char *)(x + r * task->x_stride), k, n);
        if (next && k % 16 == 0) {
            const float *p = k + KV_LINEAR_AHEAD < count ? w + k + KV_LINEAR_AHEAD
                             : count > KV_LINEAR_AHEAD   ? next + k + KV_LINEAR_AHEAD - count
                                                         : next + k;
            KV_UNROLL
            for (int i = 0; i < num_outputs; i++)
                kv_prefetch(p + i * task->w_stride);
        }
        KV_UNROLL
        for (int i = 0; i < num_outputs; i++) {
            const float *row = w + i * task->w_stride;
            const kv_vec b = kv_load_elements(KV_FORMAT_FP32, (const char *)row, k, n);
            KV_UNROLL
            for (int r = 0; r < num_rows; r++)
                sum[r * num_outputs + i] = kv_fma(a[r], b, sum[r * num_outputs + i]);
        }
    }
    KV_UNROLL
    for (int i = 0; i < KV_ACCUMULATORS; i += KV_LANES)
        kv_store(sums + i, kv_fold(sum + i));
}

KV_INLINE void kv_linear_outputs(const kv_linear_task *task, int num_rows, int num_outputs,
                                 int32_t row, int32_t output, const float *next)
{
    float sums[KV_ACCUMULATORS];
    kv_linear_tile(task, num_rows, num_outputs, task->x + row * task->x_stride,
                   task->w + output * task->w_stride, next, sums);
    for (int r = 0; r < num_rows; r++)
        for (int i = 0; i < num_outputs; i++) {
            const float bias = task->bias ? task->bias[output + i] : 0.0f;
            const float y = sums[r * num_outputs + i];
            task->y[(row + r) * task->y_stride + output + i] = task->bias ? y + bias : y;
        }
}

/* One panel, or the single outputs that fill no panel, against num_rows rows. */
KV_INLINE void kv_linear_panel(const kv_linear_task *task, int num_rows, int32_t row,
                               int32_t begin, int32_t end, int prefetch)
{
    const int width = KV_ACCUMULATORS / num_rows < KV_PANEL ? KV_ACCUMULATORS / num_rows : KV_PANEL;
    if (end - begin == KV_PANEL)
        for (int32_t n = begin; n < end; n += width)
            kv_linear_outputs(task, num_rows, width, row, n,
                              prefetch ? task->w + (n + KV_PANEL) * task->w_stride : NULL);
    else
        for (int32_t n = begin; n < end; n++)
            kv_linear_outputs(task, num_rows, 1, row, n, NULL);
}

static void kv_linear_range(const kv_linear_task *task, int32_t begin, int32_t end)
{
    for (int32_t n = begin; n < end; n += KV_PANEL) {
        const int32_t stop = end - n < KV_PANEL ? end : n + KV_PANEL;
        const int more = end - stop >= KV_PANEL;
        int32_t row = 0;
        for (; row + 4 <= task->num_rows; row += 4)
            kv_linear_panel(task, 4, row, n, stop, more && row == 0);
        if (row + 2 <= task->num_rows) {
            kv_linear_panel(task, 2, row, n, stop, more && row == 0);
            row += 2;
        }
        if (row < task->num_rows)
            kv_linear_panel(task, 1, row, n, stop, more && row == 0);
    }
}
