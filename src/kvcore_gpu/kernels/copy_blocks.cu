/* Runs a plan's copies on K or V of one layer: block (copy, head, part), of 128 threads. The parts
 * of a tile share its rows.
 *
 * Macros: BLOCK_FORMAT, HEAD_DIM.
 */
#include "device.cuh"

#include "formats.cuh"
#include "params.cuh"
#include "rows.cuh"

template <s32 ROW_BYTES>
KV_DEVICE void copy_rows(u8 *to, const u8 *from, s32 num_rows, s64 row_stride) {
    using Unit = typename AccessOf<access_size(ROW_BYTES)>::Type;
    constexpr u32 units = ROW_BYTES / sizeof(Unit);
    const u32 count = (u32)num_rows * units, step = gridDim.z * blockDim.x;
    for (u32 i = blockIdx.z * blockDim.x + threadIdx.x; i < count; i += step) {
        const s64 at = i / units * row_stride + i % units * (s64)sizeof(Unit);
        *reinterpret_cast<Unit *>(to + at) = *reinterpret_cast<const Unit *>(from + at);
    }
}

KV_KERNEL(copy_blocks, CopyParams, 128, 8) {
    const s32 *copy = p.plan.copies + 3 * blockIdx.x;
    const s64 head = blockIdx.y * p.blocks.head_stride;
    const u8 *from = p.blocks.data + copy[0] * p.blocks.block_stride + head;
    u8 *to = p.blocks.data + copy[1] * p.blocks.block_stride + head;
    s32 num_rows = copy[2];
    if constexpr (IS_CHANNEL<BLOCK_FORMAT>) /* of a group all, as none of it can be read alone */
        num_rows = (num_rows + GROUP_TOKENS - 1) / GROUP_TOKENS * GROUP_TOKENS;
    copy_rows<CODE_BYTES<BLOCK_FORMAT, HEAD_DIM>>(to, from, num_rows, p.blocks.token_stride);
    if constexpr (!IS_FLOAT<BLOCK_FORMAT>) {
        constexpr s32 bytes = METADATA_BYTES<BLOCK_FORMAT, HEAD_DIM>;
        if constexpr (bytes > 0)
            copy_rows<bytes>(to + p.blocks.metadata_offset, from + p.blocks.metadata_offset,
                             num_rows, bytes);
    }
}
