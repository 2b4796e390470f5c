/* The kernels of isa_avx512_vnni.c, and prefill by AVX512_BF16's dot products. Empty on other
 * architectures. */
#include "kernels.h"

#if defined(__x86_64__)

#define KV_HAS_DOT_BF16 1

#include "lanes_avx512_vnni.h"

#include "kernel_text.h"

const kv_kernels kv_kernels_avx512_bf16 = KV_KERNEL_TABLE("avx512_bf16");

#endif
