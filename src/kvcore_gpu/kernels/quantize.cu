/* Plain arrays of rows to codes and back, as ops.quantize has them: the codes of a row (of 32 rows
 * where a format seals groups), then its metadata.
 *
 *   quantize     8 rows a block, each to 16 lanes: grid ceil(num_rows / 8); groups: one a block,
 *                grid num_rows / 32.
 *   dequantize   8 rows a block.
 *
 * -DK_FORMAT, -DHEAD_DIM. Compiled without fused multiply-adds.
 */
#include "dequantize_row.cuh"
#include "device.cuh"
#include "encode.cuh"
#include "encode_group.cuh"
#include "formats.cuh"
#include "params.cuh"
#include "rows.cuh"
#include "storage.cuh"

constexpr s32 THREADS = 128;
constexpr s32 ROWS = THREADS / 16; /* of a block */

/* A row, or a group, with its metadata behind its codes. */
template <s32 FORMAT> constexpr s32 UNIT_ROWS = IS_CHANNEL<FORMAT> ? GROUP_TOKENS : 1;
template <s32 FORMAT, s32 D> constexpr s32 CODES = UNIT_ROWS<FORMAT> * CODE_BYTES<FORMAT, D>;
template <s32 FORMAT, s32 D>
constexpr s32 UNIT_BYTES = CODES<FORMAT, D> + UNIT_ROWS<FORMAT> * METADATA_BYTES<FORMAT, D>;

/* The row of these 16 lanes, and whether it is theirs to store. */
struct Place {
    s64 row;
    bool mine;
};

KV_DEVICE Place place_of_row(s64 num_rows) {
    const s64 i = (s64)blockIdx.x * ROWS + threadIdx.x / 16;
    return {min(i, num_rows - 1), i < num_rows};
}

template <s32 D> KV_DEVICE u8 *plain_row(const QuantizeParams &p, s64 row) {
    return static_cast<u8 *>(p.rows) + row * D * dtype_bytes(p.dtype);
}

/* ---- quantize ---------------------------------------------------------------------------------- */

/* Whether the row was finite. */
template <s32 FORMAT, s32 D> KV_DEVICE bool quantize_row(const QuantizeParams &p, u8 *stage) {
    const Place place = place_of_row(p.num_rows);
    u8 *out = p.codes + place.row * UNIT_BYTES<FORMAT, D>;
    float x[D / 16];
    load_row<D>(plain_row<D>(p, place.row), p.dtype, stage, x);
    const bool finite = saturate_row<D>(x);
    encode_row<FORMAT, D, access_size(UNIT_BYTES<FORMAT, D>)>(x, {p.bias, p.scales}, stage, out,
                                                              out + CODES<FORMAT, D>, place.mine);
    return finite;
}

template <s32 FORMAT, s32 D, s32 DTYPE> KV_DEVICE bool quantize_group(const QuantizeParams &p) {
    const s64 group = blockIdx.x;
    const GroupRows<DTYPE> rows = {plain_row<D>(p, group * GROUP_TOKENS), D * dtype_bytes(DTYPE),
                                   0};
    u8 *out = p.codes + group * UNIT_BYTES<FORMAT, D>;
    return encode_group<FORMAT, D>(rows, p.bias, (s32)warp_id(), THREADS / 32, out,
                                   out + CODES<FORMAT, D>);
}

template <s32 FORMAT, s32 D> KV_DEVICE bool quantize_any_group(const QuantizeParams &p) {
    if (p.dtype == DTYPE_F32)
        return quantize_group<FORMAT, D, DTYPE_F32>(p);
    if (p.dtype == DTYPE_F16)
        return quantize_group<FORMAT, D, DTYPE_F16>(p);
    return quantize_group<FORMAT, D, DTYPE_BF16>(p);
}

template <s32 FORMAT, s32 D> KV_DEVICE void narrow_row(const QuantizeParams &p) {
    const Place place = place_of_row(p.num_rows);
    if (place.mine)
        convert_row_to<D, DTYPE_OF<FORMAT>>(plain_row<D>(p, place.row), p.dtype,
                                            p.codes + place.row * UNIT_BYTES<FORMAT, D>);
}

KV_KERNEL(quantize, QuantizeParams, THREADS, 4) {
    KV_SHARED uint4 stages[ROWS][STAGE_BYTES<HEAD_DIM> / 16];
    bool finite = true;
    if constexpr (IS_FLOAT<K_FORMAT>)
        narrow_row<K_FORMAT, HEAD_DIM>(p);
    else if constexpr (IS_CHANNEL<K_FORMAT>)
        finite = quantize_any_group<K_FORMAT, HEAD_DIM>(p);
    else
        finite =
            quantize_row<K_FORMAT, HEAD_DIM>(p, reinterpret_cast<u8 *>(stages[threadIdx.x / 16]));
    if (!finite)
        *p.not_finite = 1;
}

/* ---- dequantize -------------------------------------------------------------------------------- */

template <s32 FORMAT, s32 D> KV_DEVICE void dequantize_row(const QuantizeParams &p, u8 *stage) {
    const Place place = place_of_row(p.num_rows);
    const u8 *codes = p.codes + place.row / UNIT_ROWS<FORMAT> * UNIT_BYTES<FORMAT, D>;
    float x[D / 16];
    decode_row<FORMAT, D>(codes, codes + CODES<FORMAT, D>, (s32)(place.row % UNIT_ROWS<FORMAT>),
                          {p.bias, p.scales}, x);
    store_row<D>(x, p.dtype, stage, plain_row<D>(p, place.row), place.mine);
}

template <s32 FORMAT, s32 D> KV_DEVICE void widen_row(const QuantizeParams &p) {
    const Place place = place_of_row(p.num_rows);
    if (place.mine)
        convert_row_from<D, DTYPE_OF<FORMAT>>(p.codes + place.row * UNIT_BYTES<FORMAT, D>,
                                              plain_row<D>(p, place.row), p.dtype);
}

KV_KERNEL(dequantize, QuantizeParams, THREADS, 2) {
    KV_SHARED uint4 stages[ROWS][STAGE_BYTES<HEAD_DIM> / 16];
    if constexpr (IS_FLOAT<K_FORMAT>)
        widen_row<K_FORMAT, HEAD_DIM>(p);
    else
        dequantize_row<K_FORMAT, HEAD_DIM>(p, reinterpret_cast<u8 *>(stages[threadIdx.x / 16]));
}
