/* Portable lanes: four floats in plain C. The vector type is the compiler's own, so that any
 * target runs it; conversions are integer code. There is no fma: a product is rounded. */
#ifndef KVCORE_CORE_KERNELS_LANES_SCALAR_H
#define KVCORE_CORE_KERNELS_LANES_SCALAR_H

#include "lanes.h"

#define KV_LANES 4
#define KV_ACCUMULATORS 8
#define KV_REGISTERS 16

typedef float kv_vec __attribute__((vector_size(16)));
typedef uint32_t kv_bits __attribute__((vector_size(16)));

KV_INLINE kv_vec kv_zero(void) { return (kv_vec){0, 0, 0, 0}; }

KV_INLINE kv_vec kv_broadcast(float x) { return (kv_vec){x, x, x, x}; }

KV_INLINE kv_vec kv_load(const float *p) {
    kv_vec x;
    memcpy(&x, p, sizeof(x));
    return x;
}

KV_INLINE void kv_store(float *p, kv_vec x) { memcpy(p, &x, sizeof(x)); }

KV_INLINE kv_vec kv_add(kv_vec a, kv_vec b) { return a + b; }

KV_INLINE kv_vec kv_sub(kv_vec a, kv_vec b) { return a - b; }

KV_INLINE kv_vec kv_mul(kv_vec a, kv_vec b) { return a * b; }

KV_INLINE kv_vec kv_div(kv_vec a, kv_vec b) { return a / b; }

KV_INLINE kv_vec kv_fma(kv_vec a, kv_vec b, kv_vec c) { return a * b + c; }

KV_INLINE kv_vec kv_max(kv_vec a, kv_vec b) {
    const kv_bits greater = (kv_bits)(a > b);
    return (kv_vec)((greater & (kv_bits)a) | (~greater & (kv_bits)b));
}

KV_INLINE float kv_first(kv_vec x) { return x[0]; }

KV_INLINE float kv_hsum(kv_vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

KV_INLINE float kv_hmax(kv_vec x) {
    const float a = x[0] > x[2] ? x[0] : x[2];
    const float b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}

KV_INLINE kv_vec kv_fold(const kv_vec *v) {
    const kv_vec ab =
        (kv_vec){v[0][0], v[0][1], v[1][0], v[1][1]} + (kv_vec){v[0][2], v[0][3], v[1][2], v[1][3]};
    const kv_vec cd =
        (kv_vec){v[2][0], v[2][1], v[3][0], v[3][1]} + (kv_vec){v[2][2], v[2][3], v[3][2], v[3][3]};
    return (kv_vec){ab[0], ab[2], cd[0], cd[2]} + (kv_vec){ab[1], ab[3], cd[1], cd[3]};
}

KV_INLINE kv_vec kv_exchange(kv_vec x, int h) {
    return h == 1 ? (kv_vec){x[1], x[0], x[3], x[2]} : (kv_vec){x[2], x[3], x[0], x[1]};
}

KV_INLINE kv_vec kv_pow2(kv_vec z) { return (kv_vec)(((kv_bits)z << 23) + 0x3f800000); }

KV_INLINE kv_vec kv_keep_above(kv_vec x, float bound, kv_vec y) {
    const kv_bits below = (kv_bits)(x < kv_broadcast(bound));
    return (kv_vec)(~below & (kv_bits)y);
}

KV_INLINE float kv_f16_to_f32(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 0x1f, mantissa = half & 0x3ff;
    if (exponent == 0x1f) /* infinity, or a NaN made quiet */
        return kv_from_bits(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000u : 0u));
    if (exponent == 0) { /* mantissa * 2^-24 */
        const float magnitude = (float)mantissa * 5.9604644775390625e-8f;
        return kv_from_bits(sign | kv_to_bits(magnitude));
    }
    return kv_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* value / 2^shift, to nearest, ties to even */
KV_INLINE uint32_t kv_shift_to_even(uint32_t value, uint32_t shift) {
    const uint32_t half = (1u << (shift - 1)) - 1;
    return (value + half + ((value >> shift) & 1)) >> shift;
}

KV_INLINE uint16_t kv_f32_to_f16(float x) {
    const uint32_t bits = kv_to_bits(x), magnitude = bits & 0x7fffffff;
    const uint32_t sign = (bits >> 16) & 0x8000;
    if (magnitude > 0x7f800000) /* NaN */
        return (uint16_t)(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
    if (magnitude >= 0x477ff000) /* from 65520 on the nearest is infinity */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude >= 0x38800000) /* 2^-14: normal */
        return (uint16_t)(sign | (kv_shift_to_even(magnitude, 13) - (112u << 10)));
    if (magnitude <= 0x33000000) /* up to 2^-25 the nearest is 0 */
        return (uint16_t)sign;
    const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
    return (uint16_t)(sign | kv_shift_to_even(mantissa, 126 - (magnitude >> 23)));
}

KV_INLINE uint16_t kv_f32_to_bf16(float x) {
    const uint32_t bits = kv_to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)kv_shift_to_even(bits, 16);
}

KV_INLINE kv_vec kv_load_f16(const uint16_t *p) {
    return (kv_vec){kv_f16_to_f32(p[0]), kv_f16_to_f32(p[1]), kv_f16_to_f32(p[2]),
                    kv_f16_to_f32(p[3])};
}

KV_INLINE kv_vec kv_load_bf16(const uint16_t *p) {
    const kv_bits wide = {p[0], p[1], p[2], p[3]};
    return (kv_vec)(wide << 16);
}

KV_INLINE void kv_store_f16(uint16_t *p, kv_vec x) {
    for (int i = 0; i < KV_LANES; i++)
        p[i] = kv_f32_to_f16(x[i]);
}

KV_INLINE void kv_store_bf16(uint16_t *p, kv_vec x) {
    for (int i = 0; i < KV_LANES; i++)
        p[i] = kv_f32_to_bf16(x[i]);
}

KV_INLINE kv_vec kv_load_u8(const uint8_t *p) {
    uint8_t four __attribute__((vector_size(4)));
    memcpy(&four, p, sizeof(four));
    return __builtin_convertvector(four, kv_vec);
}

KV_INLINE void kv_store_u8(uint8_t *p, kv_vec x) {
    const kv_bits bits = (kv_bits)x;
    for (int i = 0; i < KV_LANES; i++)
        p[i] = (uint8_t)bits[i];
}

KV_INLINE kv_vec kv_look_up(const float *table, const uint8_t *p) {
    return (kv_vec){table[p[0]], table[p[1]], table[p[2]], table[p[3]]};
}

KV_INLINE void kv_prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

#include "lanes_partial.h"

KV_NOTHING_SWAPPED

#endif
