/* A row back to float32, as the CPU decodes it, in the registers of 16 lanes (rows.cuh). Both
 * halves of a warp take part. Sources that include this are compiled without fused multiply-adds.
 */
#pragma once
#include "device.cuh"
#include "formats.cuh"
#include "rotation.cuh"
#include "rows.cuh"
#include "storage.cuh"

/* ---- codes ------------------------------------------------------------------------------------- */

/* codes := codes | a plane of WIDTH bits << shift */
template <s32 WIDTH, s32 D>
KV_DEVICE void get_plane(const u8 *plane, s32 shift, u32 (&codes)[D / 16]) {
    constexpr s32 fields = 8 / WIDTH, whole = D / 16 / fields * fields;
#pragma unroll
    for (s32 k = 0; k < whole; k++) {
        const u32 byte = plane[k / fields * 16 + half_lane()];
        codes[k] |= (byte >> k % fields * WIDTH & ((1u << WIDTH) - 1)) << shift;
    }
#pragma unroll
    for (s32 k = whole; k < D / 16; k++) { /* rot3's second plane: eight bytes, of two lanes each */
        const u32 byte = plane[whole / fields * 16 + half_lane() % 8];
        codes[k] |= (byte >> (2 * (k - whole) + half_lane() / 8) & 1) << shift;
    }
}

template <s32 FORMAT, s32 D> KV_DEVICE void get_codes(const u8 *row, u32 (&codes)[D / 16]) {
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        codes[k] = 0;
    if constexpr (FORMAT == KV_FORMAT_ROT6) {
        get_plane<4, D>(row, 0, codes);
        get_plane<2, D>(row + D / 2, 4, codes);
    } else if constexpr (FORMAT == KV_FORMAT_ROT3) {
        get_plane<2, D>(row, 0, codes);
        get_plane<1, D>(row + D / 4, 2, codes);
    } else {
        get_plane<FormatOf<FORMAT>::BITS, D>(row, 0, codes);
    }
}

/* Token t of a group. */
template <s32 FORMAT, s32 D>
KV_DEVICE void get_group_codes(const u8 *lines, s32 t, u32 (&codes)[D / 16]) {
    constexpr s32 bits = FormatOf<FORMAT>::BITS;
#pragma unroll
    for (s32 k = 0; k < D / 16; k++) {
        const s32 c = 16 * k + half_lane();
        const bool upper = FORMAT == KV_FORMAT_CHAN2 && c >= D / 2;
        const s32 column = upper ? c - D / 2 : c;
        const u32 byte = lines[column / 4 * 64 + t % 16 * 4 + column % 4];
        codes[k] = byte >> (t / 16 * bits + (upper ? 4 : 0)) & ((1u << bits) - 1);
    }
}

/* ---- levels ------------------------------------------------------------------------------------ */

KV_DEVICE float e4m3_to_f32(u32 code) {
    const u32 magnitude = (code & 0x7f) << 20;
    /* Below 2^-6 the code counts multiples of 2^-9, as the mantissa at 2^-6 does. */
    const float small = u32_as_float(magnitude + (121u << 23)) - 0.015625f;
    const float value = magnitude < 1u << 23 ? small : u32_as_float(magnitude + (120u << 23));
    return u32_as_float((code & 0x80) << 24 | float_as_u32(value));
}

template <s32 BITS> KV_DEVICE float level_of_table(u32 code) {
    constexpr u32 half = 1u << (BITS - 1);
    float level = 0;
#pragma unroll
    for (u32 i = 0; i < half; i++) {
        if (code == half + i)
            level = (float)table_level<BITS>((s32)i);
        if (code == half - 1 - i)
            level = (float)-table_level<BITS>((s32)i);
    }
    return level;
}

template <s32 FORMAT> KV_DEVICE float level_of_code(u32 code) {
    constexpr s32 bits = FormatOf<FORMAT>::BITS;
    if constexpr (FORMAT == KV_FORMAT_FP8_E4M3)
        return e4m3_to_f32(code);
    else if constexpr (HAS_MINIMUM<FORMAT>)
        return (float)code;
    else if constexpr (FORMAT == KV_FORMAT_ROT6)
        return (float)(2 * (s32)code - 63);
    else if constexpr (bits == 8)
        return (float)((s32)code - 128);
    else
        return level_of_table<bits>(code);
}

/* ---- rows -------------------------------------------------------------------------------------- */

template <s32 FORMAT, s32 D>
KV_DEVICE void scale_levels(const u16 *metadata, Channels channels, float (&x)[D / 16]) {
    if constexpr (IS_ROTATED<FORMAT>)
        rotate_row<D, 16>(x);
    const float scale = FORMAT == KV_FORMAT_INT8_STATIC ? 1 : bf16_to_f32(metadata[0]);
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        x[k] *= FORMAT == KV_FORMAT_INT8_STATIC ? channels.scales[16 * k + half_lane()] : scale;
    if constexpr (IS_ROTATED<FORMAT>)
        apply_signs<D>(x);
}

/* Minima, then steps: one for 32 elements of a row, or for each channel of a group. */
template <s32 FORMAT, s32 D> KV_DEVICE void scale_codes(const u16 *metadata, float (&x)[D / 16]) {
    constexpr s32 count = FORMAT == KV_FORMAT_INT4 ? D / 32 : D;
#pragma unroll
    for (s32 k = 0; k < D / 16; k++) {
        const s32 i = FORMAT == KV_FORMAT_INT4 ? k / 2 : 16 * k + half_lane();
        x[k] = bf16_to_f32(metadata[i]) + bf16_to_f32(metadata[count + i]) * x[k];
    }
}

/* x := a row, or token t of a group. */
template <s32 FORMAT, s32 D>
KV_DEVICE void decode_row(const u8 *codes, const u8 *metadata, s32 t, Channels channels,
                          float (&x)[D / 16]) {
    const u16 *numbers = reinterpret_cast<const u16 *>(metadata);
    u32 code[D / 16];
    if constexpr (IS_CHANNEL<FORMAT>)
        get_group_codes<FORMAT, D>(codes, t, code);
    else
        get_codes<FORMAT, D>(codes, code);
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        x[k] = level_of_code<FORMAT>(code[k]);
    if constexpr (HAS_MINIMUM<FORMAT>)
        scale_codes<FORMAT, D>(numbers, x);
    else
        scale_levels<FORMAT, D>(numbers, channels, x);
    if (channels.bias)
#pragma unroll
        for (s32 k = 0; k < D / 16; k++)
            x[k] += channels.bias[16 * k + half_lane()];
}

/* x := one slot and head of quantized blocks. */
template <s32 FORMAT, s32 D>
KV_DEVICE void decode_slot(const Blocks &blocks, s32 block, s32 head, s32 offset,
                           float (&x)[D / 16]) {
    constexpr s32 unit = IS_CHANNEL<FORMAT> ? GROUP_TOKENS : 1;
    const s32 first = offset / unit * unit;
    decode_row<FORMAT, D>(block_row(blocks, block, head, first),
                          block_metadata<FORMAT, D>(blocks, block, head, first), offset - first,
                          channels_of_head<D>(blocks, head), x);
}
