/* Kernel text: elements of the float formats, by vector and by row. */

KV_INLINE int kv_is_float(kv_format format) {
    return format == KV_FORMAT_FP32 || format == KV_FORMAT_FP16 || format == KV_FORMAT_BF16;
}

/* Lanes [0, n) of the elements from `at` on; `n` is KV_LANES or fewer. */
KV_INLINE kv_vec kv_load_elements(kv_format format, const char *row, int64_t at, int n) {
    const uint16_t *half = (const uint16_t *)row + at;
    const float *single = (const float *)row + at;
    if (format == KV_FORMAT_FP16)
        return n == KV_LANES ? kv_load_f16(half) : kv_load_f16_partial(half, n);
    if (format == KV_FORMAT_BF16)
        return n == KV_LANES ? kv_load_bf16(half) : kv_load_bf16_partial(half, n);
    return n == KV_LANES ? kv_load(single) : kv_load_partial(single, n);
}

KV_INLINE void kv_store_elements(kv_format format, char *row, int64_t at, kv_vec x, int n) {
    uint16_t *half = (uint16_t *)row + at;
    float *single = (float *)row + at;
    if (format == KV_FORMAT_FP16 && n == KV_LANES)
        kv_store_f16(half, x);
    else if (format == KV_FORMAT_FP16)
        kv_store_f16_partial(half, x, n);
    else if (format == KV_FORMAT_BF16 && n == KV_LANES)
        kv_store_bf16(half, x);
    else if (format == KV_FORMAT_BF16)
        kv_store_bf16_partial(half, x, n);
    else if (n == KV_LANES)
        kv_store(single, x);
    else
        kv_store_partial(single, x, n);
}

KV_INLINE void kv_convert_as(const char *from, kv_format from_format, char *to, kv_format to_format,
                             int64_t count) {
    int64_t i = 0;
    for (; i + KV_LANES <= count; i += KV_LANES) {
        const kv_vec x = kv_load_elements(from_format, from, i, KV_LANES);
        kv_store_elements(to_format, to, i, x, KV_LANES);
    }
    if (i < count) {
        const int n = (int)(count - i);
        kv_store_elements(to_format, to, i, kv_load_elements(from_format, from, i, n), n);
    }
}

KV_INLINE void kv_convert_from(const char *from, kv_format from_format, char *to,
                               kv_format to_format, int64_t count) {
    if (to_format == KV_FORMAT_FP16)
        kv_convert_as(from, from_format, to, KV_FORMAT_FP16, count);
    else if (to_format == KV_FORMAT_BF16)
        kv_convert_as(from, from_format, to, KV_FORMAT_BF16, count);
    else
        kv_convert_as(from, from_format, to, KV_FORMAT_FP32, count);
}

static void kv_convert(const void *from, kv_format from_format, void *to, kv_format to_format,
                       int64_t count) {
    /* Equal formats are copied, so that a NaN keeps its bits. */
    if (from_format == to_format)
        memcpy(to, from, (size_t)count * (from_format == KV_FORMAT_FP32 ? 4 : 2));
    else if (from_format == KV_FORMAT_FP16)
        kv_convert_from(from, KV_FORMAT_FP16, to, to_format, count);
    else if (from_format == KV_FORMAT_BF16)
        kv_convert_from(from, KV_FORMAT_BF16, to, to_format, count);
    else
        kv_convert_from(from, KV_FORMAT_FP32, to, to_format, count);
}
