/* Scales, minima and steps as bfloat16, rounded as docs/formats.md says. Sources that include this
 * are compiled without fused multiply-adds. */
#pragma once
#include "device.cuh"

/* 2^e and 2^-e */
struct Power {
    float up, down;
};

/* e: the exponent of absmax, held where both powers are normal numbers. */
KV_DEVICE Power power_of(float absmax) {
    const u32 exponent = min(max(float_as_u32(absmax) >> 23, 1u), 253u);
    return {u32_as_float(exponent << 23), u32_as_float((254 - exponent) << 23)};
}

/* The smallest bf16 that is no less than x, for x >= 0. */
KV_DEVICE u16 bf16_up(float x) { return (u16)((float_as_u32(x) + 0xffff) >> 16); }

/* The largest finite bf16 that is no more than x, or the smallest of all. */
KV_DEVICE u16 bf16_down(float x) {
    const u32 bits = float_as_u32(x), down = (bits + (bits >> 31 ? 0xffff : 0)) >> 16;
    return (u16)(down == 0xff80 ? 0xff7f : down);
}

struct Scale {
    u16 stored;
    float inverse; /* 1 / scale in units of what is encoded, or 0 */
};

/* The scale `levels` of which reach from 0 to max; stored is that * factor * power.up. */
KV_DEVICE Scale encode_scale(float max, float levels, float factor, Power power) {
    const u16 stored = bf16_up(max / levels * factor * power.up);
    const float scale = bf16_to_f32(stored) * power.down / factor;
    return {stored, stored ? 1 / scale : 0};
}

/* Elements that share a minimum and a step: code = round((x * down - from) * inverse). */
struct Range {
    float down, from, inverse;
    u16 minimum, step; /* what is stored */
};

/* For codes 0 to `levels`; `clip` of the range is cut off at both ends. */
KV_DEVICE Range encode_range(float least, float most, float levels, float clip) {
    const Power power = power_of(fmaxf(fabsf(least), fabsf(most)));
    least *= power.down;
    most *= power.down;
    if (clip > 0) {
        const float cut = (most - least) * clip;
        least += cut;
        most -= cut;
    }
    Range range;
    range.down = power.down;
    range.minimum = bf16_down(least * power.up + 0.0f); /* no -0 */
    range.from = bf16_to_f32(range.minimum) * power.down;
    const float width = most - range.from;
    range.step = width > 0 ? bf16_up(width / levels * power.up) : (u16)0;
    range.inverse = range.step ? 1 / (bf16_to_f32(range.step) * power.down) : 0;
    return range;
}

/* Adding it rounds a float below 2^22 to a whole number, ties to even, in the lowest bits. */
constexpr float ROUND = 12582912.0f;

KV_DEVICE u32 round_code(float u, s32 zero) { return float_as_u32(u + (ROUND + (float)zero)); }

constexpr float LARGEST = 3.402823466e+38f;

/* What is encoded of an element: less its bias, held at the largest finite number. */
KV_DEVICE float subtract_bias(float x, float bias) {
    return fminf(fmaxf(x - bias, -LARGEST), LARGEST) + 0.0f; /* no -0 */
}

constexpr float LARGEST_SATURATED = 65504.0f; /* fp16's largest number */

/* Finite: NaN becomes 0, and infinity 65504. */
KV_DEVICE float saturated(float x) {
    const u32 bits = float_as_u32(x), magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x7f800000u)
        return x;
    const float limit = bits >> 31 ? -LARGEST_SATURATED : LARGEST_SATURATED;
    return magnitude > 0x7f800000u ? 0 : limit;
}

KV_DEVICE bool is_finite(float x) { return (float_as_u32(x) & 0x7fffffffu) < 0x7f800000u; }
