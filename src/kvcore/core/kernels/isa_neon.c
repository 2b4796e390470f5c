/* Kernels for Advanced SIMD of AArch64. Empty on other architectures. */
#include "kernels.h"

#if defined(__aarch64__)

#include "lanes_neon.h"

#include "kernel_text.h"

const kv_kernels kv_kernels_neon = KV_KERNEL_TABLE("neon");

#endif
