/* Kernel text: rows to codes and metadata, byte for byte as docs/formats.md says. Nothing here is
 * fused, so that every ISA writes the same. */

KV_INLINE float kv_absmax(const float *x, int32_t head_dim) {
    kv_vec max = kv_zero();
    for (int32_t i = 0; i < head_dim; i += KV_LANES)
        max = kv_max(max, kv_abs(kv_load(x + i)));
    return kv_hmax(max) + 0.0f; /* no -0, whose bits would be stored */
}

KV_INLINE void kv_scale_row(float *x, int32_t head_dim, float factor) {
    for (int32_t i = 0; i < head_dim; i += KV_LANES)
        kv_store(x + i, kv_mul(kv_load(x + i), kv_broadcast(factor)));
}

/* Sixteen sums, lane l that of the elements l, l + 16, ... in order. */
typedef struct kv_sums {
    kv_vec v[16 / KV_LANES];
} kv_sums;

/* Their sum by halves: lane l takes lane l + 8, then l + 4, l + 2 and l + 1. */
KV_INLINE float kv_sum_lanes(kv_sums sums) {
    KV_UNROLL
    for (int n = 8 / KV_LANES; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            sums.v[i] = kv_add(sums.v[i], sums.v[i + n]);
    return kv_hsum(sums.v[0]);
}

/* ---- uniform levels: int8, rot8, rot6, int8_static --------------------------------------------- */

/* codes := round(x * inverse) + zero */
KV_INLINE void kv_round_codes(const float *x, int32_t head_dim, float inverse, int zero,
                              uint8_t *codes) {
    const kv_vec by = kv_broadcast(inverse), from = kv_broadcast(KV_ROUND + (float)zero);
    for (int32_t i = 0; i < head_dim; i += KV_LANES)
        kv_store_u8(codes + i, kv_add(kv_mul(kv_load(x + i), by), from));
}

KV_INLINE void kv_encode_rot6(const float *x, int32_t head_dim, float inverse, uint8_t *codes) {
    for (int32_t i = 0; i < head_dim; i++) {
        const float u = x[i] * inverse + 32;
        codes[i] = (uint8_t)(int32_t)(u < 63 ? u : 63);
    }
}

KV_INLINE void kv_encode_static(float *x, int32_t head_dim, const float *scales, uint8_t *codes) {
    const kv_vec top = kv_broadcast(127), bottom = kv_broadcast(-127);
    for (int32_t i = 0; i < head_dim; i += KV_LANES) {
        const kv_vec u = kv_div(kv_load(x + i), kv_load(scales + i));
        kv_store(x + i, kv_min(kv_max(u, bottom), top));
    }
    kv_round_codes(x, head_dim, 1, 128, codes);
}

/* ---- fp8_e4m3 ---------------------------------------------------------------------------------- */

/* To nearest, ties to even; abs(u) is less than 464, from where on nothing is near. */
KV_INLINE uint8_t kv_f32_to_e4m3(float u) {
    const uint32_t bits = kv_to_bits(u), magnitude = bits & 0x7fffffff;
    /* Below 2^-6 lie the multiples of 2^-9: what adding 2^14 rounds to. */
    const uint32_t small = kv_to_bits(kv_from_bits(magnitude) + 16384.0f) & 0xff;
    const uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    return (uint8_t)((bits >> 24 & 0x80) | (magnitude < 0x3c800000 ? small : normal));
}

KV_INLINE void kv_encode_e4m3(const float *x, int32_t head_dim, float inverse, uint8_t *codes) {
    for (int32_t i = 0; i < head_dim; i++)
        codes[i] = kv_f32_to_e4m3(x[i] * inverse);
}

/* ---- int4 -------------------------------------------------------------------------------------- */

/* The least and the most of 32 elements. */
KV_INLINE void kv_find_bounds(const float *x, float *least, float *most) {
    kv_vec min = kv_load(x), max = min;
    for (int i = KV_LANES; i < 32; i += KV_LANES) {
        min = kv_min(min, kv_load(x + i));
        max = kv_max(max, kv_load(x + i));
    }
    *least = -kv_hmax(kv_sub(kv_zero(), min));
    *most = kv_hmax(max);
}

static void kv_encode_int4(const float *x, int32_t head_dim, uint8_t *out, char *metadata) {
    uint8_t codes[KV_MAX_HEAD_DIM];
    for (int32_t at = 0; at < head_dim; at += 32) {
        kv_range range;
        kv_find_bounds(x + at, &range.least, &range.most);
        kv_encode_range(&range, 15, 0);
        const kv_vec down = kv_broadcast(range.down), from = kv_broadcast(range.from);
        const kv_vec inverse = kv_broadcast(range.inverse), round = kv_broadcast(KV_ROUND);
        for (int32_t i = at; i < at + 32; i += KV_LANES) {
            const kv_vec u = kv_sub(kv_mul(kv_load(x + i), down), from);
            kv_store_u8(codes + i, kv_add(kv_mul(u, inverse), round));
        }
        kv_store_metadata(metadata, at / 32, range.lo);
        kv_store_metadata(metadata, (head_dim + at) / 32, range.step);
    }
    kv_pack(codes, head_dim, 4, out);
}

/* ---- tables of levels: rot4, rot3, rot2 -------------------------------------------------------- */

/* x squared, summed */
KV_INLINE float kv_sum_squares(const float *x, int32_t head_dim) {
    kv_sums sums = {0};
    for (int32_t i = 0; i < head_dim; i += 16)
        for (int j = 0; j < 16 / KV_LANES; j++) {
            const kv_vec y = kv_load(x + i + j * KV_LANES);
            sums.v[j] = kv_add(sums.v[j], kv_mul(y, y));
        }
    return kv_sum_lanes(sums);
}

/* The level nearest to abs(u), and its number. */
KV_INLINE kv_vec kv_nearest_level(kv_vec u, const int8_t *levels, int num_levels, kv_vec *number) {
    const kv_vec size = kv_abs(u);
    kv_vec level = kv_broadcast(levels[0]);
    *number = kv_zero();
    KV_UNROLL
    for (int k = 1; k < num_levels; k++) {
        const float bound = (float)(levels[k - 1] + levels[k]) / 2;
        const float more = (float)(levels[k] - levels[k - 1]);
        level = kv_add(level, kv_keep_above(size, bound, kv_broadcast(more)));
        *number = kv_add(*number, kv_keep_above(size, bound, kv_broadcast(1)));
    }
    return level;
}

/* Leaves codes in y; returns the scale by least squares. */
KV_INLINE float kv_choose_levels(float *y, int32_t head_dim, const int8_t *levels, int num_levels,
                                 float inverse) {
    const kv_vec middle = kv_broadcast((float)num_levels - 0.5f);
    kv_sums products = {0}, squares = {0};
    for (int32_t i = 0; i < head_dim; i += 16)
        for (int j = 0; j < 16 / KV_LANES; j++) {
            float *at = y + i + j * KV_LANES;
            const kv_vec x = kv_load(at), u = kv_mul(x, kv_broadcast(inverse));
            kv_vec number;
            const kv_vec level = kv_nearest_level(u, levels, num_levels, &number);
            products.v[j] = kv_add(products.v[j], kv_mul(kv_abs(x), level));
            squares.v[j] = kv_add(squares.v[j], kv_mul(level, level));
            const kv_vec sign = kv_sub(kv_keep_above(u, 0, kv_broadcast(2)), kv_broadcast(1));
            const kv_vec half = kv_add(number, kv_broadcast(0.5f));
            kv_store(at, kv_add(middle, kv_mul(sign, half)));
        }
    return kv_sum_lanes(products) / kv_sum_lanes(squares);
}

KV_INLINE void kv_encode_levels(float *y, int32_t head_dim, const int8_t *levels, int num_levels,
                                float unit, kv_power power, uint8_t *codes, char *metadata) {
    const float rms = sqrtf(kv_sum_squares(y, head_dim) / (float)head_dim);
    const float inverse = rms > 0 ? unit / rms : 0;
    const float scale = kv_choose_levels(y, head_dim, levels, num_levels, inverse);
    const float factor = 1 / (float)kv_rotation_size(head_dim);
    kv_round_codes(y, head_dim, 1, 0, codes);
    kv_store_metadata(metadata, 0, kv_bf16_nearest(scale * factor * power.up));
}

/* ---- rows -------------------------------------------------------------------------------------- */

KV_INLINE int kv_is_rotated(kv_format format) {
    return format >= KV_FORMAT_ROT8 && format <= KV_FORMAT_ROT2;
}

/* x: the row, less its bias; it is overwritten. */
static void kv_encode_row(kv_format format, float *x, int32_t head_dim, const float *signs,
                          uint8_t *out, char *metadata) {
    uint8_t codes[KV_MAX_HEAD_DIM];
    const float absmax = kv_absmax(x, head_dim);
    const kv_power power = kv_power_of(absmax);
    float max = absmax * power.down, factor = 1;
    if (kv_is_rotated(format)) {
        kv_rotate(x, head_dim, signs, power.down);
        factor = 1 / (float)kv_rotation_size(head_dim);
    } else {
        kv_scale_row(x, head_dim, power.down);
    }
    if (format == KV_FORMAT_ROT8 || format == KV_FORMAT_ROT6)
        max = kv_absmax(x, head_dim);
    if (format == KV_FORMAT_ROT4) {
        kv_encode_levels(x, head_dim, kv_rot4_levels, 8, KV_ROT4_UNIT, power, codes, metadata);
        kv_pack(codes, head_dim, 4, out);
    } else if (format == KV_FORMAT_ROT3) {
        kv_encode_levels(x, head_dim, kv_rot3_levels, 4, KV_ROT3_UNIT, power, codes, metadata);
        kv_pack(codes, head_dim, 3, out);
    } else if (format == KV_FORMAT_ROT2) {
        kv_encode_levels(x, head_dim, kv_rot2_levels, 2, KV_ROT2_UNIT, power, codes, metadata);
        kv_pack(codes, head_dim, 2, out);
    } else if (format == KV_FORMAT_ROT6) {
        kv_encode_rot6(x, head_dim, kv_encode_scale(max, 64, factor, power, metadata) / 2, codes);
        kv_pack(codes, head_dim, 6, out);
    } else if (format == KV_FORMAT_FP8_E4M3) {
        kv_encode_e4m3(x, head_dim, kv_encode_scale(max, 448, factor, power, metadata), out);
    } else {
        const float inverse = kv_encode_scale(max, 127, factor, power, metadata);
        kv_round_codes(x, head_dim, inverse, 128, out);
    }
}

static void kv_encode(kv_format format, const float *rows, int32_t count, int32_t head_dim,
                      const kv_channels *channels, char *codes, char *metadata) {
    const float *signs = kv_rotation_signs();
    float x[KV_MAX_HEAD_DIM] __attribute__((aligned(64)));
    if (kv_format_kind_of(format) == KV_KIND_CHANNEL) {
        kv_encode_group(format, rows, head_dim, channels->bias, (uint8_t *)codes, metadata);
        return;
    }
    const int64_t code_bytes = kv_format_code_bytes(format, head_dim);
    const int64_t metadata_bytes = kv_format_metadata_bytes(format, head_dim);
    for (int32_t t = 0; t < count; t++) {
        uint8_t *to = (uint8_t *)codes + t * code_bytes;
        kv_center(rows + (int64_t)t * head_dim, channels->bias, head_dim, x);
        if (format == KV_FORMAT_INT8_STATIC)
            kv_encode_static(x, head_dim, channels->scales, to);
        else if (format == KV_FORMAT_INT4)
            kv_encode_int4(x, head_dim, to, metadata + t * metadata_bytes);
        else
            kv_encode_row(format, x, head_dim, signs, to, metadata + t * metadata_bytes);
    }
}
