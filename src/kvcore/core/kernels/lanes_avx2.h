/* Eight lanes: AVX2 with FMA and F16C. */
#ifndef KVCORE_CORE_KERNELS_LANES_AVX2_H
#define KVCORE_CORE_KERNELS_LANES_AVX2_H

#include <immintrin.h>

#include "lanes.h"

#define KV_LANES 8
#define KV_ACCUMULATORS 8
#define KV_REGISTERS 16

typedef __m256 kv_vec;

KV_INLINE kv_vec kv_zero(void) { return _mm256_setzero_ps(); }

KV_INLINE kv_vec kv_broadcast(float x) { return _mm256_set1_ps(x); }

KV_INLINE kv_vec kv_load(const float *p) { return _mm256_loadu_ps(p); }

KV_INLINE void kv_store(float *p, kv_vec x) { _mm256_storeu_ps(p, x); }

KV_INLINE kv_vec kv_add(kv_vec a, kv_vec b) { return _mm256_add_ps(a, b); }

KV_INLINE kv_vec kv_sub(kv_vec a, kv_vec b) { return _mm256_sub_ps(a, b); }

KV_INLINE kv_vec kv_mul(kv_vec a, kv_vec b) { return _mm256_mul_ps(a, b); }

KV_INLINE kv_vec kv_div(kv_vec a, kv_vec b) { return _mm256_div_ps(a, b); }

KV_INLINE kv_vec kv_fma(kv_vec a, kv_vec b, kv_vec c) { return _mm256_fmadd_ps(a, b, c); }

KV_INLINE kv_vec kv_max(kv_vec a, kv_vec b) { return _mm256_max_ps(a, b); }

KV_INLINE float kv_first(kv_vec x) { return _mm256_cvtss_f32(x); }

KV_INLINE float kv_hsum(kv_vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

KV_INLINE float kv_hmax(kv_vec x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

/* Adds the 128-bit halves of a and b: [a, b]. */
KV_INLINE __m256 kv_fold_halves(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* In each 128 bits adds the 64-bit halves of a and b: [a, b]. */
KV_INLINE __m256 kv_fold_pairs(__m256 a, __m256 b) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}

/* In each 128 bits adds neighbours: [a0 + a1, a2 + a3, b0 + b1, b2 + b3]. */
KV_INLINE __m256 kv_fold_neighbours(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

KV_INLINE kv_vec kv_fold(const kv_vec *v) {
    __m256 x[4];
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        x[i] = kv_fold_halves(v[i], v[i + 4]);
    return kv_fold_neighbours(kv_fold_pairs(x[0], x[1]), kv_fold_pairs(x[2], x[3]));
}

KV_INLINE kv_vec kv_exchange(kv_vec x, int h) {
    return h == 1   ? _mm256_permute_ps(x, 0xb1)
           : h == 2 ? _mm256_permute_ps(x, 0x4e)
                    : _mm256_permute2f128_ps(x, x, 1);
}

KV_INLINE kv_vec kv_pow2(kv_vec z) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(z), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000)));
}

KV_INLINE kv_vec kv_keep_above(kv_vec x, float bound, kv_vec y) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_LT_OQ), y);
}

KV_INLINE kv_vec kv_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

KV_INLINE kv_vec kv_load_bf16(const uint16_t *p) {
    /* Both halves hold all of x, so that one shuffle within halves does all. */
    const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    const __m256i from = _mm256_set_epi32(0x0f0e8080, 0x0d0c8080, 0x0b0a8080, 0x09088080,
                                          0x07068080, 0x05048080, 0x03028080, 0x01008080);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(x, from));
}

KV_INLINE void kv_store_f16(uint16_t *p, kv_vec x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

KV_INLINE void kv_store_bf16(uint16_t *p, kv_vec x) {
    const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(rounded, quiet, is_nan);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(wide),
                                                    _mm256_extracti128_si256(wide, 1)));
}

KV_INLINE __m256i kv_widen_u8(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}

KV_INLINE kv_vec kv_load_u8(const uint8_t *p) { return _mm256_cvtepi32_ps(kv_widen_u8(p)); }

KV_INLINE void kv_store_u8(uint8_t *p, kv_vec x) {
    const __m256i lowest = _mm256_set1_epi32(0x0c080400);
    const __m256i four = _mm256_shuffle_epi8(_mm256_castps_si256(x), lowest);
    const __m128i low = _mm256_castsi256_si128(four), high = _mm256_extracti128_si256(four, 1);
    _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(low, high));
}

KV_INLINE kv_vec kv_look_up(const float *table, const uint8_t *p) {
    const __m256i from = kv_widen_u8(p);
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), from);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), from);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(from, 28)));
}

KV_INLINE void kv_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

#include "lanes_partial.h"

KV_NOTHING_SWAPPED

#endif
