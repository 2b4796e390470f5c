/* Kernel text: a split of which rows see scattered tokens (masks, the edge of a window), what options
 * do to scores, and the split as a whole. The bits of a row are those that attend_kernel.h gives to
 * the tokens it sees; the code is apart so that the plain path stays as it is. */

/* The bits of a run of `count` tokens, from token `start` of the split on, that a row sees. */
KV_INLINE uint32_t kv_seen_bits(const kv_split_task *task, int32_t row, int32_t start,
                                int32_t count) {
    const uint32_t word = task->seen[row * KV_SPLIT_WORDS + start / 32] >> (start % 32);
    return word & (UINT32_MAX >> (32 - count));
}

/* ... that at least one of num_rows rows sees. */
KV_INLINE uint32_t kv_seen_by_any(const kv_split_task *task, int32_t row, int32_t num_rows,
                                  int32_t start, int32_t count) {
    uint32_t any = 0;
    for (int32_t r = 0; r < num_rows; r++)
        any |= kv_seen_bits(task, row + r, start, count);
    return any;
}

/* Scores of num_rows rows from the first to the last token of a run that one of them sees. What lies
 * between and is not seen may get a score too. */
KV_INLINE void kv_score_seen(const kv_split_task *task, kv_format format, const kv_run *run,
                             int32_t start, int32_t row, int num_rows) {
    const int num_tokens = kv_tokens_at_once(num_rows);
    const uint32_t any = kv_seen_by_any(task, row, num_rows, start, run->count);
    if (!any)
        return;
    /* The first is rounded down, so that no store passes the end of the scratch row. */
    const int32_t end = 32 - __builtin_clz(any);
    for (int32_t t = __builtin_ctz(any) & -num_tokens; t < end; t += num_tokens)
        kv_score_tokens(format, num_rows, task->q + (int64_t)row * task->q_width, task->q_width,
                        run, t, end, task->head_dim,
                        task->scores + (int64_t)row * KV_SPLIT + start);
}

KV_INLINE void kv_score_seen_run(const kv_split_task *task, kv_format format, const kv_run *run,
                                 int32_t start) {
    int32_t row = 0;
    for (; row + 4 <= task->num_rows; row += 4)
        kv_score_seen(task, format, run, start, row, 4);
    for (; row < task->num_rows; row++)
        kv_score_seen(task, format, run, start, row, 1);
}

/* Stretches of a run that the same of num_rows rows see, in order: together where all rows see one,
 * and row by row elsewhere. */
KV_INLINE void kv_value_seen(const kv_split_task *task, kv_format format, const kv_run *run,
                             int32_t start, int32_t row, int num_rows) {
    const float *p = task->scores + (int64_t)row * KV_SPLIT + start;
    float *o = task->out.o + (int64_t)row * task->o_width;
    const kv_ahead none = {NULL, 0};
    uint32_t seen[4], changes = 0, all = UINT32_MAX;
    for (int r = 0; r < num_rows; r++) {
        seen[r] = kv_seen_bits(task, row + r, start, run->count);
        changes |= seen[r] ^ seen[r] >> 1;
        all &= seen[r];
    }
    for (int32_t begin = 0, end; begin < run->count; begin = end) {
        const uint32_t left = changes >> begin;
        end = left ? begin + __builtin_ctz(left) + 1 : run->count;
        if (all >> begin & 1) {
            kv_value_tokens(format, num_rows, p, run, begin, end, task->head_dim_v, o,
                            task->o_width, none);
            continue;
        }
        for (int r = 0; r < num_rows; r++)
            if (seen[r] >> begin & 1)
                kv_value_tokens(format, 1, p + r * KV_SPLIT, run, begin, end, task->head_dim_v,
                                o + r * task->o_width, task->o_width, none);
    }
}

KV_INLINE void kv_value_seen_run(const kv_split_task *task, kv_format format, const kv_run *run,
                                 int32_t start) {
    int32_t row = 0;
    for (; row + 4 <= task->num_rows; row += 4)
        kv_value_seen(task, format, run, start, row, 4);
    for (; row < task->num_rows; row++)
        kv_value_seen(task, format, run, start, row, 1);
}

/* One of the two above over the runs that any row sees; the others are not read. */
#define KV_SEEN_RUNS(task, runs_of, format_of, dim, width, run_function)                \
    const int decode = format_of != KV_FORMAT_FP32 && task->num_rows >= KV_DECODE_ROWS; \
    int32_t start = task->runs->start;                                                  \
    for (int32_t i = 0; i < task->runs->num_runs; start += runs_of[i++].count) {        \
        const kv_run *run = &runs_of[i];                                                \
        if (!kv_seen_by_any(task, 0, task->num_rows, start, run->count))                \
            continue;                                                                   \
        if (decode) {                                                                   \
            const kv_run decoded = kv_decode_run(task, format_of, run, dim, width);     \
            run_function(task, KV_FORMAT_FP32, &decoded, start);                        \
        } else if (format_of == KV_FORMAT_FP16) {                                       \
            run_function(task, KV_FORMAT_FP16, run, start);                             \
        } else if (format_of == KV_FORMAT_BF16) {                                       \
            run_function(task, KV_FORMAT_BF16, run, start);                             \
        } else {                                                                        \
            run_function(task, KV_FORMAT_FP32, run, start);                             \
        }                                                                               \
    }

static void kv_score_seen_split(const kv_split_task *task) {
    KV_SEEN_RUNS(task, task->runs->k, task->k_format, task->head_dim, task->q_width,
                 kv_score_seen_run)
}

static void kv_value_seen_split(const kv_split_task *task) {
    memset(task->out.o, 0, (size_t)task->num_rows * (size_t)task->o_width * sizeof(float));
    KV_SEEN_RUNS(task, task->runs->v, task->v_format, task->head_dim_v, task->o_width,
                 kv_value_seen_run)
}
#undef KV_SEEN_RUNS

/* What options do to the scores that a row has, up to where it sees the last. */
static void kv_adjust_row(const kv_split_task *task, int32_t r) {
    float *scores = task->scores + (int64_t)r * KV_SPLIT;
    const int32_t count = task->visible[r];
    float ramp[KV_LANES];
    for (int l = 0; l < KV_LANES; l++)
        ramp[l] = (float)l;
    if (task->softcap > 0.0f) {
        const kv_vec cap = kv_broadcast(task->softcap);
        for (int32_t j = 0; j < count; j += KV_LANES)
            kv_store(scores + j, kv_mul(cap, kv_tanh(kv_div(kv_load(scores + j), cap))));
    }
    if (task->slopes) {
        const kv_vec slope = kv_broadcast(-task->slopes[r]);
        for (int32_t j = 0; j < count; j += KV_LANES) {
            const kv_vec place = task->places ? kv_load(task->places + j)
                                              : kv_add(kv_broadcast((float)j), kv_load(ramp));
            const kv_vec distance = kv_sub(kv_broadcast(task->distances[r]), place);
            kv_store(scores + j, kv_fma(slope, distance, kv_load(scores + j)));
        }
    }
    /* Last, as what is unseen may hold anything up to here. */
    for (int32_t j = 0; task->seen && j < count; j += 32) {
        const uint32_t seen = task->seen[r * KV_SPLIT_WORDS + j / 32];
        for (int32_t i = 0; i < 32 && seen != UINT32_MAX; i++)
            if (!(seen >> i & 1))
                scores[j + i] = -INFINITY;
    }
}

static void kv_attend_split(const kv_split_task *task) {
    const int adjusts = task->seen || task->slopes || task->softcap > 0.0f;
    if (task->seen)
        kv_score_seen_split(task);
    else
        kv_score_split(task);
    for (int32_t r = 0; r < task->num_rows; r++) {
        task->out.m[r] = -INFINITY;
        task->out.l[r] = 0.0f;
        if (task->visible[r] <= 0)
            continue;
        if (adjusts)
            kv_adjust_row(task, r);
        kv_softmax_row(task->scores + (int64_t)r * KV_SPLIT, task->visible[r], task->out.m + r,
                       task->out.l + r);
    }
    if (task->seen)
        kv_value_seen_split(task);
    else
        kv_value_split(task);
}
