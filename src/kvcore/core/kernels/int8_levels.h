/* Kernel text: the levels of a run of tokens as bytes, in the order in which dot products of bytes
 * take them. A run is unpacked once for all query rows, so that a format is no more than its planes.
 *
 * Keys: for every four dims the bytes of 16 tokens, [head_dim / 4][2 halves][16 tokens][4 dims], so
 * that a product sums over dims and a lane is a token. Values: for every four tokens the bytes of
 * their dims, [8][head_dim / 16][16 dims][4 tokens], so that it sums over tokens and a lane is a dim.
 *
 * `ahead` is what is read later: a run takes half of its share of lines from there while it is
 * unpacked, and the other half while it is multiplied, so that memory works evenly. */

enum { KV_UNIT_DIMS = 16 /* dims that share the bytes of a unit: docs/formats.md */ };

static const int8_t kv_rot4_table[16] = {-127, -96, -75, -58, -44, -31, -18, -6,
                                         6,    18,  31,  44,  58,  75,  96,  127};
static const int8_t kv_rot3_table[16] = {-127, -79, -45, -14, 14, 45, 79, 127};
static const int8_t kv_rot2_table[16] = {-127, -38, 38, 127};

KV_INLINE const char *kv_ask(const char *at, int num_lines) {
    for (int i = 0; i < num_lines; i++)
        kv_prefetch(at + i * KV_LINE_BYTES);
    return at + num_lines * KV_LINE_BYTES;
}

/* Bits of a code's planes: docs/formats.md. */
KV_INLINE int kv_low_bits(kv_format format) {
    switch (format) {
    case KV_FORMAT_ROT6:
    case KV_FORMAT_ROT4:
    case KV_FORMAT_CHAN4:
        return 4;
    case KV_FORMAT_ROT3:
    case KV_FORMAT_ROT2:
    case KV_FORMAT_CHAN2:
        return 2;
    default:
        return 8;
    }
}

KV_INLINE int kv_high_bits(kv_format format) {
    return format == KV_FORMAT_ROT6 ? 2 : format == KV_FORMAT_ROT3 ? 1 : 0;
}

/* Levels of chunk n of a span, plus `zero`, which is 0 or 128. `low` and `high` are the bytes of the
 * planes' units that hold it; where the high plane has half a unit, its bits are two chunks apart. */
KV_INLINE kv_bytes kv_chunk_levels(kv_format format, kv_bytes low, kv_bytes high, int n, int half,
                                   int zero) {
    kv_bytes code;
    switch (format) {
    case KV_FORMAT_ROT6: /* 2 * code - 63 */
        code = kv_or_shifted(kv_field(low, n % 2 * 4, 4), kv_field(high, n % 4 * 2, 2), 4);
        return kv_add_bytes(kv_or_shifted(kv_zero_bytes(), code, 1), zero - 63);
    case KV_FORMAT_ROT4:
        return kv_look_up_bytes(kv_rot4_table, zero, kv_field(low, n % 2 * 4, 4));
    case KV_FORMAT_ROT3:
        code =
            kv_or_shifted(kv_field(low, n % 4 * 2, 2), kv_field(high, half ? 2 * n : n % 8, 1), 2);
        return kv_look_up_bytes(kv_rot3_table, zero, code);
    case KV_FORMAT_ROT2:
        return kv_look_up_bytes(kv_rot2_table, zero, kv_field(low, n % 4 * 2, 2));
    default:
        return kv_xor_bytes(low, zero ^ 128);
    }
}

/* Dims that begin a new unit in every plane: the span that is unpacked at a time. */
KV_INLINE int kv_span(kv_format format) {
    const int high_bits = kv_high_bits(format);
    return 8 / (high_bits ? high_bits : kv_low_bits(format)) * KV_UNIT_DIMS;
}

/* ---- keys ------------------------------------------------------------------------------------ */

/* Where a span's codes begin in its token's planes. */
typedef struct kv_span_codes {
    const char *low, *high;
    int64_t stride; /* bytes from token to token */
} kv_span_codes;

KV_INLINE kv_span_codes kv_span_codes_at(kv_format format, const char *codes, int64_t stride,
                                         int32_t head_dim, int32_t d) {
    const char *high = codes + head_dim * kv_low_bits(format) / 8;
    return (kv_span_codes){codes + d * kv_low_bits(format) / 8, high + d * kv_high_bits(format) / 8,
                           stride};
}

KV_INLINE void kv_load_columns(const char *p, int64_t stride, int half, kv_bytes *columns) {
    kv_bytes x[4];
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        x[i] = half ? kv_load_half_units(p + i * stride, 4 * stride)
                    : kv_load_units(p + i * stride, 4 * stride);
    kv_to_columns(x, columns);
}

/* `chunks` chunks of 16 tokens. With half as many as a unit of the high plane has, that unit is one
 * of 8 bytes. */
KV_INLINE void kv_unpack_key_span(kv_format format, int chunks, kv_span_codes from,
                                  uint8_t *lines) {
    const int low_bits = kv_low_bits(format), high_bits = kv_high_bits(format);
    const int half = high_bits && chunks * high_bits < 8;
    kv_bytes low[4][4], high[4];
    KV_UNROLL
    for (int u = 0; u < chunks * low_bits / 8; u++)
        kv_load_columns(from.low + u * KV_UNIT_DIMS, from.stride, 0, low[u]);
    if (high_bits)
        kv_load_columns(from.high, from.stride, half, high);
    KV_UNROLL
    for (int n = 0; n < chunks; n++)
        KV_UNROLL
    for (int c = 0; c < 4; c++) {
        const kv_bytes x = low[n * low_bits / 8][c];
        kv_store_bytes(lines + (n * 4 + c) * 2 * KV_LINE_BYTES,
                       kv_chunk_levels(format, x, high_bits ? high[c] : x, n, half, 128));
    }
}

/* 16 tokens. */
KV_INLINE const char *kv_unpack_key_half(kv_format format, const char *codes, int64_t stride,
                                         int32_t head_dim, uint8_t *lines, const char *ahead) {
    const int span = kv_span(format), bits = kv_low_bits(format) + kv_high_bits(format);
    int32_t d = 0;
    for (; d + span <= head_dim; d += span) {
        ahead = kv_ask(ahead, span * bits / 64);
        kv_unpack_key_span(format, span / KV_UNIT_DIMS,
                           kv_span_codes_at(format, codes, stride, head_dim, d),
                           lines + d / 4 * 2 * KV_LINE_BYTES);
    }
    if (format == KV_FORMAT_ROT3 && d < head_dim)
        kv_unpack_key_span(format, span / KV_UNIT_DIMS / 2,
                           kv_span_codes_at(format, codes, stride, head_dim, d),
                           lines + d / 4 * 2 * KV_LINE_BYTES);
    return ahead;
}

/* The codes of a sealed group, whose lines are two halves already. */
KV_INLINE void kv_unpack_key_group(kv_format format, const char *codes, int32_t head_dim,
                                   uint8_t *lines, const char *ahead) {
    const int bits = kv_low_bits(format), parts = 4 / bits;
    const int32_t count = head_dim / 4 / parts; /* of the lines that a part of the channels has */
    for (int32_t i = 0; i < count; i++) {
        const kv_bytes x = kv_load_bytes(codes + i * KV_LINE_BYTES);
        ahead = kv_ask(ahead, i & 1);
        KV_UNROLL
        for (int p = 0; p < parts * 2; p++)
            kv_store_bytes(lines + ((p / 2 * count + i) * 2 + p % 2) * KV_LINE_BYTES,
                           kv_field(x, p * bits, bits));
    }
}

/* ---- values ---------------------------------------------------------------------------------- */

/* `chunks` chunks of four tokens. */
KV_INLINE void kv_unpack_value_span(kv_format format, int chunks, kv_span_codes from,
                                    int8_t *lines) {
    const int low_bits = kv_low_bits(format), high_bits = kv_high_bits(format);
    const int half = high_bits && chunks * high_bits < 8;
    kv_bytes low[4], high;
    KV_UNROLL
    for (int u = 0; u < chunks * low_bits / 8; u++)
        low[u] = kv_to_quads(kv_load_units(from.low + u * KV_UNIT_DIMS, from.stride));
    high = low[0];
    if (high_bits)
        high = kv_to_quads(half ? kv_load_half_units(from.high, from.stride)
                                : kv_load_units(from.high, from.stride));
    KV_UNROLL
    for (int n = 0; n < chunks; n++)
        kv_store_bytes(lines + n * KV_LINE_BYTES,
                       kv_chunk_levels(format, low[n * low_bits / 8], high, n, half, 0));
}

/* Four tokens. */
KV_INLINE const char *kv_unpack_value_quad(kv_format format, const char *codes, int64_t stride,
                                           int32_t head_dim, int8_t *lines, const char *ahead) {
    const int span = kv_span(format), bits = kv_low_bits(format) + kv_high_bits(format);
    int32_t d = 0;
    ahead = kv_ask(ahead, head_dim * bits / 256);
    for (; d + span <= head_dim; d += span)
        kv_unpack_value_span(format, span / KV_UNIT_DIMS,
                             kv_span_codes_at(format, codes, stride, head_dim, d),
                             lines + d / KV_UNIT_DIMS * KV_LINE_BYTES);
    if (format == KV_FORMAT_ROT3 && d < head_dim)
        kv_unpack_value_span(format, span / KV_UNIT_DIMS / 2,
                             kv_span_codes_at(format, codes, stride, head_dim, d),
                             lines + d / KV_UNIT_DIMS * KV_LINE_BYTES);
    return ahead;
}

/* ---- runs ------------------------------------------------------------------------------------ */

/* `call` with the format as a constant. Those with bytes for codes are one to it. */
#define KV_LEVEL_FORMATS(format, call) \
    switch (format) {                  \
    case KV_FORMAT_ROT6:               \
        call(KV_FORMAT_ROT6);          \
        break;                         \
    case KV_FORMAT_ROT4:               \
        call(KV_FORMAT_ROT4);          \
        break;                         \
    case KV_FORMAT_ROT3:               \
        call(KV_FORMAT_ROT3);          \
        break;                         \
    case KV_FORMAT_ROT2:               \
        call(KV_FORMAT_ROT2);          \
        break;                         \
    default:                           \
        call(KV_FORMAT_INT8);          \
        break;                         \
    }

/* A run's codes; where it lacks tokens, a copy with zeros in place of them. */
static const char *kv_whole_codes(const kv_run *run, char *copy, int64_t *stride) {
    *stride = run->stride;
    if (run->count == KV_RUN)
        return run->rows;
    *stride = run->nbytes;
    for (int32_t t = 0; t < run->count; t++)
        memcpy(copy + t * run->nbytes, run->rows + t * run->stride, (size_t)run->nbytes);
    memset(copy + run->count * run->nbytes, 0, (size_t)((KV_RUN - run->count) * run->nbytes));
    return copy;
}

KV_INLINE void kv_unpack_keys(kv_format format, const kv_run *run, int32_t head_dim, char *copy,
                              uint8_t *lines, const char *ahead) {
    int64_t stride;
    if (format == KV_FORMAT_CHAN4) {
        kv_unpack_key_group(KV_FORMAT_CHAN4, run->rows, head_dim, lines, ahead);
        return;
    }
    if (format == KV_FORMAT_CHAN2) {
        kv_unpack_key_group(KV_FORMAT_CHAN2, run->rows, head_dim, lines, ahead);
        return;
    }
    const char *codes = kv_whole_codes(run, copy, &stride);
    for (int t = 0; t < run->count; t += KV_LANES, lines += KV_LINE_BYTES, codes += 16 * stride) {
#define KV_UNPACK(known) ahead = kv_unpack_key_half(known, codes, stride, head_dim, lines, ahead)
        KV_LEVEL_FORMATS(format, KV_UNPACK)
#undef KV_UNPACK
    }
}

KV_INLINE void kv_unpack_values(kv_format format, const kv_run *run, int32_t head_dim, char *copy,
                                int8_t *lines, const char *ahead) {
    int64_t stride;
    const char *codes = kv_whole_codes(run, copy, &stride);
#define KV_UNPACK(known)                                                                \
    for (int t = 0; t < run->count; t += 4, lines += 4 * head_dim, codes += 4 * stride) \
    ahead = kv_unpack_value_quad(known, codes, stride, head_dim, lines, ahead)
    KV_LEVEL_FORMATS(format, KV_UNPACK)
#undef KV_UNPACK
}
#undef KV_LEVEL_FORMATS
