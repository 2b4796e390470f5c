/* Rows of floats, each the work of 16 lanes, two of a warp.
 *
 * In registers lane l of the 16 has elements l, l + 16, ... as x[0], x[1], ...: what the sums of
 * docs/formats.md ask for, and the planes, where byte l of a unit holds just such elements. Memory
 * is read and written by 16 bytes; on the way a row passes through shared memory, its stage.
 */
#pragma once
#include "device.cuh"
#include "rotation.cuh"
#include "storage.cuh"

KV_DEVICE s32 half_lane() { return (s32)lane_id() & 15; }

/* ---- conversions, with NaN as the CPU has it: quiet, the upper bits of its payload kept -------- */

KV_DEVICE float widen_f16(u16 h) {
    if ((h & 0x7fff) <= 0x7c00)
        return f16_to_f32(h);
    return u32_as_float((u32)(h & 0x8000) << 16 | 0x7fc00000u | (u32)(h & 0x3ff) << 13);
}

KV_DEVICE u16 narrow_f16(float x) {
    const u32 bits = float_as_u32(x);
    if ((bits & 0x7fffffffu) <= 0x7f800000u)
        return f32_to_f16(x);
    return (u16)((bits >> 16 & 0x8000) | 0x7e00 | (bits >> 13 & 0x3ff));
}

KV_DEVICE u16 narrow_bf16(float x) {
    const u32 bits = float_as_u32(x);
    if ((bits & 0x7fffffffu) <= 0x7f800000u)
        return f32_to_bf16(x);
    return (u16)(bits >> 16 | 0x40);
}

template <s32 DTYPE> KV_DEVICE float load_element(const void *row, s32 i) {
    if constexpr (DTYPE == DTYPE_F32)
        return static_cast<const float *>(row)[i];
    const u16 half = static_cast<const u16 *>(row)[i];
    return DTYPE == DTYPE_F16 ? widen_f16(half) : bf16_to_f32(half);
}

template <s32 DTYPE> KV_DEVICE void store_element(void *row, s32 i, float x) {
    if constexpr (DTYPE == DTYPE_F32)
        static_cast<float *>(row)[i] = x;
    else
        static_cast<u16 *>(row)[i] = DTYPE == DTYPE_F16 ? narrow_f16(x) : narrow_bf16(x);
}

/* ---- bytes, by 16 lanes ------------------------------------------------------------------------ */

/* The largest access that addresses which are multiples of `bytes` are aligned to. */
KV_DEVICE constexpr s32 access_size(s32 bytes) {
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
}

template <s32 ACCESS> struct AccessOf;
template <> struct AccessOf<16> {
    using Type = uint4;
};
template <> struct AccessOf<8> {
    using Type = uint2;
};
template <> struct AccessOf<4> {
    using Type = u32;
};
template <> struct AccessOf<2> {
    using Type = u16;
};

/* BYTES bytes, both sides aligned to multiples of ACCESS. */
template <s32 BYTES, s32 ACCESS> KV_DEVICE void copy_bytes(void *to, const void *from) {
    using Type = typename AccessOf<ACCESS>::Type;
#pragma unroll
    for (s32 i = half_lane(); i < BYTES / ACCESS; i += 16)
        static_cast<Type *>(to)[i] = static_cast<const Type *>(from)[i];
}

/* ---- rows in registers ------------------------------------------------------------------------- */

/* Shared memory of a row. The rows of two halves of a warp start 16 banks apart. */
template <s32 D> constexpr s32 STAGE_BYTES = D % 32 ? 4 * D : 4 * D + 64;

/* Elements of a row that is not shared with other lanes, or only read. */
template <s32 D, s32 DTYPE> KV_DEVICE void load_elements(const void *row, float (&x)[D / 16]) {
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        x[k] = load_element<DTYPE>(row, 16 * k + half_lane());
}

template <s32 D, s32 DTYPE> KV_DEVICE void store_elements(const float (&x)[D / 16], void *row) {
#pragma unroll
    for (s32 k = 0; k < D / 16; k++)
        store_element<DTYPE>(row, 16 * k + half_lane(), x[k]);
}

/* x_k := x_k * the sign of its element */
template <s32 D> KV_DEVICE void apply_signs(float (&x)[D / 16]) {
#pragma unroll
    for (s32 k = 0; k < D / 16; k++) {
        const u32 signs = rotation_signs(k / 2) << (31 - (16 * (k % 2) + half_lane()));
        x[k] = with_sign(x[k], signs & 0x80000000u);
    }
}

/* x := the row at `from` */
template <s32 D>
KV_DEVICE void load_row(const void *from, s32 dtype, u8 *stage, float (&x)[D / 16]) {
    if (dtype == DTYPE_F32)
        copy_bytes<4 * D, 16>(stage, from);
    else
        copy_bytes<2 * D, 16>(stage, from);
    sync_warp();
    if (dtype == DTYPE_F32)
        load_elements<D, DTYPE_F32>(stage, x);
    else if (dtype == DTYPE_F16)
        load_elements<D, DTYPE_F16>(stage, x);
    else
        load_elements<D, DTYPE_BF16>(stage, x);
    sync_warp();
}

/* The row at `to` := x, in float32 or rounded once. */
template <s32 D>
KV_DEVICE void store_row(const float (&x)[D / 16], s32 dtype, u8 *stage, void *to, bool pred) {
    if (dtype == DTYPE_F32)
        store_elements<D, DTYPE_F32>(x, stage);
    else if (dtype == DTYPE_F16)
        store_elements<D, DTYPE_F16>(x, stage);
    else
        store_elements<D, DTYPE_BF16>(x, stage);
    sync_warp();
    if (pred && dtype == DTYPE_F32)
        copy_bytes<4 * D, 16>(to, stage);
    else if (pred)
        copy_bytes<2 * D, 16>(to, stage);
    sync_warp();
}

/* ---- rows of float formats, of any length that is a multiple of 8 ------------------------------ */

template <s32 DTYPE> KV_DEVICE void load_eight(const void *from, float (&x)[8]) {
    const uint4 *source = static_cast<const uint4 *>(from);
    const uint4 a = source[0];
    if constexpr (DTYPE == DTYPE_F32) {
        const uint4 b = source[1];
        const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (s32 i = 0; i < 8; i++)
            x[i] = u32_as_float(words[i]);
    } else {
        const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (s32 i = 0; i < 8; i++) {
            const u16 half = (u16)(words[i / 2] >> i % 2 * 16);
            x[i] = DTYPE == DTYPE_F16 ? widen_f16(half) : bf16_to_f32(half);
        }
    }
}

template <s32 DTYPE> KV_DEVICE void store_eight(const float (&x)[8], void *to) {
    uint4 *target = static_cast<uint4 *>(to);
    u32 words[8] = {};
#pragma unroll
    for (s32 i = 0; i < 8; i++)
        if constexpr (DTYPE == DTYPE_F32)
            words[i] = float_as_u32(x[i]);
        else
            words[i / 2] |= (u32)(DTYPE == DTYPE_F16 ? narrow_f16(x[i]) : narrow_bf16(x[i]))
                            << i % 2 * 16;
    target[0] = {words[0], words[1], words[2], words[3]};
    if constexpr (DTYPE == DTYPE_F32)
        target[1] = {words[4], words[5], words[6], words[7]};
}

/* By 16 lanes. Equal dtypes are copied, so that a NaN keeps its bits. */
template <s32 D, s32 FROM, s32 TO> KV_DEVICE void convert_row(const u8 *from, u8 *to) {
    if constexpr (FROM == TO) {
        copy_bytes<D * dtype_bytes(TO), 16>(to, from);
    } else {
        for (s32 i = half_lane(); i < D / 8; i += 16) {
            float x[8];
            load_eight<FROM>(from + 8 * i * dtype_bytes(FROM), x);
            store_eight<TO>(x, to + 8 * i * dtype_bytes(TO));
        }
    }
}

template <s32 D, s32 TO> KV_DEVICE void convert_row_to(const u8 *from, s32 from_dtype, u8 *to) {
    if (from_dtype == DTYPE_F32)
        convert_row<D, DTYPE_F32, TO>(from, to);
    else if (from_dtype == DTYPE_F16)
        convert_row<D, DTYPE_F16, TO>(from, to);
    else
        convert_row<D, DTYPE_BF16, TO>(from, to);
}

template <s32 D, s32 FROM> KV_DEVICE void convert_row_from(const u8 *from, u8 *to, s32 to_dtype) {
    if (to_dtype == DTYPE_F32)
        convert_row<D, FROM, DTYPE_F32>(from, to);
    else if (to_dtype == DTYPE_F16)
        convert_row<D, FROM, DTYPE_F16>(from, to);
    else
        convert_row<D, FROM, DTYPE_BF16>(from, to);
}
