/* Kernel text: attention of a tile of query rows over one split of 256 tokens.
 *
 * Rows are taken four at a time and then what is left, so that an element of K or V is loaded and decoded
 * once for up to four rows. `format`, `num_rows` and the other constants of the innermost functions
 * are known where they are called, and the loops over them unroll into registers. */

enum {
    KV_DECODE_ROWS = 16, /* from this many rows on, a run is decoded once instead of per group */
    KV_AHEAD_TOKENS = 4  /* tokens between prefetches */
};

/* Spreads the prefetch of the run that is read a few runs later over the work on this one. */
typedef struct kv_ahead {
    const kv_run *run; /* NULL: none */
    int32_t row_bytes;
} kv_ahead;

KV_INLINE void kv_prefetch_rows(kv_ahead ahead, int32_t begin, int32_t end) {
    if (!ahead.run)
        return;
    for (int32_t t = begin; t < end && t < ahead.run->count; t++)
        for (int32_t b = 0; b < ahead.row_bytes; b += 64)
            kv_prefetch(ahead.run->rows + t * ahead.run->stride + b);
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* One vector of dims of num_rows queries and num_tokens keys: sum[r * num_tokens + t] += q_r k_t. */
KV_INLINE void kv_score_dims(kv_format format, int num_rows, int num_tokens, const float *q,
                             int32_t q_width, const char *const *k, int32_t d, int n, kv_vec *sum) {
    kv_vec x[4];
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        x[r] = kv_load(q + r * q_width + d);
    KV_UNROLL
    for (int t = 0; t < num_tokens; t++) {
        const kv_vec y = kv_load_elements(format, k[t], d, n);
        KV_UNROLL
        for (int r = 0; r < num_rows; r++)
            sum[r * num_tokens + t] = kv_fma(x[r], y, sum[r * num_tokens + t]);
    }
}

/* Tokens that num_rows rows meet at once: the vectors that they sum into, rounded up to four rows
 * for three, so that the number of tokens stays a power of two. */
KV_INLINE int kv_tokens_at_once(int num_rows) {
    return KV_ACCUMULATORS / (num_rows == 3 ? 4 : num_rows);
}

/* Scores of kv_tokens_at_once tokens from token t on. Past `count` the last token stands
 * in for the missing ones: nothing outside the run is read, and what it yields is not used. */
KV_INLINE void kv_score_tokens(kv_format format, int num_rows, const float *q, int32_t q_width,
                               const kv_run *run, int32_t t, int32_t count, int32_t head_dim,
                               float *scores) {
    const int num_tokens = kv_tokens_at_once(num_rows);
    const char *k[KV_ACCUMULATORS];
    kv_vec sum[KV_ACCUMULATORS];
    float folded[KV_ACCUMULATORS];
    KV_UNROLL
    for (int i = 0; i < num_tokens; i++)
        k[i] = run->rows + run->stride * (t + i < count ? t + i : count - 1);
    KV_UNROLL
    for (int i = 0; i < KV_ACCUMULATORS; i++)
        sum[i] = kv_zero();

    int32_t d = 0;
    for (; d + KV_LANES <= head_dim; d += KV_LANES)
        kv_score_dims(format, num_rows, num_tokens, q, q_width, k, d, KV_LANES, sum);
    if (d < head_dim)
        kv_score_dims(format, num_rows, num_tokens, q, q_width, k, d, head_dim - d, sum);

    KV_UNROLL
    for (int i = 0; i < KV_ACCUMULATORS; i += KV_LANES)
        kv_store(folded + i, kv_fold(sum + i));
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        memcpy(scores + r * KV_SPLIT + t, folded + r * num_tokens,
               (size_t)num_tokens * sizeof(float));
}

/* Scores of the rows [row, row + num_rows) over the part of a run that starts at token `start` of
 * the split and that the last of these rows sees. */
KV_INLINE void kv_score_group(const kv_split_task *task, kv_format format, const kv_run *run,
                              int32_t start, int32_t row, int num_rows, kv_ahead ahead) {
    const int num_tokens = kv_tokens_at_once(num_rows);
    const int32_t seen = task->visible[row + num_rows - 1] - start;
    const int32_t count = seen < run->count ? seen : run->count;
    for (int32_t t = 0; t < count; t += num_tokens) {
        kv_prefetch_rows(ahead, t, t + num_tokens);
        kv_score_tokens(format, num_rows, task->q + (int64_t)row * task->q_width, task->q_width,
                        run, t, count, task->head_dim,
                        task->scores + (int64_t)row * KV_SPLIT + start);
    }
}

KV_INLINE void kv_score_run(const kv_split_task *task, kv_format format, const kv_run *run,
                            int32_t start, kv_ahead ahead) {
    int32_t row = 0;
    for (; row + 4 <= task->num_rows; row += 4) {
        kv_score_group(task, format, run, start, row, 4, ahead);
        ahead.run = NULL;
    }
    const int32_t left = task->num_rows - row;
    if (left == 3)
        kv_score_group(task, format, run, start, row, 3, ahead);
    else if (left == 2)
        kv_score_group(task, format, run, start, row, 2, ahead);
    else if (left == 1)
        kv_score_group(task, format, run, start, row, 1, ahead);
}

/* ---- values ---------------------------------------------------------------------------------- */

/* num_vectors vectors of dims from d on: o_r += p_r[t] v[t], tokens in order. `n` is the lanes that
 * exist of the last vector. */
KV_INLINE void kv_value_tile(kv_format format, int num_rows, int num_vectors, const float *p,
                             const kv_run *run, int32_t begin, int32_t end, int32_t d, int n,
                             float *o, int32_t o_width, kv_ahead ahead) {
    kv_vec sum[KV_ACCUMULATORS];
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        KV_UNROLL
    for (int i = 0; i < num_vectors; i++)
        sum[r * num_vectors + i] = kv_load(o + r * o_width + d + i * KV_LANES);
    const char *row = run->rows + begin * run->stride;
    for (int32_t t = begin; t < end;) {
        const int32_t pause = end - t < KV_AHEAD_TOKENS ? end : t + KV_AHEAD_TOKENS;
        kv_prefetch_rows(ahead, t, pause);
        for (; t < pause; t++, row += run->stride) {
            kv_vec y[8];
            KV_UNROLL
            for (int i = 0; i < num_vectors; i++)
                y[i] = kv_load_elements(format, row, d + i * KV_LANES, n);
            KV_UNROLL
            for (int r = 0; r < num_rows; r++) {
                const kv_vec x = kv_broadcast(p[r * KV_SPLIT + t]);
                KV_UNROLL
                for (int i = 0; i < num_vectors; i++)
                    sum[r * num_vectors + i] = kv_fma(x, y[i], sum[r * num_vectors + i]);
            }
        }
    }
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        KV_UNROLL
    for (int i = 0; i < num_vectors; i++)
        kv_store(o + r * o_width + d + i * KV_LANES, sum[r * num_vectors + i]);
}

/* Tokens [begin, end) of a run, all of which num_rows rows see, in strips of dims. */
KV_INLINE void kv_value_tokens(kv_format format, int num_rows, const float *p, const kv_run *run,
                               int32_t begin, int32_t end, int32_t head_dim, float *o,
                               int32_t o_width, kv_ahead ahead) {
    int32_t d = 0;
    if (begin >= end)
        return;
#define KV_STRIPS(num_vectors)                                                               \
    if (num_rows * (num_vectors) <= KV_ACCUMULATORS)                                         \
        for (; d + (num_vectors) * KV_LANES <= head_dim; d += (num_vectors) * KV_LANES) {    \
            kv_value_tile(format, num_rows, num_vectors, p, run, begin, end, d, KV_LANES, o, \
                          o_width, ahead);                                                   \
            ahead.run = NULL;                                                                \
        }
    KV_STRIPS(8)
    KV_STRIPS(4)
    KV_STRIPS(2)
    KV_STRIPS(1)
#undef KV_STRIPS
    if (d < head_dim)
        kv_value_tile(format, num_rows, 1, p, run, begin, end, d, head_dim - d, o, o_width, ahead);
}

/* The tokens that all rows of the group see go through together, the rest row by row. */
KV_INLINE void kv_value_group(const kv_split_task *task, kv_format format, const kv_run *run,
                              int32_t start, int32_t row, int num_rows, kv_ahead ahead) {
    const int32_t *visible = task->visible + row;
    const float *p = task->scores + (int64_t)row * KV_SPLIT + start;
    float *o = task->out.o + (int64_t)row * task->o_width;
    int32_t common = visible[0] - start;
    common = common < 0 ? 0 : common < run->count ? common : run->count;
    kv_value_tokens(format, num_rows, p, run, 0, common, task->head_dim_v, o, task->o_width, ahead);
    ahead.run = NULL;
    for (int r = 1; r < num_rows; r++) {
        const int32_t seen = visible[r] - start;
        kv_value_tokens(format, 1, p + r * KV_SPLIT, run, common,
                        seen < run->count ? seen : run->count, task->head_dim_v,
                        o + r * task->o_width, task->o_width, ahead);
    }
}

KV_INLINE void kv_value_run(const kv_split_task *task, kv_format format, const kv_run *run,
                            int32_t start, kv_ahead ahead) {
    int32_t row = 0;
    for (; row + 4 <= task->num_rows; row += 4) {
        kv_value_group(task, format, run, start, row, 4, ahead);
        ahead.run = NULL;
    }
    const int32_t left = task->num_rows - row;
    if (left == 3)
        kv_value_group(task, format, run, start, row, 3, ahead);
    else if (left == 2)
        kv_value_group(task, format, run, start, row, 2, ahead);
    else if (left == 1)
        kv_value_group(task, format, run, start, row, 1, ahead);
}

/* ---- one split ------------------------------------------------------------------------------- */

/* The i-th run of K, V and then the next split's K, in the order in which they are read. */
KV_INLINE kv_ahead kv_run_ahead(const kv_split_task *task, int32_t i) {
    const int32_t n = task->runs->num_runs;
    const int32_t k_bytes = task->head_dim * (task->k_format == KV_FORMAT_FP32 ? 4 : 2);
    const int32_t v_bytes = task->head_dim_v * (task->v_format == KV_FORMAT_FP32 ? 4 : 2);
    if (i < n)
        return (kv_ahead){&task->runs->k[i], k_bytes};
    if (i < 2 * n)
        return (kv_ahead){&task->runs->v[i - n], v_bytes};
    if (i < 2 * n + task->next->num_runs)
        return (kv_ahead){&task->next->k[i - 2 * n], k_bytes};
    return (kv_ahead){NULL, 0};
}

/* How many runs lie between what is computed and what is fetched: about 24 KiB. */
KV_INLINE int32_t kv_ahead_distance(const kv_split_task *task) {
    const kv_ahead first = kv_run_ahead(task, 0);
    const int32_t distance = 24576 / (first.run->count * first.row_bytes);
    return distance < 1 ? 1 : distance;
}

KV_INLINE kv_run kv_decode_run(const kv_split_task *task, kv_format format, const kv_run *run,
                               int32_t head_dim, int32_t width) {
    for (int32_t t = 0; t < run->count; t++)
        kv_convert(run->rows + t * run->stride, format, task->decoded + (int64_t)t * width,
                   KV_FORMAT_FP32, head_dim);
    return (kv_run){(const char *)task->decoded, (int64_t)width * (int64_t)sizeof(float),
                    run->count};
}

static void kv_score_split(const kv_split_task *task) {
    const int32_t distance = kv_ahead_distance(task);
    const int decode = task->k_format != KV_FORMAT_FP32 && task->num_rows >= KV_DECODE_ROWS;
    int32_t start = 0;
    for (int32_t i = 0; i < task->runs->num_runs; i++) {
        const kv_run *run = &task->runs->k[i];
        const kv_ahead ahead = kv_run_ahead(task, i + distance);
        if (decode) {
            const kv_run decoded =
                kv_decode_run(task, task->k_format, run, task->head_dim, task->q_width);
            kv_score_run(task, KV_FORMAT_FP32, &decoded, start, ahead);
        } else if (task->k_format == KV_FORMAT_FP16) {
            kv_score_run(task, KV_FORMAT_FP16, run, start, ahead);
        } else if (task->k_format == KV_FORMAT_BF16) {
            kv_score_run(task, KV_FORMAT_BF16, run, start, ahead);
        } else {
            kv_score_run(task, KV_FORMAT_FP32, run, start, ahead);
        }
        start += run->count;
    }
}

static void kv_value_split(const kv_split_task *task) {
    const int32_t distance = kv_ahead_distance(task), n = task->runs->num_runs;
    const int decode = task->v_format != KV_FORMAT_FP32 && task->num_rows >= KV_DECODE_ROWS;
    int32_t start = 0;
    memset(task->out.o, 0, (size_t)task->num_rows * (size_t)task->o_width * sizeof(float));
    for (int32_t i = 0; i < n; i++) {
        const kv_run *run = &task->runs->v[i];
        const kv_ahead ahead = kv_run_ahead(task, n + i + distance);
        if (decode) {
            const kv_run decoded =
                kv_decode_run(task, task->v_format, run, task->head_dim_v, task->o_width);
            kv_value_run(task, KV_FORMAT_FP32, &decoded, start, ahead);
        } else if (task->v_format == KV_FORMAT_FP16) {
            kv_value_run(task, KV_FORMAT_FP16, run, start, ahead);
        } else if (task->v_format == KV_FORMAT_BF16) {
            kv_value_run(task, KV_FORMAT_BF16, run, start, ahead);
        } else {
            kv_value_run(task, KV_FORMAT_FP32, run, start, ahead);
        }
        start += run->count;
    }
}
