/* Infinities and NaN among values that some rows take and others do not: a weight of 0 does not keep
 * them out of a product. The rows that take them get them added, and zeros come into their place. */
#pragma once
#include "tiles.cuh"

/* The upper bit of each half that is a NaN or an infinity. */
template <bool IS_BF16> KV_DEVICE u32 not_finite_halves(u32 pair) {
    constexpr u32 exponents = IS_BF16 ? 0x7f807f80u : 0x7c007c00u;
    constexpr u32 lowest = IS_BF16 ? 0x00800080u : 0x04000400u;
    return ((pair & exponents) + lowest) & 0x80008000u;
}
template <bool IS_BF16> KV_DEVICE u32 not_finite_halves(const uint4 &chunk) {
    return not_finite_halves<IS_BF16>(chunk.x) | not_finite_halves<IS_BF16>(chunk.y) |
           not_finite_halves<IS_BF16>(chunk.z) | not_finite_halves<IS_BF16>(chunk.w);
}

/* Zero for each of the two that is one. */
template <bool IS_BF16> KV_DEVICE u32 finite_pair(u32 pair) {
    const u32 halves = not_finite_halves<IS_BF16>(pair);
    return pair & ((halves & 0x8000u ? 0u : 0xffffu) | (halves >> 16 ? 0u : 0xffff0000u));
}

/* Those of a pair, elements 8 column + 2 (lane % 4) + 0 .. 1 of a value, to the sums of rows lane / 4
 * and lane / 4 + 8 whose bits are set. What there is none of is -0.0, which changes no sum. */
template <bool IS_BF16, s32 N>
KV_DEVICE void add_pair(float (&o)[N][4], s32 column, u32 pair, u32 rows) {
    const u32 halves = not_finite_halves<IS_BF16>(pair), own = rows >> (lane_id() >> 2);
    const float low = halves & 0x8000u ? unpack<IS_BF16>((u16)pair) : -0.0f;
    const float high = halves >> 16 ? unpack<IS_BF16>((u16)(pair >> 16)) : -0.0f;
    const float x[4] = {own & 1 ? low : -0.0f, own & 1 ? high : -0.0f, own >> 8 & 1 ? low : -0.0f,
                        own >> 8 & 1 ? high : -0.0f};
#pragma unroll
    for (s32 n = 0; n < N; n++)
        if (n == column) {
#pragma unroll
            for (s32 i = 0; i < 4; i++)
                o[n][i] += x[i];
        }
}
