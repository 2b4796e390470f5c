/* Kernel text: the signed Walsh-Hadamard transform of rows, docs/formats.md. */

/* The size of the blocks in which rows of head_dim elements are rotated. */
KV_INLINE int32_t kv_rotation_size(int32_t head_dim) { return head_dim & -head_dim; }

/* Lanes i and i ^ h become their sum and their difference, lower lane less upper. */
KV_INLINE kv_vec kv_butterfly(kv_vec x, int h) {
    static const float signs[4][16] = {{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                                       {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                                       {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                                       {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
    const float *sign = signs[h == 1 ? 0 : h == 2 ? 1 : h == 4 ? 2 : 3];
    return kv_add(kv_exchange(x, h), kv_mul(x, kv_load(sign)));
}

/* The stages within a vector. */
KV_INLINE kv_vec kv_hadamard_lanes(kv_vec x) {
    KV_UNROLL
    for (int h = 1; h < KV_LANES; h *= 2)
        x = kv_butterfly(x, h);
    return x;
}

/* The stages of stride h and 2h, on vectors: one pass over memory for two stages. */
KV_INLINE void kv_hadamard_two(float *x, int32_t h) {
    for (int32_t i = 0; i < h; i += KV_LANES) {
        const kv_vec a = kv_load(x + i), b = kv_load(x + h + i);
        const kv_vec c = kv_load(x + 2 * h + i), d = kv_load(x + 3 * h + i);
        const kv_vec ab = kv_add(a, b), a_b = kv_sub(a, b), cd = kv_add(c, d), c_d = kv_sub(c, d);
        kv_store(x + i, kv_add(ab, cd));
        kv_store(x + h + i, kv_add(a_b, c_d));
        kv_store(x + 2 * h + i, kv_sub(ab, cd));
        kv_store(x + 3 * h + i, kv_sub(a_b, c_d));
    }
}

KV_INLINE void kv_hadamard_one(float *x, int32_t h) {
    for (int32_t i = 0; i < h; i += KV_LANES) {
        const kv_vec a = kv_load(x + i), b = kv_load(x + h + i);
        kv_store(x + i, kv_add(a, b));
        kv_store(x + h + i, kv_sub(a, b));
    }
}

/* Strides KV_LANES and up, in blocks of `size` elements. */
KV_INLINE void kv_hadamard_vectors(float *x, int32_t head_dim, int32_t size) {
    int32_t h = KV_LANES;
    for (; 4 * h <= size; h *= 4)
        for (int32_t at = 0; at < head_dim; at += 4 * h)
            kv_hadamard_two(x + at, h);
    if (h < size)
        for (int32_t at = 0; at < head_dim; at += 2 * h)
            kv_hadamard_one(x + at, h);
}

/* x := H(sign * x * factor), unnormalised. factor is a power of two. */
KV_INLINE void kv_rotate(float *x, int32_t head_dim, const float *signs, float factor) {
    const kv_vec by = kv_broadcast(factor);
    for (int32_t i = 0; i < head_dim; i += KV_LANES) {
        const kv_vec y = kv_mul(kv_mul(kv_load(x + i), by), kv_load(signs + i));
        kv_store(x + i, kv_hadamard_lanes(y));
    }
    kv_hadamard_vectors(x, head_dim, kv_rotation_size(head_dim));
}

/* x := H(x) * factor * sign: what undoes it. */
KV_INLINE void kv_rotate_back(float *x, int32_t head_dim, const float *signs, float factor) {
    const kv_vec by = kv_broadcast(factor);
    for (int32_t i = 0; i < head_dim; i += KV_LANES)
        kv_store(x + i, kv_hadamard_lanes(kv_load(x + i)));
    kv_hadamard_vectors(x, head_dim, kv_rotation_size(head_dim));
    for (int32_t i = 0; i < head_dim; i += KV_LANES)
        kv_store(x + i, kv_mul(kv_mul(kv_load(x + i), by), kv_load(signs + i)));
}
