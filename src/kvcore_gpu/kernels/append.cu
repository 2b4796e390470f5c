/* New rows of K and V into their slots: encoded, and raw where a quantized cache keeps raw rows.
 *
 *   append   a row (one token and head) to 16 lanes, 8 tokens of a head to a block; K and V in one
 *            launch. Grid: ceil(T / 8), H, 2 (1 where V lies in K). A row is read and written once,
 *            by 16 bytes; all between happens in registers, but for two passes through shared
 *            memory, which turn 16 bytes of a lane into every 16th element and back. The floor is
 *            those bytes over the memory's bandwidth.
 *   seal     channel formats, which are for keys: the groups of 32 tokens that the step completes,
 *            from their raw rows, after append. A group and head to a block, a channel to a lane.
 *            Grid: the most groups that a sequence can complete, ceil(max_new / 32); H; S. Blocks
 *            without a group leave.
 *
 * -DK_FORMAT, -DHEAD_DIM of K and -DV_FORMAT, -DHEAD_DIM_V of V (where it lies in K, the same as
 * K's). Compiled without fused multiply-adds.
 */
#include "device.cuh"
#include "encode.cuh"
#include "encode_group.cuh"
#include "formats.cuh"
#include "params.cuh"
#include "rows.cuh"
#include "storage.cuh"

constexpr s32 THREADS = 128;
constexpr s32 ROWS = THREADS / 16; /* of a block */

/* ---- rows -------------------------------------------------------------------------------------- */

/* Without `pred` nothing is stored. */
template <s32 FORMAT, s32 D>
KV_DEVICE void append_quantized(const Rows &rows, const Blocks &blocks, const AppendParams &p,
                                s32 t, s32 head, u8 *stage, bool pred) {
    const s32 slot = p.plan.slots[t], raw_slot = blocks.raw ? p.plan.raw_slots[t] : -1;
    const s32 size = 1 << blocks.block_size_log2;
    float x[D / 16];
    load_row<D>(new_row(rows, p.plan, t, head), rows.dtype, stage, x);
    if (!saturate_row<D>(x) && pred && !blocks.saturate)
        *p.not_finite = 1;
    if (blocks.raw)
        store_row<D>(x, DTYPE_BF16, stage,
                     raw_row(blocks, raw_slot / GROUP_TOKENS, head, raw_slot % GROUP_TOKENS),
                     pred && raw_slot >= 0);
    if constexpr (IS_ROW<FORMAT>) {
        const s32 block = slot >> blocks.block_size_log2, offset = slot & (size - 1);
        encode_row<FORMAT, D, access_size(CODE_BYTES<FORMAT, D>)>(
            x, channels_of_head<D>(blocks, head), stage, block_row(blocks, block, head, offset),
            block_metadata<FORMAT, D>(blocks, block, head, offset), pred && slot >= 0);
    }
}

template <s32 FORMAT, s32 D>
KV_DEVICE void append_row(const Rows &rows, const Blocks &blocks, const AppendParams &p,
                          u8 *stage) {
    const s32 at = (s32)(blockIdx.x * ROWS + threadIdx.x / 16), head = (s32)blockIdx.y;
    const s32 t = min(at, p.plan.num_tokens - 1); /* a lane without a row still takes part */
    const bool mine = at == t;
    if constexpr (!IS_FLOAT<FORMAT>) {
        append_quantized<FORMAT, D>(rows, blocks, p, t, head, stage, mine);
    } else {
        const s32 slot = p.plan.slots[t], size = 1 << blocks.block_size_log2;
        if (mine && slot >= 0)
            convert_row_to<D, DTYPE_OF<FORMAT>>(
                new_row(rows, p.plan, t, head), rows.dtype,
                block_row(blocks, slot >> blocks.block_size_log2, head, slot & (size - 1)));
    }
}

KV_KERNEL(append, AppendParams, THREADS, 4) {
    constexpr s32 widest = HEAD_DIM > HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V;
    KV_SHARED uint4 stages[ROWS][STAGE_BYTES<widest> / 16];
    u8 *stage = reinterpret_cast<u8 *>(stages[threadIdx.x / 16]);
    const bool is_v = blockIdx.z != 0;
    if constexpr (K_FORMAT == V_FORMAT && HEAD_DIM == HEAD_DIM_V)
        append_row<K_FORMAT, HEAD_DIM>(is_v ? p.v : p.k, is_v ? p.v_blocks : p.k_blocks, p, stage);
    else if (is_v)
        append_row<V_FORMAT, HEAD_DIM_V>(p.v, p.v_blocks, p, stage);
    else
        append_row<K_FORMAT, HEAD_DIM>(p.k, p.k_blocks, p, stage);
}

/* ---- sealed groups ----------------------------------------------------------------------------- */

/* Of the groups that sequence s completes with this step, number blockIdx.x. */
template <s32 FORMAT, s32 D>
KV_DEVICE void seal_group(const Blocks &blocks, const Plan &plan, s32 s, s32 head) {
    const s32 num_new = plan.query_starts[s + 1] - plan.query_starts[s];
    const s32 column = (plan.seq_lens[s] - num_new) / GROUP_TOKENS + (s32)blockIdx.x;
    if (column >= plan.seq_lens[s] / GROUP_TOKENS)
        return;
    const s32 start = column * GROUP_TOKENS, size = 1 << blocks.block_size_log2;
    const s32 raw_block = plan.raw_tables[(s64)s * plan.raw_width + column];
    const s32 block = plan.tables[(s64)s * plan.table_width + (start >> blocks.block_size_log2)];
    const bool leave_out = column == 0 && blocks.raw_first < GROUP_TOKENS;
    const GroupRows<DTYPE_BF16> rows = {raw_row(blocks, raw_block, head, 0),
                                        (s32)blocks.raw_token_stride,
                                        leave_out ? blocks.raw_first : 0};
    encode_group<FORMAT, D>(rows, channels_of_head<D>(blocks, head).bias, (s32)warp_id(),
                            THREADS / 32, block_row(blocks, block, head, start & (size - 1)),
                            block_metadata<FORMAT, D>(blocks, block, head, start & (size - 1)));
}

KV_KERNEL(seal, AppendParams, THREADS, 2) {
    if constexpr (IS_CHANNEL<K_FORMAT>)
        seal_group<K_FORMAT, HEAD_DIM>(p.k_blocks, p.plan, (s32)blockIdx.z, (s32)blockIdx.y);
}
