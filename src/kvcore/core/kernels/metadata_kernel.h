/* Kernel text: scales, minima and steps as bfloat16, rounded as docs/formats.md says. */

/* 2^e and 2^-e */
typedef struct kv_power {
    float up, down;
} kv_power;

/* e: the exponent of absmax, held where both powers are normal numbers. */
KV_INLINE kv_power kv_power_of(float absmax) {
    uint32_t exponent = kv_to_bits(absmax) >> 23;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    return (kv_power){kv_from_bits(exponent << 23), kv_from_bits((254 - exponent) << 23)};
}

KV_INLINE float kv_bf16_value(uint16_t bits) { return kv_from_bits((uint32_t)bits << 16); }

/* The smallest bf16 that is no less than x, for x >= 0. */
KV_INLINE uint16_t kv_bf16_up(float x) { return (uint16_t)((kv_to_bits(x) + 0xffff) >> 16); }

/* The largest finite bf16 that is no more than x, or the smallest of all. */
KV_INLINE uint16_t kv_bf16_down(float x) {
    const uint32_t bits = kv_to_bits(x), sign = bits >> 31;
    const uint32_t down = (bits + (sign ? 0xffff : 0)) >> 16;
    return (uint16_t)(down == 0xff80 ? 0xff7f : down);
}

KV_INLINE uint16_t kv_bf16_nearest(float x) {
    const uint32_t bits = kv_to_bits(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

KV_INLINE void kv_store_metadata(char *metadata, int64_t at, uint16_t bits) {
    memcpy(metadata + 2 * at, &bits, 2);
}

KV_INLINE uint16_t kv_load_metadata(const char *metadata, int64_t at) {
    uint16_t bits;
    memcpy(&bits, metadata + 2 * at, 2);
    return bits;
}

/* The scale `levels` of which reach from 0 to max; what is stored is the scale * factor * power.up
 * and what is returned 1 / scale, or 0. */
KV_INLINE float kv_encode_scale(float max, float levels, float factor, kv_power power,
                                char *metadata) {
    const uint16_t stored = kv_bf16_up(max / levels * factor * power.up);
    const float scale = kv_bf16_value(stored) * power.down / factor;
    kv_store_metadata(metadata, 0, stored);
    return stored ? 1 / scale : 0;
}

/* Elements that share a minimum and a step. */
typedef struct kv_range {
    float least, most;         /* of the elements */
    float down, from, inverse; /* code = round((x * down - from) * inverse) */
    uint16_t lo, step;         /* what is stored */
} kv_range;

/* The rest of `range` from its bounds, of which `clip` is cut off at both ends, for codes from 0 to
 * `levels`. */
KV_INLINE void kv_encode_range(kv_range *range, float levels, float clip) {
    const float a = fabsf(range->least), b = fabsf(range->most);
    const kv_power power = kv_power_of(a > b ? a : b);
    float least = range->least * power.down, most = range->most * power.down;
    if (clip > 0) {
        const float cut = (most - least) * clip;
        least += cut;
        most -= cut;
    }
    range->down = power.down;
    range->lo = kv_bf16_down(least * power.up + 0.0f); /* no -0 */
    range->from = kv_bf16_value(range->lo) * power.down;
    const float width = most - range->from;
    range->step = width > 0 ? kv_bf16_up(width / levels * power.up) : 0;
    range->inverse = range->step ? 1 / (kv_bf16_value(range->step) * power.down) : 0;
}
