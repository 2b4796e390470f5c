/* Kernel text: a few query rows over encoded runs by dot products of bytes. docs/numerics.md. */

#include "int8_levels.h"

#include "int8_scores.h"

#include "int8_values.h"

/* The second half of what lies ahead: half a line for every 16 dims and bit. */
KV_INLINE kv_int8_ahead kv_second_half(kv_format format, const kv_run *ahead) {
    const int bits = kv_low_bits(format) + kv_high_bits(format);
    return (kv_int8_ahead){ahead->rows + KV_RUN / 2 * ahead->nbytes, (bits + 1) / 2};
}

/* Queries for encoded keys, in the groups in which rows meet them; of sealed groups' only as they
 * are. */
static void kv_int8_pack_queries(const kv_encoded_queries *to, const float *q, int32_t num_rows,
                                 int32_t head_dim) {
    int8_t *planes = (int8_t *)to->panels;
    KV_ROW_GROUPS(KV_INT8_ROWS, num_rows,
                  kv_int8_pack_levels(rows, q + (int64_t)row * head_dim, head_dim,
                                      planes + (int64_t)row * head_dim * 2, to->units + row,
                                      to->zero + row));
}

/* ---- scores ---------------------------------------------------------------------------------- */

KV_INLINE int kv_middle_code(kv_format format) { return format == KV_FORMAT_CHAN4 ? 8 : 2; }

/* What a sealed group's channels have at the middle code, then their steps. */
static void kv_load_channels(kv_format format, const kv_run *run, int32_t head_dim,
                             float *channels) {
    const uint16_t *lo = (const uint16_t *)run->metadata, *step = lo + head_dim;
    const kv_vec middle = kv_broadcast((float)kv_middle_code(format));
    for (int32_t d = 0; d < head_dim; d += KV_LANES) {
        const kv_vec x = kv_load_bf16(step + d);
        kv_store(channels + d, kv_fma(x, middle, kv_load_bf16(lo + d)));
        kv_store(channels + head_dim + d, x);
    }
}

KV_INLINE void kv_int8_score_group(const kv_split_task *task, const kv_encoded_queries *all,
                                   const kv_encoded_scratch *scratch, const kv_run *run,
                                   int32_t start, int32_t row, int num_rows, int halves,
                                   int32_t head_dim, kv_int8_ahead ahead) {
    float units[KV_INT8_ROWS], plus[KV_INT8_ROWS], copy[KV_INT8_ROWS * KV_RUN];
    int32_t zero[KV_INT8_ROWS];
    const float *scales = scratch->scales;
    kv_int8_queries q = {(const int8_t *)all->panels + (int64_t)row * 2 * head_dim,
                         all->units + row, all->zero + row, all->plus + row};
    if (kv_is_channel(task->k_format)) {
        kv_int8_pack_group(num_rows, all->panels + (int64_t)row * head_dim, all->plus + row,
                           scratch->channels, head_dim, kv_middle_code(task->k_format),
                           scratch->channels + 2 * head_dim, scratch->planes, units, zero, plus);
        q = (kv_int8_queries){scratch->planes, units, zero, plus};
        scales = NULL;
    }
    float *scores = task->scores + (int64_t)row * KV_SPLIT + start;
    if (run->count == halves * KV_LANES && run->first == 0) {
        kv_int8_score_lines(num_rows, halves, &q, scratch->lines, head_dim, scales, ahead, scores,
                            KV_SPLIT);
        return;
    }
    kv_int8_score_lines(num_rows, halves, &q, scratch->lines, head_dim, scales, ahead, copy,
                        KV_RUN);
    for (int r = 0; r < num_rows; r++)
        memcpy(scores + r * KV_SPLIT, copy + r * KV_RUN + run->first,
               (size_t)run->count * sizeof(float));
}

KV_INLINE void kv_int8_score_run_of(const kv_split_task *task, int32_t head_dim,
                                    const kv_encoded_queries *q, const kv_encoded_scratch *scratch,
                                    const kv_run *run, int32_t start, const kv_run *ahead) {
    const kv_int8_ahead second = kv_second_half(task->k_format, ahead), none = {NULL, 0};
    kv_unpack_keys(task->k_format, run, head_dim, scratch->copy, scratch->lines, ahead->rows);
    const int halves = run->first + run->count > KV_LANES ? 2 : 1;
    if (halves == 2)
        KV_ROW_GROUPS(KV_INT8_ROWS, task->num_rows,
                      kv_int8_score_group(task, q, scratch, run, start, row, rows, 2, head_dim,
                                          row == 0 ? second : none));
    else
        KV_ROW_GROUPS(KV_INT8_ROWS, task->num_rows,
                      kv_int8_score_group(task, q, scratch, run, start, row, rows, 1, head_dim,
                                          row == 0 ? second : none));
}

/* The commonest head_dim as a constant. */
static void kv_int8_score_run(const kv_split_task *task, const kv_encoded_queries *q,
                              const kv_encoded_scratch *scratch, const kv_run *run, int32_t start,
                              const kv_run *ahead) {
    if (kv_is_channel(task->k_format))
        kv_load_channels(task->k_format, run, task->head_dim, scratch->channels);
    else
        kv_run_scales(task->k_format, run, scratch->scales);
    if (task->head_dim == 128)
        kv_int8_score_run_of(task, 128, q, scratch, run, start, ahead);
    else
        kv_int8_score_run_of(task, task->head_dim, q, scratch, run, start, ahead);
}

/* ---- values ---------------------------------------------------------------------------------- */

/* Levels of tokens that the last four of a run lack become 0, as their weights are others'. */
static void kv_clear_quad(const kv_run *run, int32_t head_dim, int8_t *lines) {
    if (run->count % 4 == 0)
        return;
    int8_t *quad = lines + run->count / 4 * 4 * head_dim;
    for (int32_t d = 0; d < head_dim; d++)
        for (int t = run->count % 4; t < 4; t++)
            quad[d * 4 + t] = 0;
}

KV_INLINE void kv_int8_value_run_of(const kv_split_task *task, int32_t head_dim,
                                    const kv_encoded_scratch *scratch, const kv_run *run,
                                    int32_t start, const kv_run *ahead) {
    const kv_int8_ahead second = kv_second_half(task->v_format, ahead), none = {NULL, 0};
    int8_t *lines = (int8_t *)scratch->lines;
    kv_unpack_values(task->v_format, run, head_dim, scratch->copy, lines, ahead->rows);
    kv_clear_quad(run, head_dim, lines);
    KV_ROW_GROUPS(KV_INT8_ROWS, task->num_rows,
                  kv_int8_values(rows, scratch->weights + (int64_t)row * KV_INT8_WEIGHTS + start,
                                 lines, (run->count + 3) / 4, head_dim,
                                 task->out.o + (int64_t)row * task->o_width, task->o_width,
                                 row == 0 ? second : none));
}

/* The commonest head_dim as a constant, which spares a tenth of the time. */
static void kv_int8_value_run(const kv_split_task *task, const kv_encoded_scratch *scratch,
                              const kv_run *run, int32_t start, const kv_run *ahead) {
    if (task->head_dim_v == 128)
        kv_int8_value_run_of(task, 128, scratch, run, start, ahead);
    else
        kv_int8_value_run_of(task, task->head_dim_v, scratch, run, start, ahead);
}

/* Sums of whole numbers to floats. */
static void kv_int8_finish_values(const kv_split_task *task, const kv_encoded_scratch *scratch) {
    for (int32_t r = 0; r < task->num_rows; r++) {
        const kv_vec most = kv_broadcast(scratch->most[r]);
        float *o = task->out.o + (int64_t)r * task->o_width;
        for (int32_t d = 0; d < task->head_dim_v; d += KV_LANES) {
            const kv_vec share =
                kv_mul(kv_from_whole(kv_load_bytes(o + d)), kv_broadcast(1 / 65535.0f));
            kv_store(o + d, kv_mul(share, most));
        }
    }
}
