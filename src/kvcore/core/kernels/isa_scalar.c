/* Kernels in plain C, for any CPU. */
#include "lanes_scalar.h"

#include "kernel_text.h"

const kv_kernels kv_kernels_scalar = KV_KERNEL_TABLE("scalar");
