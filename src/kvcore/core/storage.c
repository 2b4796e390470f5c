#include "storage.h"

#include "raw_rows.h"

static int is_power_of_two(int32_t n) { return n > 0 && (n & (n - 1)) == 0; }

/* Sealed groups lie within a block. */
static int fits_format(kv_format format, int32_t head_dim, int32_t block_size) {
    return kv_format_takes_head_dim(format, head_dim) &&
           (kv_format_kind_of(format) != KV_KIND_CHANNEL || block_size >= KV_RAW_BLOCK_SIZE);
}

/* Bytes of one block and head from the first to the last; returns whether they overflow. */
static int find_tile_bytes(const kv_blocks *blocks, int64_t *nbytes) {
    const int64_t row_bytes = kv_format_row_bytes(blocks->format, blocks->head_dim);
    if (!kv_format_is_float(blocks->format))
        return __builtin_mul_overflow(row_bytes, blocks->block_size, nbytes);
    return __builtin_mul_overflow(blocks->token_stride, blocks->block_size - 1, nbytes) ||
           __builtin_add_overflow(*nbytes, row_bytes, nbytes);
}

kv_status kv_blocks_init(kv_blocks *out, void *data, kv_format format, int32_t num_blocks,
                         int32_t num_heads, int32_t block_size, int32_t head_dim) {
    if (!out)
        return KV_ERR_NULL;
    if (!kv_format_is_valid(format) || num_blocks <= 0 || num_heads <= 0 ||
        !is_power_of_two(block_size) || block_size < 16 ||
        !fits_format(format, head_dim, block_size))
        return KV_ERR_VALUE;
    kv_blocks blocks = {.data = data,
                        .format = format,
                        .num_blocks = num_blocks,
                        .num_heads = num_heads,
                        .block_size = block_size,
                        .head_dim = head_dim};
    int64_t nbytes;
    blocks.token_stride = kv_format_code_bytes(format, head_dim);
    if (!kv_format_is_float(format))
        blocks.metadata_offset = block_size * blocks.token_stride;
    if (__builtin_mul_overflow(kv_format_row_bytes(format, head_dim), block_size,
                               &blocks.head_stride) ||
        __builtin_mul_overflow(blocks.head_stride, num_heads, &blocks.block_stride) ||
        __builtin_mul_overflow(blocks.block_stride, num_blocks, &nbytes))
        return KV_ERR_OVERFLOW;
    *out = blocks;
    return KV_OK;
}

/* From the first byte to the last, whatever the strides; -1 for blocks that are not valid. */
int64_t kv_blocks_nbytes(const kv_blocks *blocks) {
    int64_t heads, tile, nbytes;
    if (!blocks || !kv_format_is_valid(blocks->format) || blocks->num_blocks <= 0 ||
        blocks->num_heads <= 0 || blocks->block_size <= 0 || blocks->head_dim <= 0)
        return -1;
    if (__builtin_mul_overflow(blocks->block_stride, blocks->num_blocks - 1, &nbytes) ||
        __builtin_mul_overflow(blocks->head_stride, blocks->num_heads - 1, &heads) ||
        find_tile_bytes(blocks, &tile) || __builtin_add_overflow(nbytes, heads, &nbytes) ||
        __builtin_add_overflow(nbytes, tile, &nbytes))
        return -1;
    return nbytes;
}

static int stride_is_sound(int64_t stride, int32_t extent, int64_t row_bytes, int32_t alignment) {
    return extent == 1 || (stride >= row_bytes && stride % alignment == 0);
}

static kv_status check_strides(const kv_blocks *blocks) {
    const int is_float = kv_format_is_float(blocks->format);
    const int64_t row_bytes = kv_format_row_bytes(blocks->format, blocks->head_dim);
    const int64_t code_bytes = kv_format_code_bytes(blocks->format, blocks->head_dim);
    const int64_t least = is_float ? row_bytes : blocks->block_size * row_bytes;
    const int32_t alignment = blocks->format == KV_FORMAT_FP32 ? 4 : 2;
    if ((uintptr_t)blocks->data % (uintptr_t)alignment != 0 ||
        !stride_is_sound(blocks->block_stride, blocks->num_blocks, least, alignment) ||
        !stride_is_sound(blocks->head_stride, blocks->num_heads, least, alignment))
        return KV_ERR_VALUE;
    if (is_float)
        return stride_is_sound(blocks->token_stride, blocks->block_size, row_bytes, alignment)
                   ? KV_OK
                   : KV_ERR_VALUE;
    return blocks->token_stride == code_bytes &&
                   blocks->metadata_offset == blocks->block_size * code_bytes
               ? KV_OK
               : KV_ERR_VALUE;
}

/* What a quantized format needs beside its codes. */
static kv_status check_quantized(const kv_blocks *blocks) {
    const kv_blocks *raw = blocks->raw;
    if (blocks->format == KV_FORMAT_INT8_STATIC && !blocks->scales)
        return KV_ERR_NULL;
    if (!raw)
        return kv_format_kind_of(blocks->format) == KV_KIND_CHANNEL ? KV_ERR_NULL : KV_OK;
    if (kv_format_is_float(blocks->format) || raw->raw || raw->format != KV_FORMAT_BF16 ||
        raw->block_size != KV_RAW_BLOCK_SIZE || raw->num_heads != blocks->num_heads ||
        raw->head_dim != blocks->head_dim || blocks->raw_first < 0 ||
        blocks->raw_first > KV_RAW_BLOCK_SIZE || blocks->raw_last < 0 ||
        blocks->raw_last % KV_RAW_BLOCK_SIZE != 0)
        return KV_ERR_VALUE;
    return kv_check_blocks(raw);
}

kv_status kv_check_blocks(const kv_blocks *blocks) {
    kv_status status;
    if (!blocks || !blocks->data)
        return KV_ERR_NULL;
    if (!kv_format_is_valid(blocks->format) || blocks->num_blocks <= 0 || blocks->num_heads <= 0 ||
        !is_power_of_two(blocks->block_size) || blocks->block_size < 16 ||
        !fits_format(blocks->format, blocks->head_dim, blocks->block_size))
        return KV_ERR_VALUE;
    if ((status = check_strides(blocks)) != KV_OK || (status = check_quantized(blocks)) != KV_OK)
        return status;
    return kv_blocks_nbytes(blocks) < 0 ? KV_ERR_OVERFLOW : KV_OK;
}

void kv_decode_token(const kv_kernels *kernels, const kv_blocks *blocks, int32_t block,
                     int32_t head, int32_t offset, float *row) {
    const int sealed = kv_format_kind_of(blocks->format) == KV_KIND_CHANNEL;
    const int32_t first = sealed ? offset % KV_RAW_BLOCK_SIZE : 0, start = offset - first;
    const kv_channels channels = kv_head_channels(blocks, head);
    kernels->decode(blocks->format, kv_block_row(blocks, block, head, start),
                    kv_block_metadata(blocks, block, head, start), first, 1, blocks->head_dim,
                    &channels, row, blocks->head_dim);
}

/* Whether extent * stride elements can be addressed. */
static int can_address(int64_t extent, int64_t stride) {
    int64_t elements;
    return !__builtin_mul_overflow(extent, stride, &elements) && elements < INT64_MAX / 16 &&
           elements > INT64_MIN / 16;
}

static int overlaps(int64_t stride, int64_t extent, int32_t head_dim) {
    return extent > 1 && stride < head_dim && stride > -head_dim;
}

kv_status kv_check_rows(const kv_rows *rows, int32_t num_sequences, int32_t num_tokens,
                        int is_output) {
    if (!rows)
        return KV_ERR_NULL;
    if (!kv_dtype_is_valid(rows->dtype) || rows->num_heads <= 0 ||
        !kv_head_dim_is_valid(rows->head_dim) || rows->padded_length < 0)
        return KV_ERR_VALUE;
    const int64_t tokens = rows->padded_length ? rows->padded_length : num_tokens;
    const int64_t sequences = rows->padded_length ? num_sequences : 1;
    if (tokens == 0 || sequences == 0) /* an empty array's pointer and strides mean nothing */
        return KV_OK;
    if (!rows->data)
        return KV_ERR_NULL;
    if ((uintptr_t)rows->data % (uintptr_t)kv_dtype_bytes(rows->dtype) != 0)
        return KV_ERR_VALUE;
    if (!can_address(tokens, rows->token_stride) ||
        !can_address(sequences, rows->sequence_stride) ||
        !can_address(rows->num_heads, rows->head_stride))
        return KV_ERR_OVERFLOW;
    if (is_output && (overlaps(rows->token_stride, tokens, rows->head_dim) ||
                      overlaps(rows->sequence_stride, sequences, rows->head_dim) ||
                      overlaps(rows->head_stride, rows->num_heads, rows->head_dim)))
        return KV_ERR_VALUE;
    return KV_OK;
}

kv_status kv_check_queries(const kv_plan *plan, int32_t padded_length) {
    if (plan->num_sequences < 0 || plan->num_tokens < 0)
        return KV_ERR_VALUE;
    if (!plan->query_starts)
        return KV_ERR_NULL;
    if (plan->query_starts[0] != 0 || plan->query_starts[plan->num_sequences] != plan->num_tokens)
        return KV_ERR_RANGE;
    /* First all starts, so that no difference below overflows. */
    for (int32_t s = 0; s < plan->num_sequences; s++)
        if (plan->query_starts[s] < 0 || plan->query_starts[s + 1] < plan->query_starts[s])
            return KV_ERR_RANGE;
    for (int32_t s = 0; s < plan->num_sequences && padded_length > 0; s++)
        if (plan->query_starts[s + 1] - plan->query_starts[s] > padded_length)
            return KV_ERR_RANGE;
    return KV_OK;
}

kv_status kv_check_block_ids(const int32_t *ids, int64_t count, int32_t num_blocks) {
    int outside = 0; /* no early exit, so that the loop runs in vectors */
    for (int64_t i = 0; i < count; i++)
        outside |= (uint32_t)ids[i] >= (uint32_t)num_blocks;
    if (!outside)
        return KV_OK;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] == -1)
            return KV_ERR_RELEASED;
    return KV_ERR_RANGE;
}
