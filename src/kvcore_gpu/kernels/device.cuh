/* What the kernels know of the machine: types, qualifiers, and every intrinsic and line of PTX.
 *
 * NVRTC compiles the device branch, without any header of a toolkit. With KV_HOST_EMULATION the
 * same names come from the emulator of the tests, and a C++ compiler takes the same sources.
 * Functions on warps take part with all 32 lanes. PTX is that of sm_80 and later.
 */
#pragma once

typedef signed char s8;
typedef unsigned char u8;
typedef short s16;
typedef unsigned short u16;
typedef int s32;
typedef unsigned int u32;
typedef long long s64;
typedef unsigned long long u64;

#ifdef KV_HOST_EMULATION
#include "emulator.hpp"
#else

#define KV_DEVICE __device__ __forceinline__
/* An entry with one parameter, p; at most `threads` a block, `min_blocks` or more a multiprocessor. */
#define KV_KERNEL(name, Params, threads, min_blocks)                  \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks) \
        name(const __grid_constant__ Params p)
#define KV_CONSTANT __constant__
/* Inside a kernel. */
#define KV_SHARED __shared__
#define KV_DYNAMIC_SHARED(T, name)                                      \
    extern __shared__ __align__(128) unsigned char kv_dynamic_shared[]; \
    T *const name = reinterpret_cast<T *>(kv_dynamic_shared)

constexpr u32 FULL_WARP = 0xffffffffu;

/* ---- copies from global to shared memory that run beside the computation */

KV_DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/* dst := src, or zeros where not pred (src is then not read); aligned to their bytes. */
KV_DEVICE void cp_async16(void *dst, const void *src, bool pred) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(dst)),
        "l"(src), "r"(pred ? 16 : 0));
}
KV_DEVICE void cp_async8(void *dst, const void *src, bool pred) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(dst)),
                 "l"(src), "r"(pred ? 8 : 0));
}
KV_DEVICE void cp_async4(void *dst, const void *src, bool pred) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(dst)),
                 "l"(src), "r"(pred ? 4 : 0));
}
KV_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
/* Waits until at most N groups of this thread are under way. */
template <int N> KV_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* ---- matrices */

/* Four matrices of 8 rows x 16 bytes; lane l gives the address of row l % 8 of matrix l / 8. */
KV_DEVICE void ldmatrix_x4(u32 (&r)[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}
KV_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

/* c += a . b: m16n8k16 with sums in float32; fragments as the PTX manual lays them out. */
KV_DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
KV_DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- numbers; conversions round to nearest even */

KV_DEVICE float u32_as_float(u32 u) { return __uint_as_float(u); }
KV_DEVICE u32 float_as_u32(float f) { return __float_as_uint(f); }

KV_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KV_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

KV_DEVICE float f16_to_f32(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
KV_DEVICE u16 f32_to_f16(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
KV_DEVICE u16 f32_to_bf16(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
KV_DEVICE u32 pack_f16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
KV_DEVICE u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

/* ---- pairs of 16-bit floats in a word, each operation rounded once */

KV_DEVICE u32 hadd2(u32 a, u32 b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE u32 hsub2(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE u32 hmul2(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE u32 hfma2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
KV_DEVICE u32 hfma2_bf16(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

/* Bytes 0 and 1, or 2 and 3, as a pair of float16, where the machine converts e4m3. */
#if __CUDA_ARCH__ >= 890
#define KV_CONVERTS_E4M3
KV_DEVICE u32 e4m3_to_f16(u32 word, s32 upper) {
    u32 r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((u16)(upper ? word >> 16 : word)));
    return r;
}
#endif

/* Four bytes out of the eight of (b, a), each chosen by one of the lower four digits of sel, 0 to 7;
 * a's are 0 to 3. (__byte_perm takes more digits, and an instruction to make them these.) */
KV_DEVICE u32 byte_perm(u32 a, u32 b, u32 sel) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
    return r;
}
KV_DEVICE s32 count_bits(u32 x) { return __popc(x); }
KV_DEVICE s32 leading_zeros(u32 x) { return __clz((s32)x); }

/* ---- warps */

/* x, of which the compiler is to know nothing: what follows from it is computed where it is needed,
 * in every round of a loop, and takes no registers in between. */
KV_DEVICE s32 opaque(s32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
/* The same of a pointer, of whose sum the compiler is to take no part back. */
KV_DEVICE const u8 *opaque(const u8 *x) {
    asm("" : "+l"(x));
    return x;
}

/* c, of which the assembler is to know nothing, so that it stays in a register: it would move a
 * constant there again before every instruction that cannot take one. */
KV_DEVICE u32 kept_constant(u32 c) {
    u32 r;
    asm("{ .reg .u32 t; mov.u32 t, %%laneid; shr.u32 t, t, 5; add.u32 %0, t, %1; }"
        : "=r"(r)
        : "r"(c));
    return r;
}

KV_DEVICE u32 lane_id() { return threadIdx.x & 31; }
/* The same for all lanes, and known to be so by the compiler: all of them have to call it. */
KV_DEVICE u32 warp_id() { return __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0); }

template <class T> KV_DEVICE T shfl(T v, s32 lane) { return __shfl_sync(FULL_WARP, v, lane); }
template <class T> KV_DEVICE T shfl_xor(T v, s32 mask) {
    return __shfl_xor_sync(FULL_WARP, v, mask);
}
/* From the lane `delta` higher or lower; a lane without such a neighbour gets its own. */
template <class T> KV_DEVICE T shfl_down(T v, u32 delta) {
    return __shfl_down_sync(FULL_WARP, v, delta);
}
template <class T> KV_DEVICE T shfl_up(T v, u32 delta) {
    return __shfl_up_sync(FULL_WARP, v, delta);
}
KV_DEVICE u32 ballot(bool pred) { return __ballot_sync(FULL_WARP, pred); }
KV_DEVICE bool any(bool pred) { return __any_sync(FULL_WARP, pred); }
KV_DEVICE bool all(bool pred) { return __all_sync(FULL_WARP, pred); }
KV_DEVICE s32 reduce_add(s32 v) { return __reduce_add_sync(FULL_WARP, v); }
KV_DEVICE s32 reduce_max(s32 v) { return __reduce_max_sync(FULL_WARP, v); }
KV_DEVICE s32 reduce_min(s32 v) { return __reduce_min_sync(FULL_WARP, v); }
KV_DEVICE u32 reduce_or(u32 v) { return __reduce_or_sync(FULL_WARP, v); }

/* ---- order of memory */

KV_DEVICE void sync_warp() { __syncwarp(); }
KV_DEVICE void sync_threads() { __syncthreads(); }
/* A barrier of `threads` threads (whole warps); id 1 to 15, 0 is that of sync_threads. */
KV_DEVICE void sync_named(s32 id, s32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* What this thread has written, other blocks see before what it writes from here on. */
KV_DEVICE void thread_fence() { __threadfence(); }
/* For counters, never for data. */
KV_DEVICE s32 atomic_add_s32(s32 *p, s32 v) { return atomicAdd(p, v); }

/* 16 bytes, aligned, that nobody writes while the kernel runs and that are read once. */
KV_DEVICE uint4 load16(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
KV_DEVICE void store16(void *p, uint4 v) { *reinterpret_cast<uint4 *>(p) = v; }
/* What another block may have written before its fence: past the first cache, which may be stale. */
KV_DEVICE float load_l2(const float *p) { return __ldcg(p); }

#endif

/* ---- what both branches make of the above */

KV_DEVICE float bf16_to_f32(u16 h) { return u32_as_float((u32)h << 16); }

/* On bf16 pairs; sm_80 has the fma only, which rounds each of these just as well. */
KV_DEVICE u32 hadd2_bf16(u32 a, u32 b) { return hfma2_bf16(a, 0x3f803f80u, b); }
KV_DEVICE u32 hsub2_bf16(u32 a, u32 b) { return hfma2_bf16(b, 0xbf80bf80u, a); }
KV_DEVICE u32 hmul2_bf16(u32 a, u32 b) { return hfma2_bf16(a, b, 0x80008000u); }

/* Over the warp by halves: every lane gets the same bits. */
KV_DEVICE float reduce_add(float v) {
#pragma unroll
    for (s32 mask = 16; mask; mask >>= 1)
        v += shfl_xor(v, mask);
    return v;
}
KV_DEVICE float reduce_max(float v) {
#pragma unroll
    for (s32 mask = 16; mask; mask >>= 1)
        v = fmaxf(v, shfl_xor(v, mask));
    return v;
}
