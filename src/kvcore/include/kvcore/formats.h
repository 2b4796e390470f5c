/* The storage formats, one row each. Every table that lists formats is made from this one.
 *
 * KV_FORMAT(ID, name, element_bits, row_metadata_bytes)
 *   element_bits        bits that one element of a row takes
 *   row_metadata_bytes  bytes a row carries beside its elements (scales, zero points)
 */
#ifndef KVCORE_FORMATS_H
#define KVCORE_FORMATS_H

#define KV_FORMATS(KV_FORMAT)    \
    KV_FORMAT(FP32, fp32, 32, 0) \
    KV_FORMAT(FP16, fp16, 16, 0) \
    KV_FORMAT(BF16, bf16, 16, 0)

#endif
