/* A row of q on its way to the keys, by one warp: lane l has elements l, l + 32, ... of it. */
#pragma once
#include "formats.cuh"
#include "rotation.cuh"
#include "sight.cuh"
#include "tiles.cuh"

template <s32 DIM, s32 N>
KV_DEVICE void load_query_row(const AttendParams &p, s64 at, float (&x)[N]) {
    const float *floats = static_cast<const float *>(p.q.data) + at;
    const u16 *halves = static_cast<const u16 *>(p.q.data) + at;
    if (p.q.dtype == DTYPE_F32) {
#pragma unroll
        for (s32 i = 0; i < N; i++) {
            const s32 d = 32 * i + lane_id();
            x[i] = d < DIM ? floats[d] : 0.0f;
        }
    } else {
#pragma unroll
        for (s32 i = 0; i < N; i++) {
            const s32 d = 32 * i + lane_id();
            const u16 half = d < DIM ? halves[d] : 0;
            const float f16 = f16_to_f32(half), bf16 = bf16_to_f32(half);
            x[i] = p.q.dtype == DTYPE_F16 ? f16 : bf16;
        }
    }
}

/* What encoded keys' levels are multiplied with. */
template <s32 FORMAT, s32 DIM, s32 N>
KV_DEVICE void transform_query_row(const AttendParams &p, s32 head, float (&x)[N]) {
#pragma unroll
    for (s32 i = 0; i < N; i++) {
        const s32 d = 32 * i + lane_id();
        if (FORMAT == KV_FORMAT_INT8_STATIC && d < DIM)
            x[i] *= p.k.scales[head * DIM + d];
        if (IS_ROTATED<FORMAT>)
            x[i] = with_sign(x[i], rotation_sign_of_lane(i));
    }
    if constexpr (IS_ROTATED<FORMAT>)
        rotate_row<DIM>(x);
}

/* q . bias, 0 without one. */
template <s32 DIM, s32 N>
KV_DEVICE float bias_of_row(const AttendParams &p, s32 head, const float (&x)[N]) {
    if (!p.k.bias)
        return 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (s32 i = 0; i < N; i++) {
        const s32 d = 32 * i + lane_id();
        if (d < DIM)
            sum = fmaf(x[i], p.k.bias[head * DIM + d], sum);
    }
    return reduce_add(sum);
}

/* Times a power of two that float16 wants; returns its inverse. */
template <s32 N> KV_DEVICE float scale_row(float (&x)[N]) {
    float largest = 0.0f;
#pragma unroll
    for (s32 i = 0; i < N; i++)
        largest = fmaxf(largest, fabsf(x[i]));
    const float power = power_for_f16(reduce_max(largest));
#pragma unroll
    for (s32 i = 0; i < N; i++)
        x[i] *= power;
    return inverse_of_power(power);
}

/* Rounds a row to bfloat16 or float16, and what that leaves again for a second part; the parts' tiles
 * lie part_bytes apart. */
template <bool BF16, s32 PARTS_OF_ROW, s32 CHUNKS, s32 N>
KV_DEVICE void store_query_row(u8 *tile, s32 part_bytes, s32 row, float (&x)[N]) {
#pragma unroll
    for (s32 part = 0; part < PARTS_OF_ROW; part++)
#pragma unroll
        for (s32 i = 0; i < N; i++) {
            const s32 d = 32 * i + lane_id();
            const u16 bits = BF16 ? f32_to_bf16(x[i]) : f32_to_f16(x[i]);
            u8 *chunk = chunk_of<CHUNKS>(tile + part * part_bytes, row, d / 8);
            if (d < 8 * CHUNKS)
                reinterpret_cast<u16 *>(chunk)[d % 8] = bits;
            x[i] -= unpack<BF16>(bits);
        }
}
