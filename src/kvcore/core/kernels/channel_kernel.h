/* Kernel text: the formats that encode 32 tokens channel by channel, docs/formats.md. */

enum { KV_CHUNK = 16 }; /* channels that are encoded at a time */

/* What chan2 cuts off a channel's range at each end: with four codes, what the others gain is more
 * than what the outermost lose. */
#define KV_CHAN2_CLIP 0.075f

typedef uint8_t kv_chunk_codes[KV_GROUP_TOKENS][KV_CHUNK];

/* x := the chunk's channels less their bias, token by token; least and most are the bounds. */
KV_INLINE void kv_load_chunk(const float *rows, int32_t head_dim, const float *bias,
                             float x[KV_GROUP_TOKENS][KV_CHUNK], float *least, float *most) {
    for (int j = 0; j < KV_CHUNK; j += KV_LANES) {
        kv_vec min = kv_zero(), max = kv_zero();
        for (int t = 0; t < KV_GROUP_TOKENS; t++) {
            kv_vec y = kv_load(rows + (int64_t)t * head_dim + j);
            if (bias)
                y = kv_subtract_bias(y, bias + j);
            min = t ? kv_min(min, y) : y;
            max = t ? kv_max(max, y) : y;
            kv_store(x[t] + j, y);
        }
        kv_store(least + j, min);
        kv_store(most + j, max);
    }
}

/* Channels c .. c + KV_CHUNK of a group; rows and bias begin at c. */
KV_INLINE void kv_encode_chunk(const float *rows, int32_t head_dim, const float *bias, int levels,
                               float clip, int32_t c, char *metadata, kv_chunk_codes codes) {
    float x[KV_GROUP_TOKENS][KV_CHUNK], least[KV_CHUNK], most[KV_CHUNK];
    float down[KV_CHUNK], from[KV_CHUNK], inverse[KV_CHUNK];
    kv_load_chunk(rows, head_dim, bias, x, least, most);
    for (int j = 0; j < KV_CHUNK; j++) {
        kv_range range = {.least = least[j], .most = most[j]};
        kv_encode_range(&range, (float)levels, clip);
        down[j] = range.down;
        from[j] = range.from;
        inverse[j] = range.inverse;
        kv_store_metadata(metadata, c + j, range.lo);
        kv_store_metadata(metadata, head_dim + c + j, range.step);
    }
    for (int t = 0; t < KV_GROUP_TOKENS; t++)
        for (int j = 0; j < KV_CHUNK; j += KV_LANES) {
            const kv_vec u =
                kv_sub(kv_mul(kv_load(x[t] + j), kv_load(down + j)), kv_load(from + j));
            kv_vec code = kv_mul(u, kv_load(inverse + j));
            if (clip > 0)
                code = kv_min(kv_max(code, kv_zero()), kv_broadcast((float)levels));
            kv_store_u8(codes[t] + j, kv_add(code, kv_broadcast(KV_ROUND)));
        }
}

/* Four channels' codes of one token, a byte each. */
KV_INLINE uint32_t kv_load_four(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return four;
}

KV_INLINE void kv_pack_chan4(const kv_chunk_codes codes, uint8_t *lines) {
    for (int line = 0; line < KV_CHUNK / 4; line++)
        for (int t = 0; t < 16; t++) {
            const uint32_t low = kv_load_four(codes[t] + 4 * line);
            const uint32_t four = low | kv_load_four(codes[16 + t] + 4 * line) << 4;
            memcpy(lines + 64 * line + 4 * t, &four, 4);
        }
}

/* `upper`: the channels that lie head_dim / 2 above those of `codes`. */
KV_INLINE void kv_pack_chan2(const kv_chunk_codes codes, const kv_chunk_codes upper,
                             uint8_t *lines) {
    for (int line = 0; line < KV_CHUNK / 4; line++)
        for (int t = 0; t < 16; t++) {
            uint32_t four = kv_load_four(codes[t] + 4 * line);
            four |= kv_load_four(codes[16 + t] + 4 * line) << 2;
            four |= kv_load_four(upper[t] + 4 * line) << 4;
            four |= kv_load_four(upper[16 + t] + 4 * line) << 6;
            memcpy(lines + 64 * line + 4 * t, &four, 4);
        }
}

static void kv_encode_group(kv_format format, const float *rows, int32_t head_dim,
                            const float *bias, uint8_t *lines, char *metadata) {
    kv_chunk_codes codes, upper;
    const int32_t half = head_dim / 2;
    if (format == KV_FORMAT_CHAN4) {
        for (int32_t c = 0; c < head_dim; c += KV_CHUNK, lines += 16 * KV_CHUNK) {
            kv_encode_chunk(rows + c, head_dim, bias ? bias + c : NULL, 15, 0, c, metadata, codes);
            kv_pack_chan4(codes, lines);
        }
        return;
    }
    for (int32_t c = 0; c < half; c += KV_CHUNK, lines += 16 * KV_CHUNK) {
        const int32_t d = half + c;
        kv_encode_chunk(rows + c, head_dim, bias ? bias + c : NULL, 3, KV_CHAN2_CLIP, c, metadata,
                        codes);
        kv_encode_chunk(rows + d, head_dim, bias ? bias + d : NULL, 3, KV_CHAN2_CLIP, d, metadata,
                        upper);
        kv_pack_chan2(codes, upper, lines);
    }
}

/* The codes of token t of a group, in the order of the channels. */
KV_INLINE void kv_unpack_token(kv_format format, const uint8_t *lines, int t, int32_t head_dim,
                               uint8_t *codes) {
    const int shift = format == KV_FORMAT_CHAN4 ? t / 16 * 4 : t / 16 * 2;
    lines += 4 * (t % 16);
    if (format == KV_FORMAT_CHAN4) {
        for (int32_t c = 0; c < head_dim; c += 4) {
            const uint32_t four = kv_load_four(lines + 16 * c) >> shift & 0x0f0f0f0f;
            memcpy(codes + c, &four, 4);
        }
        return;
    }
    for (int32_t c = 0; c < head_dim / 2; c += 4) {
        const uint32_t four = kv_load_four(lines + 16 * c) >> shift;
        const uint32_t low = four & 0x03030303, high = four >> 4 & 0x03030303;
        memcpy(codes + c, &low, 4);
        memcpy(codes + head_dim / 2 + c, &high, 4);
    }
}

static void kv_decode_group(kv_format format, const uint8_t *lines, const char *metadata,
                            int32_t first, int32_t count, int32_t head_dim, const float *bias,
                            float *rows, int64_t row_stride) {
    float lo[KV_MAX_HEAD_DIM], step[KV_MAX_HEAD_DIM];
    uint8_t codes[KV_MAX_HEAD_DIM];
    for (int32_t c = 0; c < head_dim; c++) {
        lo[c] = kv_bf16_value(kv_load_metadata(metadata, c));
        step[c] = kv_bf16_value(kv_load_metadata(metadata, head_dim + c));
    }
    for (int32_t t = 0; t < count; t++) {
        float *row = rows + t * row_stride;
        kv_unpack_token(format, lines, first + t, head_dim, codes);
        for (int32_t c = 0; c < head_dim; c += KV_LANES) {
            const kv_vec more = kv_mul(kv_load(step + c), kv_load_u8(codes + c));
            kv_store(row + c, kv_add(kv_load(lo + c), more));
        }
        kv_add_bias(row, head_dim, bias);
    }
}
