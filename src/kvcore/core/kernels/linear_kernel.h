/* Kernel text: y = x w^T for few rows. A panel of eight outputs is read from memory once and meets
 * every row while it is in the cache; meanwhile what comes next is fetched. */

enum {
    KV_PANEL = 8,
    KV_PANEL_ROWS = 8,     /* rows of x that meet a weight while it is in a register */
    KV_LINEAR_AHEAD = 1024 /* inputs between a weight row's compute and its prefetch */
};

/* Outputs that num_rows rows meet at once: a power of two, so that panels divide evenly. */
KV_INLINE int kv_outputs_at_once(int num_rows) {
    const int room = KV_ACCUMULATORS / num_rows;
    return room >= 8 ? 8 : room >= 4 ? 4 : room >= 2 ? 2 : 1;
}

/* How one pass over a panel fetches. The passes over a panel share the lines of the next panel;
 * a single pass fetches only a little ahead in each weight row, and then in the row that takes its
 * place. */
typedef struct kv_panel_pass {
    int prefetch;
    int32_t first, step; /* inputs where the pass fetches: first, first + step, ... */
    int32_t ahead;       /* ... and how far from there */
} kv_panel_pass;

/* One vector of inputs: sum[r * num_outputs + i] += x_r w_i. */
KV_INLINE void kv_linear_inputs(const kv_linear_task *task, int num_rows, int num_outputs,
                                const float *x, const float *w, int32_t k, int n, kv_vec *sum) {
    kv_vec b[KV_PANEL];
    KV_UNROLL
    for (int i = 0; i < num_outputs; i++)
        b[i] = kv_load_elements(KV_FORMAT_FP32, (const char *)(w + i * task->w_stride), k, n);
    KV_UNROLL
    for (int r = 0; r < num_rows; r++) {
        const char *row = (const char *)(x + r * task->x_stride);
        const kv_vec a = kv_load_elements(KV_FORMAT_FP32, row, k, n);
        KV_UNROLL
        for (int i = 0; i < num_outputs; i++)
            sum[r * num_outputs + i] = kv_fma(a, b[i], sum[r * num_outputs + i]);
    }
}

/* sums[r * num_outputs + i] = x_r . w_i over num_inputs. */
KV_INLINE void kv_linear_tile(const kv_linear_task *task, int num_rows, int num_outputs,
                              const float *x, const float *w, kv_panel_pass pass, float *sums) {
    const int32_t count = task->num_inputs;
    int32_t k = 0, fetch_at = pass.prefetch ? pass.first : count;
    kv_vec sum[KV_ACCUMULATORS];
    KV_UNROLL
    for (int i = 0; i < KV_ACCUMULATORS; i++)
        sum[i] = kv_zero();
    for (; k + KV_LANES <= count; k += KV_LANES) {
        if (k >= fetch_at) {
            const int64_t wrap = KV_PANEL * task->w_stride - count;
            const float *line = w + k + pass.ahead + (k + pass.ahead < count ? 0 : wrap);
            KV_UNROLL
            for (int i = 0; i < num_outputs; i++)
                kv_prefetch(line + i * task->w_stride);
            fetch_at += pass.step;
        }
        kv_linear_inputs(task, num_rows, num_outputs, x, w, k, KV_LANES, sum);
    }
    if (k < count)
        kv_linear_inputs(task, num_rows, num_outputs, x, w, k, count - k, sum);
    KV_UNROLL
    for (int i = 0; i < KV_ACCUMULATORS; i += KV_LANES)
        kv_store(sums + i, kv_fold(sum + i));
}

KV_INLINE void kv_linear_outputs(const kv_linear_task *task, int num_rows, int num_outputs,
                                 int32_t row, int32_t output, kv_panel_pass pass) {
    float sums[KV_ACCUMULATORS];
    kv_linear_tile(task, num_rows, num_outputs, task->x + row * task->x_stride,
                   task->w + output * task->w_stride, pass, sums);
    for (int r = 0; r < num_rows; r++)
        for (int i = 0; i < num_outputs; i++) {
            float *y = task->y + (row + r) * task->y_stride + output + i;
            *y = sums[r * num_outputs + i];
            if (task->bias)
                *y += task->bias[output + i];
        }
}

/* A whole panel, or the outputs at the end that fill none. */
KV_INLINE void kv_linear_panel(const kv_linear_task *task, int num_rows, int32_t row, int32_t begin,
                               int32_t end, kv_panel_pass pass) {
    const int width = kv_outputs_at_once(num_rows);
    if (end - begin == KV_PANEL)
        for (int32_t n = begin; n < end; n += width)
            kv_linear_outputs(task, num_rows, width, row, n, pass);
    else
        for (int32_t n = begin; n < end; n++)
            kv_linear_outputs(task, num_rows, 1, row, n, pass);
}

static void kv_linear_range(const kv_linear_task *task, int32_t begin, int32_t end) {
    const int32_t num_passes = (task->num_rows + KV_PANEL_ROWS - 1) / KV_PANEL_ROWS;
    const int32_t ahead =
        num_passes > 1 || task->num_inputs < KV_LINEAR_AHEAD ? task->num_inputs : KV_LINEAR_AHEAD;
    for (int32_t n = begin; n < end; n += KV_PANEL) {
        const int32_t stop = end - n < KV_PANEL ? end : n + KV_PANEL;
        for (int32_t pass = 0; pass < num_passes; pass++) {
            const kv_panel_pass share = {end - stop >= KV_PANEL, 16 * pass, 16 * num_passes, ahead};
            const int32_t row = pass * KV_PANEL_ROWS, left = task->num_rows - row;
            switch (left < KV_PANEL_ROWS ? left : KV_PANEL_ROWS) {
#define KV_CASE(num_rows)                                     \
    case num_rows:                                            \
        kv_linear_panel(task, num_rows, row, n, stop, share); \
        break;
                KV_CASE(1)
                KV_CASE(2)
                KV_CASE(3)
                KV_CASE(4)
                KV_CASE(5)
                KV_CASE(6)
                KV_CASE(7)
                KV_CASE(8)
#undef KV_CASE
            }
        }
    }
}
