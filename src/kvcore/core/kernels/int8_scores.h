/* Kernel text: scores by integer dot products. docs/numerics.md, "Integer dot products". */

enum { KV_INT8_ROWS = 4 /* rows that meet a run at once */ };

/* Queries as numbers of 16 bits in two planes of signed bytes, the low one first:
 * [head_dim / 16][rows][2][16]. */
typedef struct kv_int8_queries {
    const int8_t *planes;
    const float *units;  /* [rows] what 1 stands for */
    const int32_t *zero; /* [rows] the score of the level 0, as levels are stored */
    const float *plus;   /* [rows] what is added to every score */
} kv_int8_queries;

/* What is asked for meanwhile: up to four lines for every 16 dims. */
typedef struct kv_int8_ahead {
    const char *at;
    int lines;
} kv_int8_ahead;

/* Sums over 16 dims of `rows` rows and of 16 tokens a half. */
KV_INLINE void kv_int8_key_chunk(int num_rows, int halves, int sets, const int8_t *planes,
                                 const uint8_t *lines, kv_int8_ahead ahead, kv_bytes *sum) {
    KV_UNROLL
    for (int c = 0; c < 4; c++) {
        if (c < ahead.lines)
            kv_prefetch(ahead.at + c * KV_LINE_BYTES);
        kv_bytes *to = sum + c % sets * num_rows * halves * 2;
        kv_bytes x[2];
        KV_UNROLL
        for (int h = 0; h < halves; h++)
            x[h] = kv_load_bytes(lines + (c * 2 + h) * KV_LINE_BYTES);
        KV_UNROLL
        for (int r = 0; r < num_rows; r++)
            KV_UNROLL
        for (int plane = 0; plane < 2; plane++) {
            const kv_bytes y = kv_broadcast_four(planes + (r * 2 + plane) * KV_UNIT_DIMS + c * 4);
            KV_UNROLL
            for (int h = 0; h < halves; h++)
                to[(r * halves + h) * 2 + plane] =
                    kv_dot_int8(to[(r * halves + h) * 2 + plane], x[h], y);
        }
    }
}

/* scores[r * stride + t] of 16 tokens a half. `scales` are the tokens', or NULL for ones. */
KV_INLINE void kv_int8_score_lines(int num_rows, int halves, const kv_int8_queries *q,
                                   const uint8_t *lines, int32_t head_dim, const float *scales,
                                   kv_int8_ahead ahead, float *scores, int64_t stride) {
    const int all = num_rows * halves * 2, sets = all <= 4 ? 4 : all <= 8 ? 2 : 1;
    kv_bytes sum[16];
    KV_UNROLL
    for (int i = 0; i < all * sets; i++)
        sum[i] = kv_zero_bytes();
    const int8_t *planes = q->planes;
    for (int32_t d = 0; d < head_dim; d += KV_UNIT_DIMS) {
        kv_int8_key_chunk(num_rows, halves, sets, planes, lines, ahead, sum);
        ahead.at += ahead.lines * KV_LINE_BYTES;
        planes += num_rows * 2 * KV_UNIT_DIMS;
        lines += 4 * 2 * KV_LINE_BYTES;
    }
    KV_UNROLL
    for (int i = all; i < all * sets; i++)
        sum[i % all] = kv_add_whole(sum[i % all], sum[i]);
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        KV_UNROLL
    for (int h = 0; h < halves; h++) {
        const kv_bytes *planes_of = sum + (r * halves + h) * 2;
        const kv_bytes whole = kv_add_whole(kv_join_planes(planes_of[0], planes_of[1]),
                                            kv_broadcast_whole(-q->zero[r]));
        kv_vec unit = kv_broadcast(q->units[r]);
        if (scales)
            unit = kv_mul(unit, kv_load(scales + h * KV_LANES));
        kv_store(scores + r * stride + h * KV_LANES,
                 kv_fma(kv_from_whole(whole), unit, kv_broadcast(q->plus[r])));
    }
}

/* ---- queries --------------------------------------------------------------------------------- */

/* The largest number of 16 bits with which a sum over head_dim levels fits 32. */
KV_INLINE float kv_int8_full(int32_t head_dim) {
    const int32_t most = INT32_MAX / 128 / head_dim;
    return (float)(most < 32512 ? most : 32512);
}

/* x * factor * lift is at most `full` for x up to `most`. The lift keeps the factor finite. */
typedef struct kv_whole_scale {
    kv_vec factor, lift;
} kv_whole_scale;

KV_INLINE kv_whole_scale kv_whole_scale_of(float most, float full) {
    const float lift = most < 0x1p-60f ? 0x1p60f : 1.0f;
    return (kv_whole_scale){kv_broadcast(most > 0.0f ? full / (most * lift) : 0.0f),
                            kv_broadcast(lift)};
}

KV_INLINE kv_bytes kv_scale_to_whole(kv_vec x, kv_whole_scale scale) {
    return kv_to_whole(kv_mul(kv_mul(x, scale.lift), scale.factor));
}

/* One row: its numbers into `planes`, chunk by chunk `step` bytes on. Returns their sum. */
KV_INLINE int32_t kv_int8_pack_row(const float *q, int32_t head_dim, float full, int8_t *planes,
                                   int64_t step, float *unit) {
    kv_vec top = kv_zero();
    for (int32_t d = 0; d < head_dim; d += KV_LANES) {
        const kv_vec x = kv_load(q + d);
        top = kv_max(top, kv_max(x, kv_sub(kv_zero(), x)));
    }
    const float most = kv_hmax(top);
    const kv_whole_scale scale = kv_whole_scale_of(most, full);
    kv_bytes sum = kv_zero_bytes();
    for (int32_t d = 0; d < head_dim; d += KV_LANES, planes += step) {
        const kv_bytes x = kv_scale_to_whole(kv_load(q + d), scale);
        sum = kv_add_whole(sum, x);
        kv_store_signed_planes(planes, x);
    }
    *unit = most / full;
    return kv_sum_whole(sum);
}

/* Queries for a sealed group: every element times its channel's step. Codes count from `middle`, so
 * that roundings weigh less; what the channels' values there come to is added to what is `given`.
 * `channels` has these values, then the steps. */
KV_INLINE void kv_int8_pack_group(int num_rows, const float *q, const float *given,
                                  const float *channels, int32_t head_dim, int middle,
                                  int8_t *planes, float *units, int32_t *zero, float *plus) {
    const float full = kv_int8_full(head_dim);
    float product[1024];
    for (int r = 0; r < num_rows; r++, q += head_dim) {
        kv_vec sum = kv_zero();
        for (int32_t d = 0; d < head_dim; d += KV_LANES) {
            const kv_vec x = kv_load(q + d);
            sum = kv_fma(x, kv_load(channels + d), sum);
            kv_store(product + d, kv_mul(x, kv_load(channels + head_dim + d)));
        }
        zero[r] = middle * kv_int8_pack_row(product, head_dim, full, planes + r * 2 * KV_UNIT_DIMS,
                                            num_rows * 2 * KV_UNIT_DIMS, units + r);
        plus[r] = given[r] + kv_hsum(sum);
    }
}
