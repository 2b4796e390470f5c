/* Conversions of 16-bit floats, rounded once to nearest even, as the device's cvt.rn. */
#pragma once
/* C's header, as all kernels include it: libstdc++'s own takes longer to read than most of them to
 * compile. */
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS 1
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <string.h>

namespace emulator {

inline float as_float(u32 u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
inline u32 as_u32(float f) {
    u32 u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* Denormals become zeros, as in the device's ftz instructions. */
inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

inline float f16_to_f32(u16 h) {
    u32 u = (u32)(h & 0x7fff) << 13;
    u = u >= 0x0f800000u ? u | 0x7f800000u : as_u32(as_float(u) * 0x1p112f);
    return as_float(u | (u32)(h & 0x8000) << 16);
}

inline u16 f32_to_f16(float f) {
    const u32 u = as_u32(f), magnitude = u & 0x7fffffffu;
    const u16 sign = u >> 16 & 0x8000;
    if (magnitude > 0x7f800000u)
        return 0x7fff;
    if (magnitude >= 0x477ff000u)
        return sign | 0x7c00;
    if (magnitude < 0x38800000u) /* the adder rounds to a multiple of the smallest f16, 2^-24 */
        return sign | (u16)(as_u32(as_float(magnitude) + 0.5f) - as_u32(0.5f));
    return sign | (u16)((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

/* The bits of e4m3, moved to where float16 has exponent and mantissa, are 2^-8 times their number. */
inline u16 e4m3_to_f16(u8 x) {
    const u16 magnitude = x & 0x7f, sign = (u16)((x & 0x80) << 8);
    if (magnitude == 0x7f)
        return 0x7fff;
    return sign | f32_to_f16(f16_to_f32((u16)(magnitude << 7)) * 256.0f);
}

inline u16 f32_to_bf16(float f) {
    const u32 u = as_u32(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return 0x7fff;
    return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* The float32 that shares a double's side of every tie: rounding it again is rounding once. */
inline float to_odd(double x) {
    const float f = (float)x;
    if ((double)f == x || !__builtin_isfinite(f) || as_u32(f) & 1)
        return f;
    const bool away = fabs((double)f) < fabs(x);
    return as_float(away ? as_u32(f) + 1 : as_u32(f) - 1);
}
inline u16 f64_to_f16(double x) { return f32_to_f16(to_odd(x)); }
inline u16 f64_to_bf16(double x) { return f32_to_bf16(to_odd(x)); }

} // namespace emulator
