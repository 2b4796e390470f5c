/* Partial loads and stores by way of a buffer, for lanes that have no masks. Included by them. */

KV_INLINE kv_vec kv_load_partial(const float *p, int n) {
    float buffer[KV_LANES] = {0};
    memcpy(buffer, p, (size_t)n * sizeof(float));
    return kv_load(buffer);
}

KV_INLINE void kv_store_partial(float *p, kv_vec x, int n) {
    float buffer[KV_LANES];
    kv_store(buffer, x);
    memcpy(p, buffer, (size_t)n * sizeof(float));
}

KV_INLINE kv_vec kv_load_f16_partial(const uint16_t *p, int n) {
    uint16_t buffer[KV_LANES] = {0};
    memcpy(buffer, p, (size_t)n * sizeof(uint16_t));
    return kv_load_f16(buffer);
}

KV_INLINE kv_vec kv_load_bf16_partial(const uint16_t *p, int n) {
    uint16_t buffer[KV_LANES] = {0};
    memcpy(buffer, p, (size_t)n * sizeof(uint16_t));
    return kv_load_bf16(buffer);
}

KV_INLINE void kv_store_f16_partial(uint16_t *p, kv_vec x, int n) {
    uint16_t buffer[KV_LANES];
    kv_store_f16(buffer, x);
    memcpy(p, buffer, (size_t)n * sizeof(uint16_t));
}

KV_INLINE void kv_store_bf16_partial(uint16_t *p, kv_vec x, int n) {
    uint16_t buffer[KV_LANES];
    kv_store_bf16(buffer, x);
    memcpy(p, buffer, (size_t)n * sizeof(uint16_t));
}
