/* Kernel text: codes and metadata to float32 rows, as docs/formats.md says. But for adding int4's
 * minimum and a bias each element is rounded once, so that every ISA gives the same bits. */

KV_INLINE void kv_decode_e4m3(const uint8_t *codes, int32_t head_dim, float scale, float *row) {
    for (int32_t i = 0; i < head_dim; i++) {
        const uint32_t code = codes[i], sign = (code & 0x80) << 24, magnitude = (code & 0x7f) << 20;
        /* Below 2^-6 the code counts multiples of 2^-9, as the mantissa at 2^-6 does. */
        const float small = kv_from_bits(magnitude + (121u << 23)) - 0.015625f;
        const float normal = kv_from_bits(magnitude + (120u << 23));
        const float value = magnitude < 1u << 23 ? small : normal;
        row[i] = kv_from_bits(sign | kv_to_bits(value * scale));
    }
}

static void kv_decode_int4(const uint8_t *codes, const char *metadata, int32_t head_dim,
                           float *row) {
    uint8_t code[KV_MAX_HEAD_DIM];
    kv_unpack(codes, head_dim, 4, code);
    for (int32_t at = 0; at < head_dim; at += 32) {
        const float lo = kv_bf16_value(kv_load_metadata(metadata, at / 32));
        const float step = kv_bf16_value(kv_load_metadata(metadata, (head_dim + at) / 32));
        for (int32_t i = at; i < at + 32; i += KV_LANES) {
            const kv_vec more = kv_mul(kv_broadcast(step), kv_load_u8(code + i));
            kv_store(row + i, kv_add(kv_broadcast(lo), more));
        }
    }
}

KV_INLINE void kv_decode_table(const uint8_t *codes, int32_t head_dim, const int8_t *levels,
                               int num_levels, float *row) {
    float table[16] = {0};
    for (int k = 0; k < num_levels; k++) {
        table[num_levels + k] = levels[k];
        table[num_levels - 1 - k] = (float)-levels[k];
    }
    for (int32_t i = 0; i < head_dim; i += KV_LANES)
        kv_store(row + i, kv_look_up(table, codes + i));
}

/* row := codes - 128 */
KV_INLINE void kv_decode_bytes(const uint8_t *codes, int32_t head_dim, float *row) {
    for (int32_t i = 0; i < head_dim; i += KV_LANES)
        kv_store(row + i, kv_sub(kv_load_u8(codes + i), kv_broadcast(128)));
}

/* The levels of a rot row, as floats. */
KV_INLINE void kv_decode_levels(kv_format format, const uint8_t *from, int32_t head_dim,
                                float *row) {
    uint8_t codes[KV_MAX_HEAD_DIM];
    if (format == KV_FORMAT_ROT6) {
        kv_unpack(from, head_dim, 6, codes);
        for (int32_t i = 0; i < head_dim; i += KV_LANES) {
            const kv_vec code = kv_load_u8(codes + i);
            kv_store(row + i, kv_sub(kv_add(code, code), kv_broadcast(63)));
        }
    } else if (format == KV_FORMAT_ROT4) {
        kv_unpack(from, head_dim, 4, codes);
        kv_decode_table(codes, head_dim, kv_rot4_levels, 8, row);
    } else if (format == KV_FORMAT_ROT3) {
        kv_unpack(from, head_dim, 3, codes);
        kv_decode_table(codes, head_dim, kv_rot3_levels, 4, row);
    } else if (format == KV_FORMAT_ROT2) {
        kv_unpack(from, head_dim, 2, codes);
        kv_decode_table(codes, head_dim, kv_rot2_levels, 2, row);
    } else {
        kv_decode_bytes(from, head_dim, row);
    }
}

KV_INLINE void kv_decode_row(kv_format format, const uint8_t *codes, const char *metadata,
                             int32_t head_dim, const kv_channels *channels, const float *signs,
                             float *row) {
    if (format == KV_FORMAT_INT4) {
        kv_decode_int4(codes, metadata, head_dim, row);
    } else if (format == KV_FORMAT_INT8_STATIC) {
        kv_decode_bytes(codes, head_dim, row);
        for (int32_t i = 0; i < head_dim; i += KV_LANES)
            kv_store(row + i, kv_mul(kv_load(row + i), kv_load(channels->scales + i)));
    } else {
        const float scale = kv_bf16_value(kv_load_metadata(metadata, 0));
        if (kv_is_rotated(format)) {
            kv_decode_levels(format, codes, head_dim, row);
            kv_rotate_back(row, head_dim, signs, scale);
        } else if (format == KV_FORMAT_FP8_E4M3) {
            kv_decode_e4m3(codes, head_dim, scale, row);
        } else {
            kv_decode_bytes(codes, head_dim, row);
            kv_scale_row(row, head_dim, scale);
        }
    }
}

static void kv_decode(kv_format format, const char *codes, const char *metadata, int32_t first,
                      int32_t count, int32_t head_dim, const kv_channels *channels, float *rows,
                      int64_t row_stride) {
    const float *signs = kv_rotation_signs();
    if (kv_format_kind_of(format) == KV_KIND_CHANNEL) {
        kv_decode_group(format, (const uint8_t *)codes, metadata, first, count, head_dim,
                        channels->bias, rows, row_stride);
        return;
    }
    const int64_t code_bytes = kv_format_code_bytes(format, head_dim);
    const int64_t metadata_bytes = kv_format_metadata_bytes(format, head_dim);
    for (int32_t t = 0; t < count; t++) {
        float *row = rows + t * row_stride;
        kv_decode_row(format, (const uint8_t *)codes + (first + t) * code_bytes,
                      metadata + (first + t) * metadata_bytes, head_dim, channels, signs, row);
        kv_add_bias(row, head_dim, channels->bias);
    }
}
