#include "formats.h"

static const kv_format_info infos[KV_FORMAT_COUNT] = {
#define KV_FORMAT_INFO(ID, name, KIND, element_bits, element_metadata_bits, row_metadata_bytes, \
                       head_dim_multiple)                                                       \
    [KV_FORMAT_##ID] = {#name,                                                                  \
                        KV_KIND_##KIND,                                                         \
                        element_bits,                                                           \
                        element_metadata_bits,                                                  \
                        row_metadata_bytes,                                                     \
                        head_dim_multiple},
    KV_FORMATS(KV_FORMAT_INFO)
#undef KV_FORMAT_INFO
};

int kv_format_is_valid(kv_format format) { return (int)format >= 0 && format < KV_FORMAT_COUNT; }

int kv_dtype_is_valid(kv_dtype dtype) { return (int)dtype >= 0 && dtype < KV_DTYPE_COUNT; }

int kv_head_dim_is_valid(int32_t head_dim) {
    return head_dim > 0 && head_dim % 8 == 0 && head_dim <= KV_MAX_HEAD_DIM;
}

int kv_format_takes_head_dim(kv_format format, int32_t head_dim) {
    return kv_head_dim_is_valid(head_dim) && head_dim % infos[format].head_dim_multiple == 0;
}

const kv_format_info *kv_format_get_info(kv_format format) {
    return kv_format_is_valid(format) ? &infos[format] : NULL;
}

kv_format_kind kv_format_kind_of(kv_format format) { return infos[format].kind; }

int kv_format_is_float(kv_format format) { return infos[format].kind == KV_KIND_FLOAT; }

kv_format kv_dtype_format(kv_dtype dtype) {
    if (dtype == KV_DTYPE_F16)
        return KV_FORMAT_FP16;
    if (dtype == KV_DTYPE_BF16)
        return KV_FORMAT_BF16;
    return KV_FORMAT_FP32;
}

int64_t kv_format_code_bytes(kv_format format, int32_t head_dim) {
    return (int64_t)infos[format].element_bits * head_dim / 8;
}

int64_t kv_format_metadata_bytes(kv_format format, int32_t head_dim) {
    const kv_format_info *info = &infos[format];
    return (int64_t)info->element_metadata_bits * head_dim / 8 + info->row_metadata_bytes;
}

int64_t kv_format_row_bytes(kv_format format, int32_t head_dim) {
    return kv_format_code_bytes(format, head_dim) + kv_format_metadata_bytes(format, head_dim);
}
