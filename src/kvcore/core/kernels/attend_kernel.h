/* Kernel text: scores and values of a few query rows over one split of 256 tokens.
 *
 * Rows are taken up to eight at a time, so that an element of K or V is loaded and decoded once for
 * all of them. `format`, `num_rows` and the other constants of the innermost functions are known
 * where they are called, and the loops over them unroll into registers. */

enum { KV_AHEAD_BYTES = 24576, KV_LINE_BYTES = 64 };

/* The run that is read about KV_AHEAD_BYTES after the one at hand. Where a kernel loads byte b of
 * token t it asks for byte b of token t there, so that memory works as evenly as arithmetic. With the
 * run at hand itself there is nothing ahead: that costs little, and needs no branch. */
typedef struct kv_ahead {
    const char *rows;
    int64_t stride;
} kv_ahead;

KV_INLINE kv_ahead kv_ahead_of(const kv_run *run) { return (kv_ahead){run->rows, run->stride}; }

/* Lanes of a row of K or V, in the order that is cheapest to load: kv_load_bf16_swapped. */
KV_INLINE kv_vec kv_load_lanes(kv_format format, const char *row, int64_t at, int n) {
    if (format != KV_FORMAT_BF16)
        return kv_load_elements(format, row, at, n);
    const uint16_t *half = (const uint16_t *)row + at;
    return n == KV_LANES ? kv_load_bf16_swapped(half)
                         : kv_swap_middle(kv_load_bf16_partial(half, n));
}

KV_INLINE int kv_element_bytes(kv_format format) { return format == KV_FORMAT_FP32 ? 4 : 2; }

/* ---- what rows see --------------------------------------------------------------------------- */

/* The bits of a run of `count` tokens, from token `start` of the split on, that a row sees. */
KV_INLINE uint32_t kv_seen_bits(const kv_split_task *task, int32_t row, int32_t start,
                                int32_t count) {
    if (task->seen) {
        const uint32_t word = task->seen[row * KV_SPLIT_WORDS + start / 32] >> (start % 32);
        return word & (UINT32_MAX >> (32 - count));
    }
    const int32_t seen = task->visible[row] - start;
    return seen <= 0 ? 0 : UINT32_MAX >> (32 - (seen < count ? seen : count));
}

/* ... that at least one of num_rows rows sees. */
KV_INLINE uint32_t kv_seen_by_any(const kv_split_task *task, int32_t row, int32_t num_rows,
                                  int32_t start, int32_t count) {
    uint32_t any = 0;
    for (int32_t r = 0; r < num_rows; r++)
        any |= kv_seen_bits(task, row + r, start, count);
    return any;
}

/* Does `call` for num_rows rows, `rows` from `row` on at a time: most_rows, then what is left. */
#define KV_ROW_GROUPS(most_rows, num_rows, call)                      \
    do {                                                              \
        int32_t row = 0;                                              \
        for (; row + (most_rows) <= (num_rows); row += (most_rows)) { \
            enum { rows = (most_rows) };                              \
            call;                                                     \
        }                                                             \
        KV_ROW_GROUP(4, num_rows, call)                               \
        KV_ROW_GROUP(3, num_rows, call)                               \
        KV_ROW_GROUP(2, num_rows, call)                               \
        KV_ROW_GROUP(1, num_rows, call)                               \
    } while (0)
#define KV_ROW_GROUP(group_rows, num_rows, call) \
    if (row + (group_rows) <= (num_rows)) {      \
        enum { rows = (group_rows) };            \
        call;                                    \
        row += (group_rows);                     \
    }

/* ---- scores ---------------------------------------------------------------------------------- */

/* A group's queries vector by vector, [q_width / KV_LANES][rows][KV_LANES], so that one address
 * serves all its rows; for bf16 in the order of its lanes. */
KV_INLINE void kv_pack_group(const float *q, int32_t row, int num_rows, int32_t q_width,
                             kv_format format, float *panels) {
    q += (int64_t)row * q_width;
    panels += (int64_t)row * q_width;
    for (int32_t d = 0; d < q_width; d += KV_LANES, panels += num_rows * KV_LANES)
        KV_UNROLL
    for (int r = 0; r < num_rows; r++) {
        const kv_vec x = kv_load(q + r * q_width + d);
        kv_store(panels + r * KV_LANES, format == KV_FORMAT_BF16 ? kv_swap_middle(x) : x);
    }
}

static void kv_pack_groups(const float *q, int32_t num_rows, int32_t q_width, kv_format format,
                           float *panels) {
    KV_ROW_GROUPS(8, num_rows, kv_pack_group(q, row, rows, q_width, format, panels));
}

/* One vector of dims of num_rows queries and num_tokens keys: sum[r * stride + t] += q_r k_t. */
KV_INLINE void kv_score_dims(kv_format format, int num_rows, int num_tokens, int stride,
                             const float *q, const char *const *k, int32_t d, int n, kv_vec *sum) {
    q += (int64_t)d * num_rows;
    KV_UNROLL
    for (int t = 0; t < num_tokens; t++) {
        const kv_vec y = kv_load_lanes(format, k[t], d, n);
        KV_UNROLL
        for (int r = 0; r < num_rows; r++)
            sum[r * stride + t] = kv_fma(kv_load(q + r * KV_LANES), y, sum[r * stride + t]);
    }
}

/* All dims of num_rows queries and of num_tokens keys, at most eight: their addresses stay in
 * registers. */
KV_INLINE void kv_score_rows(kv_format format, int num_rows, int num_tokens, int stride,
                             const float *q, const char *const *k, int32_t head_dim, kv_ahead ahead,
                             kv_vec *sum) {
    const int line = KV_LINE_BYTES / kv_element_bytes(format);
    int32_t d = 0;
    for (; d + line <= head_dim; d += line) {
        const char *at = ahead.rows + d * kv_element_bytes(format);
        KV_UNROLL
        for (int t = 0; t < num_tokens; t++, at += ahead.stride)
            kv_prefetch(at);
        KV_UNROLL
        for (int i = 0; i < line; i += KV_LANES)
            kv_score_dims(format, num_rows, num_tokens, stride, q, k, d + i, KV_LANES, sum);
    }
    for (; d + KV_LANES <= head_dim; d += KV_LANES)
        kv_score_dims(format, num_rows, num_tokens, stride, q, k, d, KV_LANES, sum);
    if (d < head_dim)
        kv_score_dims(format, num_rows, num_tokens, stride, q, k, d, head_dim - d, sum);
}

/* Tokens that num_rows rows meet at once: the vectors that they sum into, rounded up to four rows
 * for three, so that the number of tokens stays a power of two. */
KV_INLINE int kv_tokens_at_once(int num_rows) {
    return KV_ACCUMULATORS / (num_rows == 3 ? 4 : num_rows);
}

/* Scores of kv_tokens_at_once tokens from token t on. From `end` on the last token stands in
 * for the missing ones: nothing outside the run is read, and what it yields is not used. */
KV_INLINE void kv_score_tokens(kv_format format, int num_rows, const float *q, const kv_run *run,
                               int32_t t, int32_t end, int32_t head_dim, kv_ahead ahead,
                               float *scores) {
    const int num_tokens = kv_tokens_at_once(num_rows), step = num_tokens < 8 ? num_tokens : 8;
    kv_vec sum[KV_ACCUMULATORS];
    float folded[KV_ACCUMULATORS];
    KV_UNROLL
    for (int i = 0; i < KV_ACCUMULATORS; i++)
        sum[i] = kv_zero();
    KV_UNROLL
    for (int first = 0; first < num_tokens; first += step) {
        const kv_ahead then = {ahead.rows + (t + first) * ahead.stride, ahead.stride};
        const char *k[8];
        KV_UNROLL
        for (int i = 0; i < step; i++) {
            const int32_t token = t + first + i;
            k[i] = run->rows + run->stride * (token < end ? token : end - 1);
        }
        kv_score_rows(format, num_rows, step, num_tokens, q, k, head_dim, then, sum + first);
    }
    KV_UNROLL
    for (int i = 0; i < KV_ACCUMULATORS; i += KV_LANES)
        kv_store(folded + i,
                 format == KV_FORMAT_BF16 ? kv_fold_swapped(sum + i) : kv_fold(sum + i));
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        memcpy(scores + r * KV_SPLIT + t, folded + r * num_tokens,
               (size_t)num_tokens * sizeof(float));
}

/* Scores of num_rows rows from the first to the last token of a run that one of them sees. What lies
 * between and is not seen may get a score too. */
KV_INLINE void kv_score_group(const kv_split_task *task, kv_format format, const kv_run *run,
                              int32_t start, int32_t row, int num_rows, kv_ahead ahead) {
    const int num_tokens = kv_tokens_at_once(num_rows);
    const uint32_t any = kv_seen_by_any(task, row, num_rows, start, run->count);
    if (!any)
        return;
    /* The first is rounded down, so that no store passes the end of the scratch row. */
    const int32_t end = 32 - __builtin_clz(any);
    for (int32_t t = __builtin_ctz(any) & -num_tokens; t < end; t += num_tokens)
        kv_score_tokens(format, num_rows, task->panels + (int64_t)row * task->q_width, run, t, end,
                        task->head_dim, ahead, task->scores + (int64_t)row * KV_SPLIT + start);
}

KV_INLINE void kv_score_run_as(const kv_split_task *task, kv_format format, const kv_run *run,
                               int32_t start, kv_ahead ahead) {
    KV_ROW_GROUPS(8, task->num_rows, kv_score_group(task, format, run, start, row, rows, ahead));
}

static void kv_score_run(const kv_split_task *task, kv_format format, const kv_run *run,
                         int32_t start, kv_ahead ahead) {
    if (format == KV_FORMAT_FP16)
        kv_score_run_as(task, KV_FORMAT_FP16, run, start, ahead);
    else if (format == KV_FORMAT_BF16)
        kv_score_run_as(task, KV_FORMAT_BF16, run, start, ahead);
    else
        kv_score_run_as(task, KV_FORMAT_FP32, run, start, ahead);
}

/* ---- values ---------------------------------------------------------------------------------- */

/* num_vectors vectors of dims from d on: o_r += p_r[t] v[t], tokens in order. `n` is the lanes that
 * exist of the last vector. */
KV_INLINE void kv_value_tile(kv_format format, int num_rows, int num_vectors, const float *p,
                             const kv_run *run, int32_t begin, int32_t end, int32_t d, int n,
                             float *o, int32_t o_width, kv_ahead ahead) {
    const int bytes = num_vectors * KV_LANES * kv_element_bytes(format);
    const char *row = run->rows + begin * run->stride + d * kv_element_bytes(format);
    const char *at = ahead.rows + begin * ahead.stride + d * kv_element_bytes(format);
    kv_vec sum[KV_ACCUMULATORS];
    KV_UNROLL
    for (int i = 0; i < num_rows * num_vectors; i++)
        sum[i] = kv_load(o + i / num_vectors * o_width + d + i % num_vectors * KV_LANES);
    for (int32_t t = begin; t < end; t++, row += run->stride, at += ahead.stride) {
        kv_vec y[8];
        KV_UNROLL
        for (int b = 0; b < bytes; b += KV_LINE_BYTES)
            kv_prefetch(at + b);
        KV_UNROLL
        for (int i = 0; i < num_vectors; i++)
            y[i] = kv_load_lanes(format, row, i * KV_LANES, n);
        KV_UNROLL
        for (int r = 0; r < num_rows; r++) {
            const kv_vec x = kv_broadcast(p[r * KV_SPLIT + t]);
            KV_UNROLL
            for (int i = 0; i < num_vectors; i++)
                sum[r * num_vectors + i] = kv_fma(x, y[i], sum[r * num_vectors + i]);
        }
    }
    KV_UNROLL
    for (int i = 0; i < num_rows * num_vectors; i++)
        kv_store(o + i / num_vectors * o_width + d + i % num_vectors * KV_LANES, sum[i]);
}

/* Tokens [begin, end) of a run, all of which num_rows rows see, in strips of dims. */
KV_INLINE void kv_value_tokens(kv_format format, int num_rows, const float *p, const kv_run *run,
                               int32_t begin, int32_t end, int32_t head_dim, float *o,
                               int32_t o_width, kv_ahead ahead) {
    int32_t d = 0;
#define KV_STRIPS(num_vectors)                                                               \
    if (num_rows * (num_vectors) <= KV_ACCUMULATORS)                                         \
        for (; d + (num_vectors) * KV_LANES <= head_dim; d += (num_vectors) * KV_LANES)      \
            kv_value_tile(format, num_rows, num_vectors, p, run, begin, end, d, KV_LANES, o, \
                          o_width, ahead);
    KV_STRIPS(8)
    KV_STRIPS(4)
    KV_STRIPS(2)
    KV_STRIPS(1)
#undef KV_STRIPS
    if (d < head_dim)
        kv_value_tile(format, num_rows, 1, p, run, begin, end, d, head_dim - d, o, o_width, ahead);
}

/* Stretches of a run that the same of num_rows rows see, in order: together where all rows see one,
 * and row by row elsewhere. */
KV_INLINE void kv_value_group(const kv_split_task *task, kv_format format, const kv_run *run,
                              int32_t start, int32_t row, int num_rows, kv_ahead ahead) {
    const float *p = task->scores + (int64_t)row * KV_SPLIT + start;
    float *o = task->out.o + (int64_t)row * task->o_width;
    uint32_t seen[8], changes = 0, all = UINT32_MAX;
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
                            task->o_width, ahead);
            continue;
        }
        for (int r = 0; r < num_rows; r++)
            if (seen[r] >> begin & 1)
                kv_value_tokens(format, 1, p + r * KV_SPLIT, run, begin, end, task->head_dim_v,
                                o + r * task->o_width, task->o_width, ahead);
    }
}

KV_INLINE void kv_value_run_as(const kv_split_task *task, kv_format format, const kv_run *run,
                               int32_t start, kv_ahead ahead) {
    KV_ROW_GROUPS(KV_ACCUMULATORS / 2, task->num_rows,
                  kv_value_group(task, format, run, start, row, rows, ahead));
}

static void kv_value_run(const kv_split_task *task, kv_format format, const kv_run *run,
                         int32_t start, kv_ahead ahead) {
    if (format == KV_FORMAT_FP16)
        kv_value_run_as(task, KV_FORMAT_FP16, run, start, ahead);
    else if (format == KV_FORMAT_BF16)
        kv_value_run_as(task, KV_FORMAT_BF16, run, start, ahead);
    else
        kv_value_run_as(task, KV_FORMAT_FP32, run, start, ahead);
}

/* Puts the dims of o in order, which were summed as kv_load_lanes has them. */
static void kv_order_values(const kv_split_task *task) {
    for (int32_t i = 0; i < task->num_rows * task->o_width; i += KV_LANES)
        kv_store(task->out.o + i, kv_swap_middle(kv_load(task->out.o + i)));
}

/* ---- one split ------------------------------------------------------------------------------- */

/* The i-th run of K, V and then the next split's K, in the order in which they are read; what no
 * row sees is not asked for. */
KV_INLINE const kv_run *kv_run_ahead(const kv_split_task *task, const kv_run *at_hand, int32_t i) {
    const kv_split_runs *runs = task->runs, *next = task->next;
    const int32_t n = runs->num_runs, start = runs->start + i % n * runs->k[0].count;
    if (i >= 2 * n)
        return i < 2 * n + next->num_runs ? &next->k[i - 2 * n] : at_hand;
    if (task->seen && !kv_seen_by_any(task, 0, task->num_rows, start, runs->k[i % n].count))
        return at_hand;
    return i < n ? &runs->k[i] : &runs->v[i - n];
}

/* How many runs lie between what is computed and what is fetched. */
KV_INLINE int32_t kv_ahead_distance(const kv_split_task *task) {
    const kv_split_runs *runs = task->runs;
    const int32_t distance = KV_AHEAD_BYTES / (runs->k[0].count * runs->k[0].nbytes);
    return distance < 1 ? 1 : distance < runs->num_runs ? distance : runs->num_runs;
}

/* run_function over the runs of K or of V that any row sees; the others are not read. */
#define KV_RUNS(task, runs_of, first, format_of, run_function)                     \
    const int32_t distance = (first) + kv_ahead_distance(task);                    \
    int32_t start = task->runs->start;                                             \
    for (int32_t i = 0; i < task->runs->num_runs; start += (runs_of)[i++].count) { \
        const kv_run *run = &(runs_of)[i];                                         \
        if (!kv_seen_by_any(task, 0, task->num_rows, start, run->count))           \
            continue;                                                              \
        const kv_run *ahead = kv_run_ahead(task, run, i + distance);               \
        run_function(task, format_of, run, start, kv_ahead_of(ahead));             \
    }

static void kv_score_split(const kv_split_task *task) {
    KV_RUNS(task, task->runs->k, 0, task->k_format, kv_score_run)
}

static void kv_value_split(const kv_split_task *task) {
    memset(task->out.o, 0, (size_t)task->num_rows * (size_t)task->o_width * sizeof(float));
    KV_RUNS(task, task->runs->v, task->runs->num_runs, task->v_format, kv_value_run)
    if (task->v_format == KV_FORMAT_BF16)
        kv_order_values(task);
}
#undef KV_RUNS
