/* Kernel text: exp, the softmax of one split, and the algebra that joins partial softmaxes. */

#include <math.h>

/* e^x = (1 + p) * 2^n for -87.3 <= x <= 0; docs/numerics.md states the method and its error. */
typedef struct kv_exp_parts {
    kv_vec p, z; /* z = n + KV_ROUND */
} kv_exp_parts;

KV_INLINE kv_exp_parts kv_exp_split(kv_vec x) {
    const kv_vec z = kv_fma(x, kv_broadcast(1.44269504f), kv_broadcast(KV_ROUND));
    const kv_vec n = kv_sub(z, kv_broadcast(KV_ROUND));
    /* ln 2 = 0.693359375 - 2.12194440e-4; the first part has so few bits that n times it is exact */
    kv_vec r = kv_fma(n, kv_broadcast(-0.693359375f), x);
    r = kv_fma(n, kv_broadcast(2.12194440e-4f), r);
    /* e^r = 1 + r + r^2 q(r); q fitted for the least largest relative error on |r| <= ln(2) / 2 */
    kv_vec q = kv_broadcast(0x1.6a242cp-10f);
    q = kv_fma(q, r, kv_broadcast(0x1.1239e4p-7f));
    q = kv_fma(q, r, kv_broadcast(0x1.5558f2p-5f));
    q = kv_fma(q, r, kv_broadcast(0x1.555492p-3f));
    q = kv_fma(q, r, kv_broadcast(0x1.fffffcp-2f));
    return (kv_exp_parts){kv_fma(kv_mul(r, r), q, r), z};
}

/* e^x for x <= 0. */
KV_INLINE kv_vec kv_exp(kv_vec x) {
    const kv_exp_parts e = kv_exp_split(x);
    const kv_vec p = kv_add(e.p, kv_broadcast(1.0f));
    /* A product, not an addition to the exponent, so that a NaN stays one. */
    return kv_keep_above(x, -87.3f, kv_mul(p, kv_pow2(e.z)));
}

/* tanh(x) = sign(x) * -t / (t + 2), t = e^(-2 abs(x)) - 1, with t from the parts of kv_exp before
 * they are added to 1, so that nothing cancels near 0. */
KV_INLINE kv_vec kv_tanh(kv_vec x) {
    const kv_vec magnitude = kv_max(kv_sub(kv_zero(), x), x); /* a NaN in x stays one */
    /* From 20 on the result is 1, and this bound keeps 2^n in range. */
    const kv_vec y = kv_max(kv_broadcast(-40.0f), kv_mul(magnitude, kv_broadcast(-2.0f)));
    const kv_exp_parts e = kv_exp_split(y);
    const kv_vec scale = kv_pow2(e.z);
    const kv_vec t = kv_fma(e.p, scale, kv_sub(scale, kv_broadcast(1.0f)));
    const kv_vec sign = kv_sub(kv_keep_above(x, 0.0f, kv_broadcast(2.0f)), kv_broadcast(1.0f));
    return kv_mul(sign, kv_div(kv_sub(kv_zero(), t), kv_add(t, kv_broadcast(2.0f))));
}

/* Turns the first `count` of KV_SPLIT scores into exp(s - m); sets *m and *l. */
KV_INLINE void kv_softmax_row(float *scores, int32_t count, float *m, float *l) {
    for (int32_t j = count; j % KV_LANES != 0; j++)
        scores[j] = -INFINITY;
    kv_vec top = kv_load(scores);
    for (int32_t j = KV_LANES; j < count; j += KV_LANES)
        top = kv_max(top, kv_load(scores + j));
    *m = kv_hmax(top);

    const kv_vec shift = kv_broadcast(*m);
    kv_vec sum = kv_zero();
    for (int32_t j = 0; j < count; j += KV_LANES) {
        const kv_vec p = kv_exp(kv_sub(kv_load(scores + j), shift));
        sum = kv_add(sum, p);
        kv_store(scores + j, p);
    }
    *l = kv_hsum(sum);
}

KV_INLINE void kv_merge_row(float *m, float *l, float *o, float from_m, float from_l,
                            const float *from_o, int32_t width) {
    const float top = *m > from_m ? *m : from_m;
    const kv_vec a = kv_exp(kv_broadcast(*m - top)), b = kv_exp(kv_broadcast(from_m - top));
    *m = top;
    *l = kv_first(kv_fma(kv_broadcast(from_l), b, kv_mul(kv_broadcast(*l), a)));
    for (int32_t d = 0; d < width; d += KV_LANES)
        kv_store(o + d, kv_fma(kv_load(from_o + d), b, kv_mul(kv_load(o + d), a)));
}

static void kv_merge_partial(const kv_partial *into, const kv_partial *from, int32_t num_rows,
                             int32_t width) {
    for (int32_t r = 0; r < num_rows; r++) {
        float *o = into->o + (int64_t)r * width;
        const float *from_o = from->o + (int64_t)r * width;
        if (from->l[r] == 0.0f)
            continue;
        if (into->l[r] == 0.0f) {
            into->m[r] = from->m[r];
            into->l[r] = from->l[r];
            memcpy(o, from_o, (size_t)width * sizeof(float));
        } else {
            kv_merge_row(into->m + r, into->l + r, o, from->m[r], from->l[r], from_o, width);
        }
    }
}

static void kv_normalize(const float *o, float l, float *out, int32_t width) {
    const kv_vec divisor = kv_broadcast(l);
    for (int32_t d = 0; d < width; d += KV_LANES)
        kv_store(out + d, kv_div(kv_load(o + d), divisor));
}

/* The largest lse of a row; NaN if one is NaN. */
KV_INLINE float kv_top_lse(const float *lses, int32_t num_partials, int64_t stride) {
    float top = -INFINITY;
    for (int32_t p = 0; p < num_partials; p++) {
        const float lse = lses[p * stride];
        if (lse > top || isnan(lse))
            top = lse;
    }
    return top;
}

/* out = out + w * from, over [0, n) lanes of one row at `d` */
KV_INLINE void kv_add_weighted(const float *from, kv_vec w, float *out, int32_t d, int n) {
    const kv_vec sum = kv_load_elements(KV_FORMAT_FP32, (const char *)out, d, n);
    const kv_vec x = kv_load_elements(KV_FORMAT_FP32, (const char *)from, d, n);
    kv_store_elements(KV_FORMAT_FP32, (char *)out, d, kv_fma(x, w, sum), n);
}

KV_INLINE float kv_merge_states_row(const float *outs, const float *lses, int32_t num_partials,
                                    int64_t num_rows, int32_t head_dim, float *out) {
    const float top = kv_top_lse(lses, num_partials, num_rows);
    const int32_t whole = head_dim - head_dim % KV_LANES;
    float sum = 0.0f;
    memset(out, 0, (size_t)head_dim * sizeof(float));
    if (top == -INFINITY)
        return top;
    for (int32_t p = 0; p < num_partials; p++) {
        const float *from = outs + p * num_rows * head_dim;
        if (lses[p * num_rows] == -INFINITY)
            continue;
        const kv_vec w = kv_exp(kv_broadcast(lses[p * num_rows] - top));
        sum += kv_first(w);
        for (int32_t d = 0; d < whole; d += KV_LANES)
            kv_add_weighted(from, w, out, d, KV_LANES);
        if (whole < head_dim)
            kv_add_weighted(from, w, out, whole, head_dim - whole);
    }
    for (int32_t d = 0; d < head_dim; d++)
        out[d] /= sum;
    return (float)((double)top + log((double)sum));
}

static void kv_merge_states_rows(const float *outs, const float *lses, int32_t num_partials,
                                 int64_t num_rows, int32_t head_dim, int64_t begin, int64_t end,
                                 float *out, float *lse) {
    for (int64_t r = begin; r < end; r++) {
        const float merged = kv_merge_states_row(outs + r * head_dim, lses + r, num_partials,
                                                 num_rows, head_dim, out + r * head_dim);
        if (lse)
            lse[r] = merged;
    }
}
