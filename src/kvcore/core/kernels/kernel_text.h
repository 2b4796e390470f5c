/* All kernels, compiled with the lanes that were included before this file. A unit whose ISA has
 * dot products of bf16 pairs defines KV_HAS_DOT_BF16 as 1, and lanes with those of bytes define
 * KV_HAS_DOT_INT8 as 1. */

#include "../formats.h"
#include "../rotation.h"
#include "kernels.h"
#include "levels.h"

#include <float.h>
#include <math.h>

#if !defined(KV_HAS_DOT_BF16)
#define KV_HAS_DOT_BF16 0
#endif
#if !defined(KV_HAS_DOT_INT8)
#define KV_HAS_DOT_INT8 0
#endif

#include "convert_kernel.h"

#include "metadata_kernel.h"

#include "planes_kernel.h"

#include "bias_kernel.h"

#include "rotation_kernel.h"

#include "channel_kernel.h"

#include "encode_kernel.h"

#include "decode_kernel.h"

#include "decode_run_kernel.h"

#include "finite_kernel.h"

#include "softmax_kernel.h"

#include "attend_kernel.h"

#include "encoded_kernel.h"

#include "prefill_kernel.h"

#if KV_HAS_DOT_BF16
#include "dot_prefill_kernel.h"
#endif

#include "split_kernel.h"

#include "linear_kernel.h"

#define KV_KERNEL_TABLE(name)                 \
    {                                         \
        .isa = name,                          \
        .has_dot_bf16 = KV_HAS_DOT_BF16,      \
        .convert = kv_convert,                \
        .encode = kv_encode,                  \
        .decode = kv_decode,                  \
        .is_finite = kv_is_finite,            \
        .pack_queries = kv_pack_queries,      \
        .pack_encoded = kv_pack_encoded,      \
        .attend_split = kv_attend_split,      \
        .merge_partial = kv_merge_partial,    \
        .normalize = kv_normalize,            \
        .merge_states = kv_merge_states_rows, \
        .linear = kv_linear_range,            \
    }
