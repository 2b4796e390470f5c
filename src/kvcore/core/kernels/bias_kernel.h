/* Kernel text: the constant bias that encoded rows are stored without. */

KV_INLINE kv_vec kv_abs(kv_vec x) { return kv_max(x, kv_sub(kv_zero(), x)); }

KV_INLINE kv_vec kv_min(kv_vec a, kv_vec b) {
    return kv_sub(kv_zero(), kv_max(kv_sub(kv_zero(), a), kv_sub(kv_zero(), b)));
}

/* x less its bias, at most the largest finite number. */
KV_INLINE kv_vec kv_subtract_bias(kv_vec x, const float *bias) {
    const kv_vec top = kv_broadcast(FLT_MAX), bottom = kv_broadcast(-FLT_MAX);
    return kv_min(kv_max(kv_sub(x, kv_load(bias)), bottom), top);
}

/* x := row less bias, which may be NULL */
KV_INLINE void kv_center(const float *row, const float *bias, int32_t head_dim, float *x) {
    if (!bias) {
        memcpy(x, row, sizeof(float) * (size_t)head_dim);
        return;
    }
    for (int32_t i = 0; i < head_dim; i += KV_LANES)
        kv_store(x + i, kv_subtract_bias(kv_load(row + i), bias + i));
}

KV_INLINE void kv_add_bias(float *row, int32_t head_dim, const float *bias) {
    if (bias)
        for (int32_t i = 0; i < head_dim; i += KV_LANES)
            kv_store(row + i, kv_add(kv_load(row + i), kv_load(bias + i)));
}
