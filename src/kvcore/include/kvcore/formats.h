/* The storage formats, one row each: docs/formats.md. Every table that lists formats is made from
 * this one.
 *
 * KV_FORMAT(ID, name, KIND, element_bits, element_metadata_bits, row_metadata_bytes,
 *           head_dim_multiple)
 *   KIND                   FLOAT; ROW: each token is encoded alone; CHANNEL: groups of 32 tokens
 *                          are, channel by channel
 *   element_bits           bits of one element's code
 *   element_metadata_bits  bits of metadata that come to one element (those of groups of elements)
 *   row_metadata_bytes     bytes of metadata that come to one row
 *   head_dim_multiple      what the number of elements of a row must be a multiple of
 */
#ifndef KVCORE_FORMATS_H
#define KVCORE_FORMATS_H

#define KV_FORMATS(KV_FORMAT)                             \
    KV_FORMAT(FP32, fp32, FLOAT, 32, 0, 0, 8)             \
    KV_FORMAT(FP16, fp16, FLOAT, 16, 0, 0, 8)             \
    KV_FORMAT(BF16, bf16, FLOAT, 16, 0, 0, 8)             \
    KV_FORMAT(INT8, int8, ROW, 8, 0, 2, 16)               \
    KV_FORMAT(INT4, int4, ROW, 4, 1, 0, 32)               \
    KV_FORMAT(FP8_E4M3, fp8_e4m3, ROW, 8, 0, 2, 16)       \
    KV_FORMAT(INT8_STATIC, int8_static, ROW, 8, 0, 0, 16) \
    KV_FORMAT(ROT8, rot8, ROW, 8, 0, 2, 16)               \
    KV_FORMAT(ROT6, rot6, ROW, 6, 0, 2, 64)               \
    KV_FORMAT(ROT4, rot4, ROW, 4, 0, 2, 32)               \
    KV_FORMAT(ROT3, rot3, ROW, 3, 0, 2, 64)               \
    KV_FORMAT(ROT2, rot2, ROW, 2, 0, 2, 64)               \
    KV_FORMAT(CHAN4, chan4, CHANNEL, 4, 1, 0, 32)         \
    KV_FORMAT(CHAN2, chan2, CHANNEL, 2, 1, 0, 32)

#endif
