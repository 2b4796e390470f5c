/* A row to codes and metadata, byte for byte as docs/formats.md says, by the 16 lanes that hold it
 * (rows.cuh). Both halves of a warp take part, each with its own row. Sources that include this
 * are compiled without fused multiply-adds. */
#pragma once
#include "device.cuh"
#include "formats.cuh"
#include "metadata.cuh"
#include "rotation.cuh"
#include "rows.cuh"
#include "storage.cuh"

/* ---- over 16 lanes; all get the same bits ------------------------------------------------------ */

KV_DEVICE float max_of_lanes(float v) {
#pragma unroll
    for (s32 mask = 8; mask; mask >>= 1)
        v = fmaxf(v, shfl_xor(v, mask));
    return v;
}

/* Lane l takes lane l + 8, then l + 4, l + 2 and l + 1. */
KV_DEVICE float sum_of_lanes(float v) {
#pragma unroll
    for (s32 mask = 8; mask; mask >>= 1)
        v += shfl_xor(v, mask);
    return v;
}

template <s32 D> KV_DEVICE float absmax_of_row(const float (&x)[D / 16]) {
    float max = 0;
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        max = fmaxf(max, fabsf(x[k]));
    return max_of_lanes(max);
}

/* ---- planes ------------------------------------------------------------------------------------ */

/* A plane of WIDTH bits, from bit `shift` of each code on: byte l of each unit is lane l's. */
template <s32 WIDTH, s32 D>
KV_DEVICE void put_plane(const u32 (&codes)[D / 16], s32 shift, u8 *plane) {
    constexpr s32 fields = 8 / WIDTH, units = D / 16 / fields;
#pragma unroll
    for (s32 unit = 0; unit < units; unit++) {
        u32 byte = 0;
#pragma unroll
        for (s32 i = 0; i < fields; i++)
            byte |= (codes[unit * fields + i] >> shift & ((1u << WIDTH) - 1)) << WIDTH * i;
        plane[16 * unit + half_lane()] = (u8)byte;
    }
    if constexpr (D / 16 % fields != 0) { /* rot3's second plane: eight bytes, of two lanes each */
        u32 byte = 0;
#pragma unroll
        for (s32 i = units * fields; i < D / 16; i++)
            byte |= (codes[i] >> shift & 1) << (2 * (i - units * fields) + half_lane() / 8);
        byte |= shfl_xor(byte, 8);
        if (half_lane() < 8)
            plane[16 * units + half_lane()] = (u8)byte;
    }
}

template <s32 FORMAT, s32 D> KV_DEVICE void put_codes(const u32 (&codes)[D / 16], u8 *out) {
    if constexpr (FORMAT == KV_FORMAT_ROT6) {
        put_plane<4, D>(codes, 0, out);
        put_plane<2, D>(codes, 4, out + D / 2);
    } else if constexpr (FORMAT == KV_FORMAT_ROT3) {
        put_plane<2, D>(codes, 0, out);
        put_plane<1, D>(codes, 2, out + D / 4);
    } else {
        put_plane<FormatOf<FORMAT>::BITS, D>(codes, 0, out);
    }
}

/* ---- codes ------------------------------------------------------------------------------------- */

/* To nearest, ties to even; abs(u) is less than 464, from where on nothing is near. */
KV_DEVICE u32 f32_to_e4m3(float u) {
    const u32 bits = float_as_u32(u), magnitude = bits & 0x7fffffffu;
    /* Below 2^-6 lie the multiples of 2^-9: what adding 2^14 rounds to. */
    const u32 small = float_as_u32(u32_as_float(magnitude) + 16384.0f) & 0xff;
    const u32 normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    return (bits >> 24 & 0x80) | (magnitude < 0x3c800000u ? small : normal);
}

/* Of formats with a scale and even levels. */
template <s32 FORMAT> KV_DEVICE u32 scaled_code(float x, float inverse) {
    if constexpr (FORMAT == KV_FORMAT_FP8_E4M3)
        return f32_to_e4m3(x * inverse);
    if constexpr (FORMAT == KV_FORMAT_ROT6)
        return (u32)fminf(x * inverse + 32, 63);
    return round_code(x * inverse, 128) & 0xff;
}

template <s32 FORMAT, s32 D>
KV_DEVICE u16 encode_scaled(const float (&x)[D / 16], float max, float factor, Power power,
                            u32 (&codes)[D / 16]) {
    constexpr float reach = FORMAT == KV_FORMAT_FP8_E4M3 ? 448
                            : FORMAT == KV_FORMAT_ROT6   ? 64
                                                         : 127;
    const Scale scale = encode_scale(max, reach, factor, power);
    const float inverse = FORMAT == KV_FORMAT_ROT6 ? scale.inverse / 2 : scale.inverse;
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        codes[k] = scaled_code<FORMAT>(x[k], inverse);
    return scale.stored;
}

template <s32 D>
KV_DEVICE void encode_static(const float (&x)[D / 16], const float *scales, u32 (&codes)[D / 16]) {
#pragma unroll
    for (s32 k = 0; k < D / 16; k++) {
        const float u = x[k] / scales[16 * k + half_lane()];
        codes[k] = round_code(fminf(fmaxf(u, -127), 127), 128) & 0xff;
    }
}

template <s32 D>
KV_DEVICE void encode_int4(const float (&x)[D / 16], u32 (&codes)[D / 16], u16 *metadata,
                           bool pred) {
#pragma unroll
    for (s32 k = 0; k < D / 16; k += 2) {
        const float least = -max_of_lanes(fmaxf(-x[k], -x[k + 1]));
        const float most = max_of_lanes(fmaxf(x[k], x[k + 1]));
        const Range range = encode_range(least, most, 15, 0);
        codes[k] = round_code((x[k] * range.down - range.from) * range.inverse, 0) & 0xff;
        codes[k + 1] = round_code((x[k + 1] * range.down - range.from) * range.inverse, 0) & 0xff;
        if (pred && half_lane() == 0) {
            metadata[k / 2] = range.minimum;
            metadata[(D / 16 + k) / 2] = range.step;
        }
    }
}

/* ---- tables of levels: rot4, rot3, rot2 -------------------------------------------------------- */

/* Levels in one standard deviation of what is encoded. */
template <s32 BITS> constexpr float LEVEL_UNIT = BITS == 4 ? 46.47f : BITS == 3 ? 59.02f : 84.11f;

/* The level nearest to abs(u), and its number. */
template <s32 BITS> KV_DEVICE s32 nearest_level(float u, float &level) {
    s32 number = 0;
    level = (float)table_level<BITS>(0);
#pragma unroll
    for (s32 k = 1; k < 1 << (BITS - 1); k++) {
        const float bound = (float)(table_level<BITS>(k - 1) + table_level<BITS>(k)) / 2;
        if (fabsf(u) >= bound) {
            number = k;
            level = (float)table_level<BITS>(k);
        }
    }
    return number;
}

/* Returns the scale by least squares, as it is stored. */
template <s32 BITS, s32 D>
KV_DEVICE u16 encode_levels(const float (&x)[D / 16], float factor, Power power,
                            u32 (&codes)[D / 16]) {
    constexpr s32 half = 1 << (BITS - 1);
    float sum = 0;
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        sum += x[k] * x[k];
    const float rms = sqrtf(sum_of_lanes(sum) / (float)D);
    const float inverse = rms > 0 ? LEVEL_UNIT<BITS> / rms : 0;
    float products = 0, squares = 0;
#pragma unroll
    for (s32 k = 0; k < D / 16; k++) {
        const float u = x[k] * inverse;
        float level;
        const s32 number = nearest_level<BITS>(u, level);
        products += fabsf(x[k]) * level;
        squares += level * level;
        codes[k] = (u32)(u >= 0 ? half + number : half - 1 - number);
    }
    const float scale = sum_of_lanes(products) / sum_of_lanes(squares);
    return f32_to_bf16(scale * factor * power.up);
}

/* ---- rows -------------------------------------------------------------------------------------- */

/* x: finite from here on. Whether it was before. */
template <s32 D> KV_DEVICE bool saturate_row(float (&x)[D / 16]) {
    u32 largest = 0;
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        largest = max(largest, float_as_u32(x[k]) & 0x7fffffffu);
    const bool finite = largest < 0x7f800000u;
    if (any(!finite))
#pragma unroll
        for (s32 k = 0; k < D / 16; k++)
            x[k] = saturated(x[k]);
    return finite;
}

template <s32 FORMAT, s32 D>
KV_DEVICE u16 encode_with_scale(float (&x)[D / 16], u32 (&codes)[D / 16]) {
    constexpr s32 bits = FormatOf<FORMAT>::BITS;
    constexpr float factor = IS_ROTATED<FORMAT> ? 1.0f / ROTATION_BLOCK<D> : 1;
    const float absmax = absmax_of_row<D>(x);
    const Power power = power_of(absmax);
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        x[k] *= power.down;
    if constexpr (IS_ROTATED<FORMAT>) {
        apply_signs<D>(x);
        rotate_row<D, 16>(x);
    }
    if constexpr (FORMAT == KV_FORMAT_INT8 || FORMAT == KV_FORMAT_FP8_E4M3)
        return encode_scaled<FORMAT, D>(x, absmax * power.down, factor, power, codes);
    else if constexpr (bits >= 6)
        return encode_scaled<FORMAT, D>(x, absmax_of_row<D>(x), factor, power, codes);
    else
        return encode_levels<bits, D>(x, factor, power, codes);
}

/* x: the row; it is overwritten. ACCESS: what `out` is aligned to, 16 at most. */
template <s32 FORMAT, s32 D, s32 ACCESS>
KV_DEVICE void encode_row(float (&x)[D / 16], Channels channels, u8 *stage, u8 *out, u8 *metadata,
                          bool pred) {
    u32 codes[D / 16];
    u16 *numbers = reinterpret_cast<u16 *>(metadata);
    if (channels.bias)
#pragma unroll
        for (s32 k = 0; k < D / 16; k++)
            x[k] = subtract_bias(x[k], channels.bias[16 * k + half_lane()]);
    if constexpr (FORMAT == KV_FORMAT_INT8_STATIC) {
        encode_static<D>(x, channels.scales, codes);
    } else if constexpr (FORMAT == KV_FORMAT_INT4) {
        encode_int4<D>(x, codes, numbers, pred);
    } else {
        const u16 scale = encode_with_scale<FORMAT, D>(x, codes);
        if (pred && half_lane() == 0)
            numbers[0] = scale;
    }
    put_codes<FORMAT, D>(codes, stage);
    sync_warp();
    if (pred)
        copy_bytes<CODE_BYTES<FORMAT, D>, ACCESS>(out, stage);
    sync_warp();
}
