/* Kernel text: values by integer dot products. docs/numerics.md, "Integer dot products". */

/* Weights as numbers of 16 bits in two planes of unsigned bytes, the low one first: [2][KV_SPLIT] a
 * row. */
enum { KV_INT8_WEIGHTS = 2 * KV_SPLIT };

/* num_vectors vectors of 16 dims of num_rows rows over quads of tokens: o += w v, whole numbers. */
KV_INLINE void kv_int8_value_tile(int num_rows, int num_vectors, const uint8_t *weights,
                                  const int8_t *lines, int64_t quad_bytes, int num_quads, float *o,
                                  int32_t o_width, kv_int8_ahead ahead) {
    const int all = num_rows * num_vectors;
    kv_bytes high[8], low[8];
    KV_UNROLL
    for (int i = 0; i < all; i++)
        high[i] = low[i] = kv_zero_bytes();
    for (int q = 0; q < num_quads; q++, lines += quad_bytes, weights += 4) {
        kv_bytes y[8];
        KV_UNROLL
        for (int i = 0; i < num_vectors; i++)
            y[i] = kv_load_bytes(lines + i * KV_LINE_BYTES);
        for (int i = 0; i < num_vectors * ahead.lines; i += 8, ahead.at += KV_LINE_BYTES)
            kv_prefetch(ahead.at);
        KV_UNROLL
        for (int r = 0; r < num_rows; r++) {
            const kv_bytes l = kv_broadcast_four(weights + r * KV_INT8_WEIGHTS);
            const kv_bytes h = kv_broadcast_four(weights + r * KV_INT8_WEIGHTS + KV_SPLIT);
            KV_UNROLL
            for (int i = 0; i < num_vectors; i++) {
                high[r * num_vectors + i] = kv_dot_int8(high[r * num_vectors + i], h, y[i]);
                low[r * num_vectors + i] = kv_dot_int8(low[r * num_vectors + i], l, y[i]);
            }
        }
    }
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        KV_UNROLL
    for (int i = 0; i < num_vectors; i++) {
        float *to = o + r * o_width + i * KV_LANES;
        const kv_bytes more = kv_join_planes(low[r * num_vectors + i], high[r * num_vectors + i]);
        kv_store_bytes(to, kv_add_whole(kv_load_bytes(to), more));
    }
}

KV_INLINE void kv_int8_values(int num_rows, const uint8_t *weights, const int8_t *lines,
                              int num_quads, int32_t head_dim, float *o, int32_t o_width,
                              kv_int8_ahead ahead) {
    const int64_t quad_bytes = head_dim / KV_UNIT_DIMS * KV_LINE_BYTES;
    int32_t d = 0;
#define KV_STRIPS(num_vectors)                                                                    \
    if (num_rows * (num_vectors) <= 8)                                                            \
        for (; d + (num_vectors) * KV_UNIT_DIMS <= head_dim; d += (num_vectors) * KV_UNIT_DIMS) { \
            kv_int8_value_tile(num_rows, num_vectors, weights,                                    \
                               lines + d / KV_UNIT_DIMS * KV_LINE_BYTES, quad_bytes, num_quads,   \
                               o + d, o_width, ahead);                                            \
            ahead.at += (num_vectors) * ahead.lines * KV_LINE_BYTES;                              \
        }
    KV_STRIPS(8)
    KV_STRIPS(4)
    KV_STRIPS(2)
    KV_STRIPS(1)
#undef KV_STRIPS
}

/* ---- weights --------------------------------------------------------------------------------- */

/* A row's weights of a split, of which `most` is the largest. */
KV_INLINE void kv_int8_pack_weights(const float *w, float most, uint8_t *planes) {
    const kv_whole_scale scale = kv_whole_scale_of(most, 65535.0f);
    for (int32_t j = 0; j < KV_SPLIT; j += KV_LANES)
        kv_store_unsigned_planes(planes + j, planes + KV_SPLIT + j,
                                 kv_scale_to_whole(kv_load(w + j), scale));
}
