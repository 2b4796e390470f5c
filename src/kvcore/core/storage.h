/* Blocks and rows: where an element lies, and whether a caller's description of it is sound. */
#ifndef KVCORE_CORE_STORAGE_H
#define KVCORE_CORE_STORAGE_H

#include "formats.h"
#include "kernels/kernels.h"

/* The row of one slot and head. */
static inline char *kv_block_row(const kv_blocks *blocks, int32_t block, int32_t head,
                                 int32_t offset) {
    return (char *)blocks->data + block * blocks->block_stride + head * blocks->head_stride +
           offset * blocks->token_stride;
}

/* The metadata of one slot and head of a quantized format; of its group where these are sealed. */
static inline char *kv_block_metadata(const kv_blocks *blocks, int32_t block, int32_t head,
                                      int32_t offset) {
    return kv_block_row(blocks, block, head, 0) + blocks->metadata_offset +
           offset * kv_format_metadata_bytes(blocks->format, blocks->head_dim);
}

/* What encoding and decoding one head depend on. */
static inline kv_channels kv_head_channels(const kv_blocks *blocks, int32_t head) {
    const int64_t at = (int64_t)head * blocks->head_dim;
    return (kv_channels){blocks->bias ? blocks->bias + at : NULL,
                         blocks->scales ? blocks->scales + at : NULL};
}

static inline int32_t kv_dtype_bytes(kv_dtype dtype) { return dtype == KV_DTYPE_F32 ? 4 : 2; }

/* Head 0 of token i of sequence s; `starts` is used for ragged rows only. */
static inline char *kv_row(const kv_rows *rows, const int32_t *starts, int32_t s, int32_t i) {
    const int64_t token = rows->padded_length ? s * rows->sequence_stride + i * rows->token_stride
                                              : (int64_t)(starts[s] + i) * rows->token_stride;
    return (char *)rows->data + token * kv_dtype_bytes(rows->dtype);
}

kv_status kv_check_blocks(const kv_blocks *blocks);

/* One slot and head of a quantized format as float32 [head_dim]. */
void kv_decode_token(const kv_kernels *kernels, const kv_blocks *blocks, int32_t block,
                     int32_t head, int32_t offset, float *row);

/* `num_sequences` and `num_tokens` bound the addresses; rows that are written to must not overlap
 * each other. */
kv_status kv_check_rows(const kv_rows *rows, int32_t num_sequences, int32_t num_tokens,
                        int is_output);

/* query_starts begin at 0, do not decrease and end at num_tokens; no sequence has more than
 * padded_length new tokens, unless that is 0. */
kv_status kv_check_queries(const kv_plan *plan, int32_t padded_length);

/* Every id lies in [0, num_blocks): KV_ERR_RELEASED if one is -1, else KV_ERR_RANGE. */
kv_status kv_check_block_ids(const int32_t *ids, int64_t count, int32_t num_blocks);

#endif
