/* Bytes for lanes_avx512.h: AVX-512 VNNI and VBMI. What int8_kernel.h asks of a set of lanes.
 *
 *   kv_bytes              64 bytes: four quarters of 16
 *   kv_load_units         16 bytes from each of four places, one a quarter
 *   kv_load_half_units    8 bytes from each; the upper half of a quarter is the lower one shifted
 *                         right by one bit
 *   kv_to_columns(x, y)   x[i] holds tokens i, i + 4, i + 8 and i + 12, a quarter each; y[c] bytes
 *                         4 c to 4 c + 3 of all 16 tokens in order
 *   kv_to_quads           [4 tokens][16 bytes] to [16 bytes][4 tokens]
 *   kv_field              bits of every byte
 *   kv_look_up_bytes      entries of a table of 16 bytes
 *   kv_dot_int8(a, x, y)       a + the sums of four neighbouring products of unsigned x and signed y */
#ifndef KVCORE_CORE_KERNELS_LANES_AVX512_VNNI_H
#define KVCORE_CORE_KERNELS_LANES_AVX512_VNNI_H

#include "lanes_avx512.h"

#define KV_HAS_DOT_INT8 1

typedef __m512i kv_bytes;

KV_INLINE kv_bytes kv_load_bytes(const void *p) { return _mm512_loadu_si512(p); }

KV_INLINE void kv_store_bytes(void *p, kv_bytes x) { _mm512_storeu_si512(p, x); }

KV_INLINE kv_bytes kv_broadcast_four(const void *p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return _mm512_set1_epi32(x);
}

KV_INLINE kv_bytes kv_load_units(const char *p, int64_t stride) {
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    x = _mm512_mask_broadcast_i32x4(x, 0x00f0, _mm_loadu_si128((const __m128i *)(p + stride)));
    x = _mm512_mask_broadcast_i32x4(x, 0x0f00, _mm_loadu_si128((const __m128i *)(p + 2 * stride)));
    return _mm512_mask_broadcast_i32x4(x, 0xf000,
                                       _mm_loadu_si128((const __m128i *)(p + 3 * stride)));
}

KV_INLINE kv_bytes kv_load_half_units(const char *p, int64_t stride) {
    int64_t x[4];
    for (int i = 0; i < 4; i++)
        memcpy(&x[i], p + i * stride, sizeof(x[i]));
    const __m512i y = _mm512_set_epi64(x[3], x[3], x[2], x[2], x[1], x[1], x[0], x[0]);
    return _mm512_mask_srli_epi64(y, 0xaa, y, 1);
}

KV_INLINE void kv_to_columns(const kv_bytes *x, kv_bytes *y) {
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    y[0] = _mm512_unpacklo_epi64(a, c);
    y[1] = _mm512_unpackhi_epi64(a, c);
    y[2] = _mm512_unpacklo_epi64(b, d);
    y[3] = _mm512_unpackhi_epi64(b, d);
}

KV_INLINE kv_bytes kv_to_quads(kv_bytes x) {
    const __m512i from =
        _mm512_set_epi32(0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a,
                         0x39291909, 0x38281808, 0x37271707, 0x36261606, 0x35251505, 0x34241404,
                         0x33231303, 0x32221202, 0x31211101, 0x30201000);
    return _mm512_permutexvar_epi8(from, x);
}

KV_INLINE kv_bytes kv_field(kv_bytes x, int shift, int bits) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    return _mm512_and_si512(shift ? _mm512_srli_epi16(x, (unsigned)shift) : x, mask);
}

KV_INLINE kv_bytes kv_xor_bytes(kv_bytes x, int y) {
    return _mm512_xor_si512(x, _mm512_set1_epi8((char)y));
}

/* table[x] + zero, for a table of 16 and a zero of 0 or 128 */
KV_INLINE kv_bytes kv_look_up_bytes(const int8_t *table, int zero, kv_bytes x) {
    const __m512i y = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return _mm512_shuffle_epi8(kv_xor_bytes(y, zero), x);
}

KV_INLINE kv_bytes kv_add_bytes(kv_bytes x, int y) {
    return _mm512_add_epi8(x, _mm512_set1_epi8((char)y));
}

/* x | y << shift, where no bit leaves its byte */
KV_INLINE kv_bytes kv_or_shifted(kv_bytes x, kv_bytes y, int shift) {
    return _mm512_or_si512(x, _mm512_slli_epi16(y, (unsigned)shift));
}

/* Not the intrinsic: with that, GCC 12 moves every sum to another register and back. */
KV_INLINE kv_bytes kv_dot_int8(kv_bytes sum, kv_bytes x, kv_bytes y) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
    return sum;
}

KV_INLINE kv_bytes kv_zero_bytes(void) { return _mm512_setzero_si512(); }

/* As 32-bit numbers: low + 256 * high */
KV_INLINE kv_bytes kv_join_planes(kv_bytes low, kv_bytes high) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

KV_INLINE kv_bytes kv_add_whole(kv_bytes x, kv_bytes y) { return _mm512_add_epi32(x, y); }

KV_INLINE int32_t kv_sum_whole(kv_bytes x) { return _mm512_reduce_add_epi32(x); }

KV_INLINE kv_bytes kv_broadcast_whole(int32_t x) { return _mm512_set1_epi32(x); }

KV_INLINE kv_bytes kv_to_whole(kv_vec x) { return _mm512_cvtps_epi32(x); }

KV_INLINE kv_vec kv_from_whole(kv_bytes x) { return _mm512_cvtepi32_ps(x); }

/* The bytes 0 of 16 whole numbers in the lower 16 bytes, their bytes 1 in the next. */
KV_INLINE __m256i kv_two_planes(kv_bytes x) {
    const __m256i from = _mm256_set_epi32(0x3d393531, 0x2d292521, 0x1d191511, 0x0d090501,
                                          0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi8(_mm512_castsi256_si512(from), x));
}

/* Numbers of 16 bits x = 256 * high + low, low from -128 to 127: 16 low bytes, then 16 high ones. */
KV_INLINE void kv_store_signed_planes(int8_t *planes, kv_bytes x) {
    const __m256i halves = kv_two_planes(_mm512_add_epi32(x, _mm512_set1_epi32(128)));
    const __m256i signs =
        _mm256_set_epi64x(0, 0, (int64_t)0x8080808080808080, (int64_t)0x8080808080808080);
    _mm256_storeu_si256((__m256i *)planes, _mm256_xor_si256(halves, signs));
}

/* The same, low from 0 to 255. */
KV_INLINE void kv_store_unsigned_planes(uint8_t *low, uint8_t *high, kv_bytes x) {
    const __m256i halves = kv_two_planes(x);
    _mm_storeu_si128((__m128i *)low, _mm256_castsi256_si128(halves));
    _mm_storeu_si128((__m128i *)high, _mm256_extracti128_si256(halves, 1));
}

#endif
