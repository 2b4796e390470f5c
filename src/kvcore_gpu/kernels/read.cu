/* What blocks hold, as plain rows.
 *
 *   read          tokens [start, stop) of a sequence as its next token reads them, out [T, H, D].
 *                 A row to 16 lanes, 8 tokens of a head to a block: grid ceil((stop - start) / 8),
 *                 H.
 *   restore_raw   raw rows that were lost, out of the encoded ones. Grid: num_restores, H.
 *
 * -DK_FORMAT, -DHEAD_DIM. Compiled without fused multiply-adds.
 */
#include "dequantize_row.cuh"
#include "device.cuh"
#include "formats.cuh"
#include "params.cuh"
#include "rows.cuh"
#include "storage.cuh"

constexpr s32 THREADS = 128;
constexpr s32 ROWS = THREADS / 16; /* of a block */

/* ---- read -------------------------------------------------------------------------------------- */

/* Whether the token after the sequence's last reads token j raw. */
template <s32 FORMAT> KV_DEVICE bool is_read_raw(const ReadParams &p, s32 j) {
    s32 start = raw_start(p.blocks, p.length);
    if (IS_CHANNEL<FORMAT> && start > p.length)
        start = p.length / GROUP_TOKENS * GROUP_TOKENS; /* sealed with the next token */
    return p.blocks.raw && p.raw_row && (j < p.blocks.raw_first || j >= start);
}

/* Token p.start + i. Raw rows that were lost are what restoring would make of them. */
template <s32 FORMAT, s32 D>
KV_DEVICE void read_quantized(const ReadParams &p, s32 i, s32 head, u8 *stage, bool pred) {
    const s32 j = p.start + i, size = 1 << p.blocks.block_size_log2;
    const bool is_raw = is_read_raw<FORMAT>(p, j);
    const s32 raw_block = is_raw ? p.raw_row[j / GROUP_TOKENS] : -1;
    float x[D / 16];
    decode_slot<FORMAT, D>(p.blocks, p.row[j >> p.blocks.block_size_log2], head, j & (size - 1), x);
    if (raw_block >= 0)
        load_elements<D, DTYPE_BF16>(raw_row(p.blocks, raw_block, head, j % GROUP_TOKENS), x);
    else if (is_raw)
#pragma unroll
        for (s32 k = 0; k < D / 16; k++)
            x[k] = bf16_to_f32(narrow_bf16(x[k]));
    store_row<D>(x, p.out.dtype, stage, row_at(p.out, 0, i, head), pred);
}

template <s32 FORMAT, s32 D> KV_DEVICE void read_float(const ReadParams &p, s32 i, s32 head) {
    const s32 j = p.start + i, size = 1 << p.blocks.block_size_log2;
    const s32 block = p.row[j >> p.blocks.block_size_log2];
    convert_row_from<D, DTYPE_OF<FORMAT>>(block_row(p.blocks, block, head, j & (size - 1)),
                                          row_at(p.out, 0, i, head), p.out.dtype);
}

KV_KERNEL(read, ReadParams, THREADS, 2) {
    KV_SHARED uint4 stages[ROWS][STAGE_BYTES<HEAD_DIM> / 16];
    const s32 at = (s32)(blockIdx.x * ROWS + threadIdx.x / 16), head = (s32)blockIdx.y;
    const s32 i = min(at, p.stop - p.start - 1); /* a lane without a row still takes part */
    if constexpr (!IS_FLOAT<K_FORMAT>)
        read_quantized<K_FORMAT, HEAD_DIM>(
            p, i, head, reinterpret_cast<u8 *>(stages[threadIdx.x / 16]), at == i);
    else if (at == i)
        read_float<K_FORMAT, HEAD_DIM>(p, i, head);
}

/* ---- restore ----------------------------------------------------------------------------------- */

/* Of the column's rows those that are lost. Where the encoded ones were released behind a window,
 * nothing reads the raw ones either. */
template <s32 FORMAT, s32 D>
KV_DEVICE void restore_column(const RestoreParams &p, s32 head, u8 *stage) {
    const s32 *restore = p.plan.restores + 3 * blockIdx.x;
    const s32 s = restore[0], column = restore[1], count = restore[2];
    const s32 log2 = p.blocks.block_size_log2;
    const s32 raw_block = p.plan.raw_tables[(s64)s * p.plan.raw_width + column];
    for (s32 first = 0; first < count; first += ROWS) {
        const s32 at = first + (s32)threadIdx.x / 16, i = min(at, count - 1);
        const s32 j = column * GROUP_TOKENS + i;
        const s32 block = p.plan.tables[(s64)s * p.plan.table_width + (j >> log2)];
        float x[D / 16];
        decode_slot<FORMAT, D>(p.blocks, max(block, 0), head, j & ((1 << log2) - 1), x);
        store_row<D>(x, DTYPE_BF16, stage, raw_row(p.blocks, raw_block, head, i),
                     at < count && block >= 0);
    }
}

KV_KERNEL(restore_raw, RestoreParams, THREADS, 2) {
    KV_SHARED uint4 stages[ROWS][STAGE_BYTES<HEAD_DIM> / 16];
    if constexpr (!IS_FLOAT<K_FORMAT>)
        restore_column<K_FORMAT, HEAD_DIM>(p, (s32)blockIdx.y,
                                           reinterpret_cast<u8 *>(stages[threadIdx.x / 16]));
}
