/* Tiles of 16-bit numbers in shared memory: where their chunks lie, and fragments of m16n8k16.
 *
 * A row is CHUNKS chunks of 16 bytes. Eight rows at one chunk, as ldmatrix reads them, and the
 * chunks of one row, as copies write them, lie in different banks: chunks are xor-ed with the row's
 * number where a row is a multiple of 128 bytes, and rows are an odd number of chunks apart where
 * it is not.
 */
#pragma once
#include "device.cuh"

template <s32 CHUNKS> constexpr s32 TILE_PITCH = CHUNKS % 8 == 0 ? CHUNKS : CHUNKS | 1;
template <s32 CHUNKS, s32 ROWS> constexpr s32 TILE_BYTES = 16 * ROWS * TILE_PITCH<CHUNKS>;

/* Rows of 16-bit numbers in whole k-steps of an mma; what lies beyond head_dim is to be zero. */
template <s32 DIM> constexpr s32 ROW_CHUNKS = (DIM + 15) / 16 * 2;

/* Where a chunk lies in its tile. */
template <s32 CHUNKS> KV_DEVICE s32 chunk_offset(s32 row, s32 column) {
    const s32 at = CHUNKS % 8 == 0 ? column ^ (row & 7) : column;
    return 16 * (row * TILE_PITCH<CHUNKS> + at);
}
template <s32 CHUNKS> KV_DEVICE u8 *chunk_of(u8 *tile, s32 row, s32 column) {
    return tile + chunk_offset<CHUNKS>(row, column);
}
/* Chunk 2 k + odd, so put that all but two bits of k are an offset that instructions hold. */
template <s32 CHUNKS> KV_DEVICE u8 *chunk_of_step(u8 *tile, s32 row, s32 k, s32 odd) {
    const s32 at = CHUNKS % 8 == 0 ? (2 * k & 6 ^ (odd ^ (row & 7))) + (2 * k & ~7) : 2 * k + odd;
    return tile + 16 * (row * TILE_PITCH<CHUNKS> + at);
}

/* ---- fragments of a warp's lanes */

/* Rows `row` to `row` + 15 of a as the first operand, elements 16 k to 16 k + 15. */
template <s32 CHUNKS>
KV_DEVICE void load_rows_fragment(u32 (&a)[4], u8 *tile, s32 row, s32 k, s32 lane = lane_id()) {
    const s32 matrix = lane >> 3;
    ldmatrix_x4(a,
                chunk_of_step<CHUNKS>(tile, row + (lane & 7) + (matrix & 1) * 8, k, (matrix >> 1)));
}

/* Of keys `key` to `key` + 15, elements 16 k to 16 k + 15 as the second operand of a product over
 * elements: b[0 .. 1] for the first eight keys, b[2 .. 3] for the others. */
template <s32 CHUNKS>
KV_DEVICE void load_keys_fragment(u32 (&b)[4], u8 *tile, s32 key, s32 k, s32 lane = lane_id()) {
    const s32 matrix = lane >> 3;
    ldmatrix_x4(b,
                chunk_of_step<CHUNKS>(tile, key + (lane & 7) + (matrix >> 1) * 8, k, (matrix & 1)));
}

/* Of values `key` to `key` + 15, elements 16 n to 16 n + 15 as the second operand of a product over
 * keys: b[0 .. 1] for the first eight elements, b[2 .. 3] for the others. */
template <s32 CHUNKS>
KV_DEVICE void load_values_fragment(u32 (&b)[4], u8 *tile, s32 key, s32 n, s32 lane = lane_id()) {
    const s32 matrix = lane >> 3;
    ldmatrix_x4_trans(
        b, chunk_of_step<CHUNKS>(tile, key + (lane & 7) + (matrix & 1) * 8, n, (matrix >> 1)));
}

template <bool IS_BF16> KV_DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (IS_BF16)
        mma_bf16(c, a, b0, b1);
    else
        mma_f16(c, a, b0, b1);
}

template <bool IS_BF16> KV_DEVICE u32 pack(float low, float high) {
    return IS_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

template <bool IS_BF16> KV_DEVICE float unpack(u16 bits) {
    return IS_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

/* The power of two that brings a magnitude into [2^13, 2^14), which float16 holds with room above. */
KV_DEVICE float power_for_f16(float magnitude) {
    const s32 exponent = min(max((s32)(float_as_u32(magnitude) >> 23), 14), 253);
    return u32_as_float((u32)(267 - exponent) << 23);
}

/* 1 / x for what it gives: 2^e is a normal number, and its inverse too. */
KV_DEVICE float inverse_of_power(float x) { return u32_as_float((254u << 23) - float_as_u32(x)); }
