/* Kernels for AVX2, FMA and F16C. Empty on other architectures. */
#include "kernels.h"

#if defined(__x86_64__)

#include "lanes_avx2.h"

#include "kernel_text.h"

const kv_kernels kv_kernels_avx2 = KV_KERNEL_TABLE("avx2");

#endif
