#include "formats.h"

static const kv_format_info infos[KV_FORMAT_COUNT] = {
#define KV_FORMAT_INFO(ID, name, element_bits, row_metadata_bytes) \
    [KV_FORMAT_##ID] = {#name, element_bits, row_metadata_bytes},
    KV_FORMATS(KV_FORMAT_INFO)
#undef KV_FORMAT_INFO
};

int kv_format_is_valid(kv_format format) { return (int)format >= 0 && format < KV_FORMAT_COUNT; }

int kv_dtype_is_valid(kv_dtype dtype) { return (int)dtype >= 0 && dtype < KV_DTYPE_COUNT; }

int kv_head_dim_is_valid(int32_t head_dim) {
    return head_dim > 0 && head_dim % 8 == 0 && head_dim <= 1024;
}

const kv_format_info *kv_format_get_info(kv_format format) {
    return kv_format_is_valid(format) ? &infos[format] : NULL;
}

kv_format kv_dtype_format(kv_dtype dtype) {
    if (dtype == KV_DTYPE_F16)
        return KV_FORMAT_FP16;
    if (dtype == KV_DTYPE_BF16)
        return KV_FORMAT_BF16;
    return KV_FORMAT_FP32;
}

int64_t kv_format_row_bytes(kv_format format, int32_t head_dim) {
    const kv_format_info *info = &infos[format];
    return (int64_t)info->element_bits * head_dim / 8 + info->row_metadata_bytes;
}
