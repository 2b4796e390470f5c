/* Kernels for AVX-512 F, BW, DQ and VL. Empty on other architectures. */
#include "kernels.h"

#if defined(__x86_64__)

#include "lanes_avx512.h"

#include "kernel_text.h"

const kv_kernels kv_kernels_avx512 = KV_KERNEL_TABLE("avx512");

#endif
