/* What device.cuh is on a CPU: the names of its device branch, over the emulator's library.
 *
 * Nothing here reads or writes a kernel's memory except through a call into the library, which is
 * compiled without the checker's instrumentation: what the hooks report is the kernel's own doing.
 * Calls take their own line as a default argument, so that an error can say where a thread stood.
 */
#pragma once
#include "library.hpp"
#include "numbers.hpp"

/* ---- qualifiers */

#define KV_DEVICE inline
#define KV_CONSTANT static const
/* One section, so that it can be poisoned before each block, and measured. */
#define KV_SHARED static __attribute__((section("kv_shared")))
#define KV_DYNAMIC_SHARED(T, name) T *const name = static_cast<T *>(emulator::dynamic_shared())
#define KV_KERNEL(name, Params, threads, min_blocks)                                   \
    static __attribute__((noinline)) void name##_body(const Params &p);                \
    extern "C" __attribute__((visibility("default"))) const emulator::Kernel name = {  \
        [](const void *params) { name##_body(*static_cast<const Params *>(params)); }, \
        sizeof(Params), threads, __start_kv_shared, __stop_kv_shared};                 \
    static void name##_body(const Params &p)

extern "C" {
extern char __start_kv_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_kv_shared[] __attribute__((weak, visibility("hidden")));
}

#define __restrict__ __restrict
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

constexpr u32 FULL_WARP = 0xffffffffu;

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

#define KV_MIN_MAX(T)                                             \
    KV_DEVICE constexpr T min(T a, T b) { return b < a ? b : a; } \
    KV_DEVICE constexpr T max(T a, T b) { return a < b ? b : a; }
KV_MIN_MAX(s32)
KV_MIN_MAX(u32)
KV_MIN_MAX(s64)
KV_MIN_MAX(u64)
#undef KV_MIN_MAX

/* ---- copies from global to shared memory */

#define KV_CP_ASYNC(bytes)                                                  \
    KV_DEVICE void cp_async##bytes(void *dst, const void *src, bool pred) { \
        emulator::copy_async(dst, src, bytes, pred);                        \
    }
KV_CP_ASYNC(16)
KV_CP_ASYNC(8)
KV_CP_ASYNC(4)
#undef KV_CP_ASYNC
KV_DEVICE void cp_async_commit() { emulator::commit_copies(); }
template <int N> KV_DEVICE void cp_async_wait() { emulator::wait_copies(N); }

/* ---- matrices */

using emulator::Site;
#define KV_HERE Site site = Site()

KV_DEVICE void ldmatrix_x4(u32 (&r)[4], const void *p, KV_HERE) {
    emulator::load_matrices(r, p, false, site);
}
KV_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void *p, KV_HERE) {
    emulator::load_matrices(r, p, true, site);
}
KV_DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, KV_HERE) {
    emulator::multiply_matrices(c, a, b0, b1, false, site);
}
KV_DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, KV_HERE) {
    emulator::multiply_matrices(c, a, b0, b1, true, site);
}

/* ---- numbers */

KV_DEVICE float u32_as_float(u32 u) { return emulator::as_float(u); }
KV_DEVICE u32 float_as_u32(float f) { return emulator::as_u32(f); }
KV_DEVICE float exp2_approx(float x) { return emulator::flush(exp2f(emulator::flush(x))); }
KV_DEVICE float log2_approx(float x) { return log2f(emulator::flush(x)); }

KV_DEVICE float f16_to_f32(u16 h) { return emulator::f16_to_f32(h); }
KV_DEVICE u16 f32_to_f16(float f) { return emulator::f32_to_f16(f); }
KV_DEVICE u16 f32_to_bf16(float f) { return emulator::f32_to_bf16(f); }
KV_DEVICE u32 pack_f16(float lo, float hi) { return f32_to_f16(lo) | (u32)f32_to_f16(hi) << 16; }
KV_DEVICE u32 pack_bf16(float lo, float hi) { return f32_to_bf16(lo) | (u32)f32_to_bf16(hi) << 16; }

/* A double holds the sum or product of two halves exactly, and of three in all but far ties. */
template <class F> KV_DEVICE u32 on_f16_pairs(u32 a, u32 b, u32 c, F f) {
    const auto half = [&](u32 shift) -> u32 {
        const auto at = [&](u32 x) -> double { return f16_to_f32((u16)(x >> shift)); };
        return emulator::f64_to_f16(f(at(a), at(b), at(c)));
    };
    return half(0) | half(16) << 16;
}
KV_DEVICE u32 hadd2(u32 a, u32 b) {
    return on_f16_pairs(a, b, 0, [](double x, double y, double) { return x + y; });
}
KV_DEVICE u32 hsub2(u32 a, u32 b) {
    return on_f16_pairs(a, b, 0, [](double x, double y, double) { return x - y; });
}
KV_DEVICE u32 hmul2(u32 a, u32 b) {
    return on_f16_pairs(a, b, 0, [](double x, double y, double) { return x * y; });
}
KV_DEVICE u32 hfma2(u32 a, u32 b, u32 c) {
    return on_f16_pairs(a, b, c, [](double x, double y, double z) { return x * y + z; });
}
KV_DEVICE u32 hfma2_bf16(u32 a, u32 b, u32 c) {
    const auto half = [&](u32 shift) -> u32 {
        const auto at = [&](u32 x) -> double { return emulator::as_float(x >> shift << 16); };
        return emulator::f64_to_bf16(at(a) * at(b) + at(c));
    };
    return half(0) | half(16) << 16;
}

/* The machine is of sm_89 or later, unless a test asks for an older one. */
#ifndef KV_EMULATE_SM_80
#define KV_CONVERTS_E4M3
KV_DEVICE u32 e4m3_to_f16(u32 word, s32 upper) {
    const u32 pair = upper ? word >> 16 : word;
    return emulator::e4m3_to_f16((u8)pair) | (u32)emulator::e4m3_to_f16((u8)(pair >> 8)) << 16;
}
#endif

KV_DEVICE u32 byte_perm(u32 a, u32 b, u32 sel) {
    const u64 bytes = (u64)b << 32 | a;
    u32 r = 0;
    for (s32 i = 0; i < 4; i++) {
        const u32 digit = sel >> 4 * i & 15, byte = bytes >> 8 * (digit & 7) & 255;
        r |= (digit & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return r;
}
KV_DEVICE s32 count_bits(u32 x) { return __builtin_popcount(x); }
KV_DEVICE s32 leading_zeros(u32 x) { return x ? __builtin_clz(x) : 32; }

/* ---- warps */

KV_DEVICE s32 opaque(s32 x) { return x; }
KV_DEVICE const u8 *opaque(const u8 *x) { return x; }
KV_DEVICE u32 kept_constant(u32 c) { return c; }

KV_DEVICE u32 lane_id() { return threadIdx.x & 31; }

template <class T> KV_DEVICE T shuffled(T v, emulator::Shuffle kind, s32 argument, Site site) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    u64 word = 0;
    memcpy(&word, &v, sizeof v);
    word = emulator::shuffle(word, kind, argument, site);
    memcpy(&v, &word, sizeof v);
    return v;
}
template <class T> KV_DEVICE T shfl(T v, s32 lane, KV_HERE) {
    return shuffled(v, emulator::Shuffle::FROM, lane, site);
}
KV_DEVICE u32 warp_id(KV_HERE) { return shfl(threadIdx.x >> 5, 0, site); }
template <class T> KV_DEVICE T shfl_xor(T v, s32 mask, KV_HERE) {
    return shuffled(v, emulator::Shuffle::XOR, mask, site);
}
template <class T> KV_DEVICE T shfl_down(T v, u32 delta, KV_HERE) {
    return shuffled(v, emulator::Shuffle::DOWN, (s32)delta, site);
}
template <class T> KV_DEVICE T shfl_up(T v, u32 delta, KV_HERE) {
    return shuffled(v, emulator::Shuffle::UP, (s32)delta, site);
}
KV_DEVICE u32 ballot(bool pred, KV_HERE) { return emulator::ballot(pred, site); }
KV_DEVICE bool any(bool pred, KV_HERE) { return emulator::ballot(pred, site) != 0; }
KV_DEVICE bool all(bool pred, KV_HERE) { return emulator::ballot(pred, site) == FULL_WARP; }
KV_DEVICE s32 reduce_add(s32 v, KV_HERE) {
    return emulator::reduce(v, emulator::Reduction::ADD, site);
}
KV_DEVICE s32 reduce_max(s32 v, KV_HERE) {
    return emulator::reduce(v, emulator::Reduction::MAX, site);
}
KV_DEVICE s32 reduce_min(s32 v, KV_HERE) {
    return emulator::reduce(v, emulator::Reduction::MIN, site);
}
KV_DEVICE u32 reduce_or(u32 v, KV_HERE) {
    return (u32)emulator::reduce((s32)v, emulator::Reduction::OR, site);
}

/* ---- order of memory */

KV_DEVICE void sync_warp(KV_HERE) { emulator::sync_warp(site); }
KV_DEVICE void sync_threads(KV_HERE) { emulator::barrier(0, 0, site); }
KV_DEVICE void sync_named(s32 id, s32 threads, KV_HERE) { emulator::barrier(id, threads, site); }
KV_DEVICE void thread_fence() { emulator::fence(); }
KV_DEVICE s32 atomic_add_s32(s32 *p, s32 v) { return emulator::atomic_add(p, v); }

KV_DEVICE uint4 load16(const void *p) { return *static_cast<const uint4 *>(p); }
KV_DEVICE void store16(void *p, uint4 v) { *static_cast<uint4 *>(p) = v; }
KV_DEVICE float load_l2(const float *p) { return *p; }
