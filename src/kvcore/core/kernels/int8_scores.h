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

/* num_rows rows [head_dim], of which most[r] is the largest magnitude: their numbers into `planes`,
 * what 1 stands for, and the score that `middle` in place of every level has. Rows take turns, as
 * what a row waits for is then hidden by the others. */
KV_INLINE void kv_int8_pack_rows(int num_rows, const float *q, int32_t head_dim, const float *most,
                                 int middle, int8_t *planes, float *units, int32_t *zero) {
    const float full = kv_int8_full(head_dim);
    kv_whole_scale scale[KV_INT8_ROWS];
    kv_bytes sum[KV_INT8_ROWS];
    KV_UNROLL
    for (int r = 0; r < num_rows; r++) {
        scale[r] = kv_whole_scale_of(most[r], full);
        units[r] = most[r] / full;
        sum[r] = kv_zero_bytes();
    }
    for (int32_t d = 0; d < head_dim; d += KV_LANES)
        KV_UNROLL
    for (int r = 0; r < num_rows; r++, planes += 2 * KV_UNIT_DIMS) {
        const kv_bytes x = kv_scale_to_whole(kv_load(q + (int64_t)r * head_dim + d), scale[r]);
        sum[r] = kv_add_whole(sum[r], x);
        kv_store_signed_planes(planes, x);
    }
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        zero[r] = middle * kv_sum_whole(sum[r]);
}

KV_INLINE kv_vec kv_magnitude(kv_vec x) { return kv_max(x, kv_sub(kv_zero(), x)); }

/* Queries for levels, which are stored plus 128. */
KV_INLINE void kv_int8_pack_levels(int num_rows, const float *q, int32_t head_dim, int8_t *planes,
                                   float *units, int32_t *zero) {
    float most[KV_INT8_ROWS];
    for (int r = 0; r < num_rows; r++) {
        kv_vec top = kv_zero();
        for (int32_t d = 0; d < head_dim; d += KV_LANES)
            top = kv_max(top, kv_magnitude(kv_load(q + (int64_t)r * head_dim + d)));
        most[r] = kv_hmax(top);
    }
    kv_int8_pack_rows(num_rows, q, head_dim, most, 128, planes, units, zero);
}

/* Queries for a sealed group: every element times its channel's step, `products` [num_rows,
 * head_dim]. Codes count from `middle`, so that roundings weigh less; what the channels' values there
 * come to is added to what is `given`. `channels` has these values, then the steps. */
KV_INLINE void kv_int8_pack_group(int num_rows, const float *q, const float *given,
                                  const float *channels, int32_t head_dim, int middle,
                                  float *products, int8_t *planes, float *units, int32_t *zero,
                                  float *plus) {
    float most[KV_INT8_ROWS];
    kv_vec top[KV_INT8_ROWS], sum[KV_INT8_ROWS];
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        top[r] = sum[r] = kv_zero();
    for (int32_t d = 0; d < head_dim; d += KV_LANES) {
        const kv_vec value = kv_load(channels + d), step = kv_load(channels + head_dim + d);
        KV_UNROLL
        for (int r = 0; r < num_rows; r++) {
            const kv_vec x = kv_load(q + (int64_t)r * head_dim + d), product = kv_mul(x, step);
            sum[r] = kv_fma(x, value, sum[r]);
            top[r] = kv_max(top[r], kv_magnitude(product));
            kv_store(products + (int64_t)r * head_dim + d, product);
        }
    }
    KV_UNROLL
    for (int r = 0; r < num_rows; r++) {
        most[r] = kv_hmax(top[r]);
        plus[r] = given[r] + kv_hsum(sum[r]);
    }
    kv_int8_pack_rows(num_rows, products, head_dim, most, middle, planes, units, zero);
}
