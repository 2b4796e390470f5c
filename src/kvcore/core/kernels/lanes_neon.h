/* Four lanes: Advanced SIMD of AArch64. */
#ifndef KVCORE_CORE_KERNELS_LANES_NEON_H
#define KVCORE_CORE_KERNELS_LANES_NEON_H

#include <arm_neon.h>

#include "lanes.h"

#define KV_LANES 4
#define KV_ACCUMULATORS 16
#define KV_REGISTERS 32

typedef float32x4_t kv_vec;

KV_INLINE kv_vec kv_zero(void) { return vdupq_n_f32(0.0f); }

KV_INLINE kv_vec kv_broadcast(float x) { return vdupq_n_f32(x); }

KV_INLINE kv_vec kv_load(const float *p) { return vld1q_f32(p); }

KV_INLINE void kv_store(float *p, kv_vec x) { vst1q_f32(p, x); }

KV_INLINE kv_vec kv_add(kv_vec a, kv_vec b) { return vaddq_f32(a, b); }

KV_INLINE kv_vec kv_sub(kv_vec a, kv_vec b) { return vsubq_f32(a, b); }

KV_INLINE kv_vec kv_mul(kv_vec a, kv_vec b) { return vmulq_f32(a, b); }

KV_INLINE kv_vec kv_div(kv_vec a, kv_vec b) { return vdivq_f32(a, b); }

KV_INLINE kv_vec kv_fma(kv_vec a, kv_vec b, kv_vec c) { return vfmaq_f32(c, a, b); }

KV_INLINE kv_vec kv_max(kv_vec a, kv_vec b) { return vmaxq_f32(a, b); }

KV_INLINE float kv_first(kv_vec x) { return vgetq_lane_f32(x, 0); }

KV_INLINE float kv_hsum(kv_vec x) {
    const float32x2_t y = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(y, 0) + vget_lane_f32(y, 1);
}

KV_INLINE float kv_hmax(kv_vec x) { return vmaxvq_f32(x); }

/* Adds the 64-bit halves of a and b: [a, b]. */
KV_INLINE kv_vec kv_fold_pairs(kv_vec a, kv_vec b) {
    return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)),
                     vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
}

KV_INLINE kv_vec kv_fold(const kv_vec *v) {
    return vpaddq_f32(kv_fold_pairs(v[0], v[1]), kv_fold_pairs(v[2], v[3]));
}

KV_INLINE kv_vec kv_exchange(kv_vec x, int h) {
    return h == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
}

KV_INLINE kv_vec kv_pow2(kv_vec z) {
    const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(z), 23);
    return vreinterpretq_f32_s32(vaddq_s32(n, vdupq_n_s32(0x3f800000)));
}

KV_INLINE kv_vec kv_keep_above(kv_vec x, float bound, kv_vec y) {
    const uint32x4_t below = vcltq_f32(x, vdupq_n_f32(bound));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), below));
}

KV_INLINE kv_vec kv_load_f16(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

KV_INLINE kv_vec kv_load_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

KV_INLINE void kv_store_f16(uint16_t *p, kv_vec x) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}

KV_INLINE void kv_store_bf16(uint16_t *p, kv_vec x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t bias = vaddq_u32(odd, vdupq_n_u32(0x7fff));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16);
    const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
    vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet)));
}

KV_INLINE kv_vec kv_load_u8(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, sizeof(four));
    const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
}

KV_INLINE void kv_store_u8(uint8_t *p, kv_vec x) {
    const uint16x4_t half = vmovn_u32(vreinterpretq_u32_f32(x));
    const uint32x2_t four = vreinterpret_u32_u8(vmovn_u16(vcombine_u16(half, half)));
    const uint32_t bytes = vget_lane_u32(four, 0);
    memcpy(p, &bytes, sizeof(bytes));
}

KV_INLINE kv_vec kv_look_up(const float *table, const uint8_t *p) {
    const float v[] = {table[p[0]], table[p[1]], table[p[2]], table[p[3]]};
    return vld1q_f32(v);
}

KV_INLINE void kv_prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

#include "lanes_partial.h"

KV_NOTHING_SWAPPED

#endif
