/* Formats and dtypes as sizes. */
#ifndef KVCORE_CORE_FORMATS_H
#define KVCORE_CORE_FORMATS_H

#include "kvcore.h"

/* Both expect a valid value. */
kv_format kv_dtype_format(kv_dtype dtype); /* the format with the same elements */
int64_t kv_format_row_bytes(kv_format format, int32_t head_dim);

int kv_format_is_valid(kv_format format);
int kv_dtype_is_valid(kv_dtype dtype);

/* A multiple of 8, up to 1024. */
int kv_head_dim_is_valid(int32_t head_dim);

#endif
