/* The kernels of isa_avx512.c, and quantized formats by AVX512_VNNI's dot products of bytes. Empty on
 * other architectures. */
#include "kernels.h"

#if defined(__x86_64__)

#include "lanes_avx512_vnni.h"

#include "kernel_text.h"

const kv_kernels kv_kernels_avx512_vnni = KV_KERNEL_TABLE("avx512_vnni");

#endif
