/* Kernel text: whether floats are all finite. The loops run to their end, in vectors. */

KV_INLINE int kv_all_below(const uint16_t *values, int64_t count, uint16_t infinity) {
    int any = 0;
    for (int64_t i = 0; i < count; i++)
        any |= (values[i] & 0x7fff) >= infinity;
    return !any;
}

static int kv_is_finite(const void *values, kv_format format, int64_t count) {
    const uint32_t *single = values;
    int any = 0;
    if (format == KV_FORMAT_FP16)
        return kv_all_below(values, count, 0x7c00);
    if (format == KV_FORMAT_BF16)
        return kv_all_below(values, count, 0x7f80);
    for (int64_t i = 0; i < count; i++)
        any |= (single[i] & 0x7fffffff) >= 0x7f800000;
    return !any;
}
