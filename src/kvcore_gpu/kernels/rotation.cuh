/* The transform of rot8 to rot2 (docs/formats.md): H, in blocks of the largest power of two that
 * divides the row, and signs. H is its own inverse but for a factor that stored scales hold.
 */
#pragma once
#include "device.cuh"

template <s32 DIM> constexpr s32 ROTATION_BLOCK = DIM & -DIM;

/* Bit 63 of output i of splitmix64, whose seed spells "kvcore", moved to a float's sign. */
KV_DEVICE constexpr u32 rotation_sign(s32 i) {
    u64 z = 0x6b76636f7265ull + (u64)(i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (u32)((z ^ (z >> 31)) >> 32) & 0x80000000u;
}
struct SignWords {
    u32 word[32];
};
KV_DEVICE constexpr SignWords make_sign_words() {
    SignWords signs = {};
    for (s32 i = 0; i < 1024; i++)
        signs.word[i / 32] |= rotation_sign(i) >> 31 << i % 32;
    return signs;
}
/* The signs of elements 32 i to 32 i + 31 as bits; the compiler is to know i. */
KV_DEVICE constexpr u32 rotation_signs(s32 i) {
    constexpr SignWords signs = make_sign_words();
    return signs.word[i];
}
/* That of element 32 i + lane. */
KV_DEVICE u32 rotation_sign_of_lane(s32 i) {
    return rotation_signs(i) << (31 - lane_id()) & 0x80000000u;
}
KV_DEVICE float with_sign(float x, u32 sign) { return u32_as_float(float_as_u32(x) ^ sign); }

/* (a, b) := (a + b, a - b) */
KV_DEVICE void butterfly(float &a, float &b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
}
/* The same where a lane has one of the two, b if bit `stride` of its number is set. A product with
 * 1 or -1 is exact, so that the fused sum is the sum. */
KV_DEVICE void butterfly_of_lanes(float &x, s32 stride) {
    x = fmaf(lane_id() & stride ? -1.0f : 1.0f, x, shfl_xor(x, stride));
}

/* Of a row of which lane l of LANES has elements l, l + LANES, ...: x := H(x). Strides go up, as
 * encoding has them. */
template <s32 DIM, s32 LANES = 32, s32 N> KV_DEVICE void rotate_row(float (&x)[N]) {
#pragma unroll
    for (s32 stride = 1; stride < LANES && stride < ROTATION_BLOCK<DIM>; stride *= 2)
#pragma unroll
        for (s32 i = 0; i < N; i++)
            butterfly_of_lanes(x[i], stride);
#pragma unroll
    for (s32 stride = LANES; stride < ROTATION_BLOCK<DIM>; stride *= 2)
#pragma unroll
        for (s32 i = 0; i < N; i++)
            if (!(i & (stride / LANES)) && i + stride / LANES < N)
                butterfly(x[i], x[i + stride / LANES]);
}
