/* Sixteen lanes: AVX-512 F, BW, DQ and VL. */
#ifndef KVCORE_CORE_KERNELS_LANES_AVX512_H
#define KVCORE_CORE_KERNELS_LANES_AVX512_H

#include <immintrin.h>

#include "lanes.h"

#define KV_LANES 16
#define KV_ACCUMULATORS 16
#define KV_REGISTERS 32

typedef __m512 kv_vec;

KV_INLINE __mmask16 kv_lane_mask(int n) { return (__mmask16)((1u << n) - 1); }

KV_INLINE kv_vec kv_zero(void) { return _mm512_setzero_ps(); }

KV_INLINE kv_vec kv_broadcast(float x) { return _mm512_set1_ps(x); }

KV_INLINE kv_vec kv_load(const float *p) { return _mm512_loadu_ps(p); }

KV_INLINE kv_vec kv_load_partial(const float *p, int n) {
    return _mm512_maskz_loadu_ps(kv_lane_mask(n), p);
}

KV_INLINE void kv_store(float *p, kv_vec x) { _mm512_storeu_ps(p, x); }

KV_INLINE void kv_store_partial(float *p, kv_vec x, int n) {
    _mm512_mask_storeu_ps(p, kv_lane_mask(n), x);
}

KV_INLINE kv_vec kv_add(kv_vec a, kv_vec b) { return _mm512_add_ps(a, b); }

KV_INLINE kv_vec kv_sub(kv_vec a, kv_vec b) { return _mm512_sub_ps(a, b); }

KV_INLINE kv_vec kv_mul(kv_vec a, kv_vec b) { return _mm512_mul_ps(a, b); }

KV_INLINE kv_vec kv_div(kv_vec a, kv_vec b) { return _mm512_div_ps(a, b); }

KV_INLINE kv_vec kv_fma(kv_vec a, kv_vec b, kv_vec c) { return _mm512_fmadd_ps(a, b, c); }

KV_INLINE kv_vec kv_max(kv_vec a, kv_vec b) { return _mm512_max_ps(a, b); }

KV_INLINE float kv_first(kv_vec x) { return _mm512_cvtss_f32(x); }

KV_INLINE float kv_hsum(kv_vec x) {
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}

KV_INLINE float kv_hmax(kv_vec x) { return _mm512_reduce_max_ps(x); }

/* Adds the 256-bit halves of a and b: [a, b]. */
KV_INLINE __m512 kv_fold_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

/* In each 256 bits adds the 128-bit halves: [a low, a high, b low, b high]. */
KV_INLINE __m512 kv_fold_quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* In each 128 bits adds the 64-bit halves of a and b: [a, b]. */
KV_INLINE __m512 kv_fold_pairs(__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

/* In each 128 bits adds neighbours: [a0 + a1, a2 + a3, b0 + b1, b2 + b3]. */
KV_INLINE __m512 kv_fold_neighbours(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

KV_INLINE kv_vec kv_fold(const kv_vec *v) {
    __m512 x[4];
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        x[i] =
            kv_fold_quarters(kv_fold_halves(v[i], v[i + 4]), kv_fold_halves(v[i + 8], v[i + 12]));
    return kv_fold_neighbours(kv_fold_pairs(x[0], x[1]), kv_fold_pairs(x[2], x[3]));
}

KV_INLINE kv_vec kv_fold_swapped(const kv_vec *v) {
    __m512 x[4];
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        x[i] = kv_fold_quarters(kv_fold_quarters(v[i], v[i + 4]),
                                kv_fold_quarters(v[i + 8], v[i + 12]));
    return kv_fold_neighbours(kv_fold_pairs(x[0], x[1]), kv_fold_pairs(x[2], x[3]));
}

KV_INLINE kv_vec kv_exchange(kv_vec x, int h) {
    return h == 1   ? _mm512_permute_ps(x, 0xb1)
           : h == 2 ? _mm512_permute_ps(x, 0x4e)
           : h == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1)
                    : _mm512_shuffle_f32x4(x, x, 0x4e);
}

KV_INLINE kv_vec kv_pow2(kv_vec z) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(z), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000)));
}

KV_INLINE kv_vec kv_keep_above(kv_vec x, float bound, kv_vec y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_NLT_UQ), y);
}

KV_INLINE kv_vec kv_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

KV_INLINE kv_vec kv_load_f16_partial(const uint16_t *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(kv_lane_mask(n), p));
}

KV_INLINE kv_vec kv_widen_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

KV_INLINE kv_vec kv_load_bf16(const uint16_t *p) {
    return kv_widen_bf16(_mm256_loadu_si256((const __m256i *)p));
}

KV_INLINE kv_vec kv_load_bf16_partial(const uint16_t *p, int n) {
    return kv_widen_bf16(_mm256_maskz_loadu_epi16(kv_lane_mask(n), p));
}

KV_INLINE kv_vec kv_swap_middle(kv_vec x) { return _mm512_shuffle_f32x4(x, x, 0xd8); }

KV_INLINE kv_vec kv_load_bf16_swapped(const uint16_t *p) {
    /* All halves hold all of x. Quarters 0 and 2 take the elements of its first half, 1 and 3 those
     * of its second, so that one shuffle within quarters does all. */
    const __m512i x = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
    const __m512i from =
        _mm512_set_epi32(0x0f0e8080, 0x0d0c8080, 0x0b0a8080, 0x09088080, 0x0f0e8080, 0x0d0c8080,
                         0x0b0a8080, 0x09088080, 0x07068080, 0x05048080, 0x03028080, 0x01008080,
                         0x07068080, 0x05048080, 0x03028080, 0x01008080);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(x, from));
}

KV_INLINE void kv_store_f16(uint16_t *p, kv_vec x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

KV_INLINE void kv_store_f16_partial(uint16_t *p, kv_vec x, int n) {
    _mm256_mask_storeu_epi16(p, kv_lane_mask(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

/* Not AVX512_BF16's conversion, which flushes denormals. */
KV_INLINE __m256i kv_narrow_bf16(kv_vec x) {
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40)));
}

KV_INLINE void kv_store_bf16(uint16_t *p, kv_vec x) {
    _mm256_storeu_si256((__m256i *)p, kv_narrow_bf16(x));
}

KV_INLINE void kv_store_bf16_partial(uint16_t *p, kv_vec x, int n) {
    _mm256_mask_storeu_epi16(p, kv_lane_mask(n), kv_narrow_bf16(x));
}

KV_INLINE __m512i kv_widen_u8(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}

KV_INLINE kv_vec kv_load_u8(const uint8_t *p) { return _mm512_cvtepi32_ps(kv_widen_u8(p)); }

KV_INLINE void kv_store_u8(uint8_t *p, kv_vec x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_castps_si512(x)));
}

KV_INLINE kv_vec kv_look_up(const float *table, const uint8_t *p) {
    return _mm512_permutexvar_ps(kv_widen_u8(p), _mm512_loadu_ps(table));
}

KV_INLINE void kv_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

#endif
