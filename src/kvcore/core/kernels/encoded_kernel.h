/* Kernel text: scores and values of a few query rows over a split of which runs are encoded.
 *
 * Encoded rows are not decoded: queries are transformed instead, scores and weights take the tokens'
 * scales, and what the values sum to is transformed back once. Runs of raw rows take the way of
 * attend_kernel.h. */

/* How the runs of a format are computed with. */
typedef enum kv_way {
    KV_WAY_DECODE, /* as plain rows, float32 */
    KV_WAY_LEVELS, /* as their levels, float32 */
    KV_WAY_INT8    /* as their levels, by dot products of bytes */
} kv_way;

KV_INLINE int kv_is_channel(kv_format format) {
    return format == KV_FORMAT_CHAN4 || format == KV_FORMAT_CHAN2;
}

KV_INLINE kv_way kv_way_of(kv_format format) {
    if (format == KV_FORMAT_INT4 || format == KV_FORMAT_FP8_E4M3)
        return KV_WAY_DECODE;
    if (KV_HAS_DOT_INT8)
        return KV_WAY_INT8;
    return kv_is_channel(format) ? KV_WAY_DECODE : KV_WAY_LEVELS;
}

/* ---- queries --------------------------------------------------------------------------------- */

/* Queries for encoded keys: rows * (q_width + KV_ROW_ALIGN) floats. */
typedef struct kv_encoded_queries {
    float *panels; /* KV_WAY_INT8: planes of bytes, or for sealed groups the rows */
    float *plus;   /* [rows] what is added to every score */
    float *units;  /* [rows] KV_WAY_INT8: what a whole number stands for */
    int32_t *zero; /* [rows] ... and what the score of the level 0 comes to */
} kv_encoded_queries;

KV_INLINE kv_encoded_queries kv_encoded_queries_at(float *floats, int32_t num_rows,
                                                   int32_t q_width) {
    float *rest = floats + (int64_t)num_rows * q_width;
    return (kv_encoded_queries){floats, rest, rest + num_rows, (int32_t *)(rest + 2 * num_rows)};
}

/* Scratch of a split, in its task's `decoded`. */
typedef struct kv_encoded_scratch {
    float *scales;    /* [KV_MAX_RUNS, KV_RUN], or those of one run */
    float *rows;      /* [KV_RUN, width] a run as float32 */
    uint8_t *lines;   /* ... or as bytes, in the same place */
    float *channels;  /* [2, width] of a sealed group, behind them */
    char *copy;       /* [KV_RUN, width] codes of a run that is not whole */
    int8_t *planes;   /* queries of a group of rows */
    float *most;      /* [rows] the largest weight */
    uint8_t *weights; /* [rows, 2, KV_SPLIT] */
} kv_encoded_scratch;

static kv_encoded_scratch kv_encoded_scratch_of(const kv_split_task *task) {
    const int64_t width = task->q_width > task->o_width ? task->q_width : task->o_width;
    const int64_t most = (task->num_rows + KV_ROW_ALIGN - 1) & -KV_ROW_ALIGN;
    kv_encoded_scratch s = {.scales = task->decoded};
    s.rows = s.scales + KV_MAX_RUNS * KV_RUN;
    s.lines = (uint8_t *)s.rows;
    s.channels = s.rows + KV_RUN / 2 * width;
    s.copy = (char *)(s.rows + KV_RUN * width);
    s.planes = (int8_t *)s.copy + KV_RUN * width;
    s.most = (float *)(s.planes + 8 * width);
    s.weights = (uint8_t *)(s.most + most);
    return s;
}

/* The scales of a run's tokens, with zeros up to KV_RUN. */
static void kv_run_scales(kv_format format, const kv_run *run, float *scales) {
    memset(scales, 0, KV_RUN * sizeof(float));
    for (int32_t t = 0; t < run->count; t += KV_LANES) {
        const int n = run->count - t < KV_LANES ? run->count - t : KV_LANES;
        const kv_vec x = format == KV_FORMAT_INT8_STATIC
                             ? kv_broadcast(1.0f)
                             : kv_load_elements(KV_FORMAT_BF16, run->metadata, t, n);
        kv_store_elements(KV_FORMAT_FP32, (char *)scales, t, x, n);
    }
}

#if KV_HAS_DOT_INT8
#include "int8_kernel.h"
#endif

static void kv_scale_channels(float *x, const float *scales, int32_t head_dim) {
    for (int32_t d = 0; d < head_dim; d += KV_LANES)
        kv_store(x + d, kv_mul(kv_load(x + d), kv_load(scales + d)));
}

static float kv_dot_rows(const float *x, const float *y, int32_t head_dim) {
    kv_vec sum = kv_zero();
    for (int32_t d = 0; d < head_dim; d += KV_LANES)
        sum = kv_fma(kv_load(x + d), kv_load(y + d), sum);
    return kv_hsum(sum);
}

/* Keys that are encoded have no padding: their q_width is head_dim. */
static void kv_pack_encoded(float *q, int32_t num_rows, int32_t head_dim, kv_format k_format,
                            const kv_channels *channels, float *panels, float *encoded) {
    const kv_encoded_queries to = kv_encoded_queries_at(encoded, num_rows, head_dim);
    const kv_way way = kv_way_of(k_format);
    static const float zeros[KV_MAX_HEAD_DIM];
    kv_pack_groups(q, num_rows, head_dim, kv_is_float(k_format) ? k_format : KV_FORMAT_BF16,
                   panels);
    if (kv_is_float(k_format))
        return;
    for (int32_t r = 0; r < num_rows; r++) {
        float *row = q + (int64_t)r * head_dim;
        /* Where bytes are multiplied, what is not finite shows here alone. */
        to.plus[r] = kv_dot_rows(row, channels->bias ? channels->bias : zeros, head_dim);
        if (way != KV_WAY_DECODE && k_format == KV_FORMAT_INT8_STATIC)
            kv_scale_channels(row, channels->scales, head_dim);
        else if (way != KV_WAY_DECODE && kv_is_rotated(k_format))
            kv_rotate(row, head_dim, kv_rotation_signs(), 1.0f);
    }
#if KV_HAS_DOT_INT8
    if (way == KV_WAY_INT8 && kv_is_channel(k_format))
        memcpy(to.panels, q, (size_t)num_rows * (size_t)head_dim * sizeof(float));
    else if (way == KV_WAY_INT8)
        kv_int8_pack_queries(&to, q, num_rows, head_dim);
#endif
    if (way != KV_WAY_INT8)
        kv_pack_groups(q, num_rows, head_dim, KV_FORMAT_FP32, to.panels);
}

/* ---- runs as float32 ------------------------------------------------------------------------- */

/* An encoded run as rows of its levels, or as plain ones. */
static kv_run kv_float_run(kv_way way, const kv_run *run, kv_format format,
                           const kv_channels *channels, int32_t head_dim, float *rows) {
    if (way == KV_WAY_DECODE)
        kv_decode(format, run->rows, run->metadata, run->first, run->count, head_dim, channels,
                  rows, head_dim);
    for (int32_t t = 0; t < run->count && way == KV_WAY_LEVELS; t++)
        kv_decode_levels(format, (const uint8_t *)run->rows + t * run->stride, head_dim,
                         rows + (int64_t)t * head_dim);
    const int32_t nbytes = head_dim * (int32_t)sizeof(float);
    return (kv_run){
        .rows = (const char *)rows, .stride = nbytes, .count = run->count, .nbytes = nbytes};
}

/* Scores of levels become those of the rows. */
static void kv_scale_scores(const kv_split_task *task, const float *plus, const float *scales,
                            int32_t start, int32_t count) {
    for (int32_t r = 0; r < task->num_rows; r++)
        for (int32_t t = 0; t < count; t += KV_LANES) {
            float *scores = task->scores + (int64_t)r * KV_SPLIT + start + t;
            const int n = count - t < KV_LANES ? count - t : KV_LANES;
            const kv_vec s = kv_load_elements(KV_FORMAT_FP32, (const char *)scores, 0, n);
            kv_store_elements(KV_FORMAT_FP32, (char *)scores, 0,
                              kv_fma(s, kv_load(scales + t), kv_broadcast(plus[r])), n);
        }
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* Asks for the metadata of a run; `i` counts as in kv_run_ahead. */
static void kv_ask_metadata(const kv_split_task *task, const kv_run *run, int32_t i) {
    const int is_value = i / task->runs->num_runs == 1;
    const int is_group = !is_value && kv_is_channel(task->k_format);
    const int32_t nbytes = is_group ? 4 * task->head_dim : 2 * run->count;
    for (int32_t at = 0; run->metadata && at < nbytes; at += KV_LINE_BYTES)
        kv_prefetch(run->metadata + at);
}

static void kv_score_encoded_run(const kv_split_task *task, const kv_encoded_queries *q,
                                 const kv_encoded_scratch *scratch, const kv_run *run,
                                 int32_t start, const kv_run *ahead) {
    const kv_way way = kv_way_of(task->k_format);
#if KV_HAS_DOT_INT8
    if (way == KV_WAY_INT8) {
        kv_int8_score_run(task, q, scratch, run, start, ahead);
        return;
    }
#endif
    kv_split_task plain = *task;
    const kv_run rows =
        kv_float_run(way, run, task->k_format, &task->k_channels, task->head_dim, scratch->rows);
    plain.panels = q->panels;
    kv_score_run(&plain, KV_FORMAT_FP32, &rows, start, kv_ahead_of(ahead));
    if (way == KV_WAY_LEVELS) {
        kv_run_scales(task->k_format, run, scratch->scales);
        kv_scale_scores(task, q->plus, scratch->scales, start, run->count);
    }
}

static void kv_score_encoded(const kv_split_task *task, const kv_encoded_scratch *scratch) {
    const kv_split_runs *runs = task->runs;
    const kv_encoded_queries q =
        kv_encoded_queries_at((float *)task->encoded, task->num_rows, task->q_width);
    const int32_t distance = kv_ahead_distance(task);
    int32_t start = runs->start;
    for (int32_t i = 0; i < runs->num_runs; start += runs->k[i++].count) {
        const kv_run *run = &runs->k[i], *ahead = kv_run_ahead(task, run, i + distance);
        if (!kv_seen_by_any(task, 0, task->num_rows, start, run->count))
            continue;
        kv_ask_metadata(task, ahead, i + distance);
        if (run->raw)
            kv_score_run(task, KV_FORMAT_BF16, run, start, kv_ahead_of(ahead));
        else
            kv_score_encoded_run(task, &q, scratch, run, start, ahead);
    }
}

/* ---- values ---------------------------------------------------------------------------------- */

/* The weights of a row's encoded tokens take the tokens' scales. Returns the largest. */
static float kv_scale_weights(const kv_split_task *task, const kv_encoded_scratch *scratch,
                              int32_t r) {
    const kv_split_runs *runs = task->runs;
    const int32_t seen = task->visible[r] > 0 ? task->visible[r] : 0;
    float *weights = task->scores + (int64_t)r * KV_SPLIT;
    kv_vec most = kv_zero();
    for (int32_t j = seen; j < KV_SPLIT; j++)
        weights[j] = 0.0f;
    int32_t start = runs->start;
    for (int32_t i = 0; i < runs->num_runs && start < seen; start += runs->v[i++].count)
        for (int32_t t = 0; t < runs->v[i].count && !runs->v[i].raw; t += KV_LANES) {
            char *at = (char *)(weights + start + t);
            const int n = runs->v[i].count - t < KV_LANES ? runs->v[i].count - t : KV_LANES;
            const kv_vec p = kv_load_elements(KV_FORMAT_FP32, at, 0, n);
            /* What is not seen may have any scale. */
            const kv_vec w =
                kv_keep_above(p, 1e-38f, kv_mul(p, kv_load(scratch->scales + i * KV_RUN + t)));
            kv_store_elements(KV_FORMAT_FP32, at, 0, w, n);
            most = kv_max(most, w);
        }
    return kv_hmax(most);
}

static void kv_weigh(const kv_split_task *task, const kv_encoded_scratch *scratch) {
    const kv_split_runs *runs = task->runs;
    int32_t start = runs->start;
    for (int32_t i = 0; i < runs->num_runs; start += runs->v[i++].count)
        if (!runs->v[i].raw && kv_seen_by_any(task, 0, task->num_rows, start, runs->v[i].count))
            kv_run_scales(task->v_format, &runs->v[i], scratch->scales + i * KV_RUN);
        else
            memset(scratch->scales + i * KV_RUN, 0, KV_RUN * sizeof(float));
    for (int32_t r = 0; r < task->num_rows; r++) {
        scratch->most[r] = kv_scale_weights(task, scratch, r);
#if KV_HAS_DOT_INT8
        kv_int8_pack_weights(task->scores + (int64_t)r * KV_SPLIT, scratch->most[r],
                             scratch->weights + (int64_t)r * KV_INT8_WEIGHTS);
#endif
    }
}

/* Runs of V, either those that are raw or the others. */
static int kv_value_runs(const kv_split_task *task, const kv_encoded_scratch *scratch, int raw) {
    const kv_split_runs *runs = task->runs;
    const kv_way way = kv_way_of(task->v_format);
    const int32_t distance = runs->num_runs + kv_ahead_distance(task);
    int32_t start = runs->start;
    int any = 0;
    for (int32_t i = 0; i < runs->num_runs; start += runs->v[i++].count) {
        const kv_run *run = &runs->v[i], *ahead = kv_run_ahead(task, run, i + distance);
        if (run->raw != raw || !kv_seen_by_any(task, 0, task->num_rows, start, run->count))
            continue;
        kv_ask_metadata(task, ahead, i + distance);
        if (raw && !any++)
            kv_order_values(task);
        if (raw) {
            kv_value_run(task, KV_FORMAT_BF16, run, start, kv_ahead_of(ahead));
            continue;
        }
#if KV_HAS_DOT_INT8
        if (way == KV_WAY_INT8) {
            kv_int8_value_run(task, scratch, run, start, ahead);
            continue;
        }
#endif
        const kv_run rows = kv_float_run(way, run, task->v_format, &task->v_channels,
                                         task->head_dim_v, scratch->rows);
        kv_value_run(task, KV_FORMAT_FP32, &rows, start, kv_ahead_of(ahead));
    }
    return any;
}

/* The transform of V, undone. */
static void kv_restore_values(const kv_split_task *task) {
    for (int32_t r = 0; r < task->num_rows; r++) {
        float *o = task->out.o + (int64_t)r * task->o_width;
        if (task->v_format == KV_FORMAT_INT8_STATIC)
            kv_scale_channels(o, task->v_channels.scales, task->head_dim_v);
        else if (kv_is_rotated(task->v_format))
            kv_rotate_back(o, task->head_dim_v, kv_rotation_signs(), 1.0f);
    }
}

static void kv_value_encoded(const kv_split_task *task, const kv_encoded_scratch *scratch) {
    const kv_way way = kv_way_of(task->v_format);
    memset(task->out.o, 0, (size_t)task->num_rows * (size_t)task->o_width * sizeof(float));
    if (way != KV_WAY_DECODE)
        kv_weigh(task, scratch);
    kv_value_runs(task, scratch, 0);
#if KV_HAS_DOT_INT8
    if (way == KV_WAY_INT8)
        kv_int8_finish_values(task, scratch);
#endif
    if (way != KV_WAY_DECODE)
        kv_restore_values(task);
    if (kv_value_runs(task, scratch, 1))
        kv_order_values(task);
}
