/* What every set of lanes (lanes_scalar.h, lanes_avx2.h, ...) defines, and what they share.
 *
 *   KV_LANES          float32 lanes of a vector
 *   KV_ACCUMULATORS   vectors that a kernel may sum into at once: a multiple of KV_LANES that
 *                     leaves registers for the operands
 *   KV_REGISTERS      vector registers that the ISA has: 16 or 32
 *   kv_vec            the vector
 *
 *   kv_zero, kv_broadcast, kv_load, kv_store, kv_add, kv_sub, kv_mul, kv_div, kv_max
 *   kv_fma(a, b, c)   a * b + c, rounded once where the ISA can
 *   kv_first(v)       lane 0
 *   kv_hsum, kv_hmax  across lanes; the sum in the order of the fold
 *   kv_fold(v)        the horizontal sums of v[0 .. KV_LANES), lane i that of v[i]
 *   kv_exchange(v, h) lanes i and i ^ h in each other's place; h is a constant power of two
 *   kv_pow2(z)        2^n for z = n + KV_ROUND, n a whole number from -126 to 127
 *   kv_keep_above(x, bound, y)   y, but 0 in the lanes where x < bound
 *   kv_load_f16, kv_load_bf16, kv_store_f16, kv_store_bf16   with conversion
 *   kv_load_bf16_swapped   the same where it is cheaper to have the second and third quarter of the
 *                     lanes in each other's place; kv_swap_middle moves them there and back, and
 *                     kv_fold_swapped folds sums that lie so
 *   kv_load_u8(p)     bytes as floats
 *   kv_store_u8(p, v) the lowest byte of each lane's bits
 *   kv_look_up(table, p)  table[p[i]] for bytes p[i] < 16
 *   kv_prefetch(p)    ask for a cache line in L2
 *
 * Each load and store has a form with the suffix _partial that touches only the first n lanes in
 * memory, 0 < n < KV_LANES; the other lanes load as 0. */
#ifndef KVCORE_CORE_KERNELS_LANES_H
#define KVCORE_CORE_KERNELS_LANES_H

#include <stdint.h>
#include <string.h>

#define KV_INLINE static inline __attribute__((always_inline))

/* Unrolling is for speed alone, and what sanitizers add to it takes minutes to compile. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KV_UNROLL
#elif defined(__clang__)
#define KV_UNROLL _Pragma("unroll")
#else
#define KV_UNROLL _Pragma("GCC unroll 32")
#endif

/* For lanes that load bf16 in order at the same cost. */
#define KV_NOTHING_SWAPPED                                                               \
    KV_INLINE kv_vec kv_swap_middle(kv_vec x) { return x; }                              \
    KV_INLINE kv_vec kv_load_bf16_swapped(const uint16_t *p) { return kv_load_bf16(p); } \
    KV_INLINE kv_vec kv_fold_swapped(const kv_vec *v) { return kv_fold(v); }

KV_INLINE float kv_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

KV_INLINE uint32_t kv_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

/* Adding 1.5 * 2^23 rounds a small float to a whole number, which then stands in its low bits. */
#define KV_ROUND 12582912.0f

#endif
