/* Formats and dtypes as sizes. */
#ifndef KVCORE_CORE_FORMATS_H
#define KVCORE_CORE_FORMATS_H

#include "kvcore.h"

enum {
    KV_MAX_HEAD_DIM = 1024,
    KV_GROUP_TOKENS = 32 /* tokens of a sealed group: formats of kind CHANNEL */
};

/* All expect a valid value. */
kv_format kv_dtype_format(kv_dtype dtype); /* the format with the same elements */
kv_format_kind kv_format_kind_of(kv_format format);
int kv_format_is_float(kv_format format);

/* Bytes of one token of one head: its codes, its share of the metadata, both. */
int64_t kv_format_code_bytes(kv_format format, int32_t head_dim);
int64_t kv_format_metadata_bytes(kv_format format, int32_t head_dim);
int64_t kv_format_row_bytes(kv_format format, int32_t head_dim);

int kv_format_is_valid(kv_format format);
int kv_dtype_is_valid(kv_dtype dtype);

/* A multiple of 8, up to KV_MAX_HEAD_DIM. */
int kv_head_dim_is_valid(int32_t head_dim);
/* ... and one that the format, which must be valid, can hold. */
int kv_format_takes_head_dim(kv_format format, int32_t head_dim);

#endif
