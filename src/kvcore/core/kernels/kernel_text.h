/* All kernels, compiled with the lanes that were included before this file. */

#include "kernels.h"

#include "convert_kernel.h"

#include "softmax_kernel.h"

#include "attend_kernel.h"

#include "prefill_kernel.h"

#include "split_kernel.h"

#include "linear_kernel.h"

#define KV_KERNEL_TABLE(name)                 \
    {                                         \
        .isa = name,                          \
        .convert = kv_convert,                \
        .pack_queries = kv_pack_queries,      \
        .attend_split = kv_attend_split,      \
        .merge_partial = kv_merge_partial,    \
        .normalize = kv_normalize,            \
        .merge_states = kv_merge_states_rows, \
        .linear = kv_linear_range,            \
    }
