/* Tiles of keys and values from their blocks into a stage of the ring. */
#pragma once
#include "prefill_layout.cuh"

/* What a tile is to have of the keys that a pass wants. Where it has some of both ranges, keys between are loaded too, if
 * their block is there. */
struct Range {
    s32 begin, end;
};

KV_DEVICE Range range_of(const Wanted &wanted, s32 first) {
    return {first < wanted.head ? 0 : wanted.begin,
            first + KEYS > wanted.begin && first < wanted.end ? wanted.end : wanted.head};
}
KV_DEVICE bool holds(const Range &range, s32 j) {
    return (u32)(j - range.begin) < (u32)(range.end - range.begin);
}

/* The first key of tile i. */
KV_DEVICE s32 first_key(const Tiles &tiles, s32 i) {
    return KEYS * (i < tiles.head ? 0 : tiles.first + i - tiles.head);
}

/* The blocks of a tile's runs, one tile before their rows are copied: nothing waits for a table. */
KV_DEVICE void look_up(const AttendParams &p, const Sequence &seq, Pass &pass, s32 stage, s32 first,
                       bool raw) {
    const s32 run = threadIdx.x & 3, j = first + RUN * run;
    if (threadIdx.x < 4 && run < RUNS)
        cp_async4(&pass.blocks[stage][0][run],
                  p.plan.tables + (s64)seq.index * p.plan.table_width + (j >> p.k.block_size_log2),
                  j < pass.wanted.end || j < pass.wanted.head);
    else if (QUANTIZED && raw && threadIdx.x < 8 && run < RUNS)
        cp_async4(&pass.blocks[stage][1][run],
                  p.plan.raw_tables + (s64)seq.index * p.plan.raw_width + (j >> RAW_BLOCK_LOG2),
                  j < pass.wanted.end || j < pass.wanted.head);
}

/* The block of run `lane` % RUNS of a tile, by each lane; -1: there is none, or nobody wants it. */
KV_DEVICE s32 block_of_lane(const Pass &pass, s32 stage, bool is_raw, s32 first,
                            const Range &range) {
    constexpr s32 tokens = IS_CHANNEL<K_FORMAT> ? GROUP_TOKENS : RUN; /* loaded as one */
    const s32 run = lane_id() % RUNS, start = first + RUN * run & -tokens;
    const bool wanted = start + tokens > range.begin && start < range.end;
    return wanted ? pass.blocks[stage][is_raw][run] : -1;
}

/* The chunks of 16 bytes of a tile that a thread copies: numbers i, i + THREADS, ... in order of
 * rows. Where it pays, all of a thread's lie in one column and in rows of one swizzle. */
template <s32 CHUNKS>
constexpr bool IN_COLUMNS = RUN * CHUNKS % THREADS == 0 && THREADS % (8 * CHUNKS) == 0;

/* Rows of 16-bit numbers, with zeros where nobody wants them: what is not seen may be a NaN. Those of
 * a quantized format are raw ones. */
template <s32 CHUNKS, s32 DIM, bool IS_QUANTIZED>
KV_DEVICE void load_rows(u8 *tile, const Blocks &blocks, s32 head, s32 block, s32 first,
                         const Range &range) {
    const s64 stride = IS_QUANTIZED ? blocks.raw_token_stride : blocks.token_stride;
    const s32 size = IS_QUANTIZED ? 1 << RAW_BLOCK_LOG2 : 1 << blocks.block_size_log2;
    const u32 there = ballot(block >= 0);
    /* Of the run with the lane's number. */
    const u8 *rows =
        IS_QUANTIZED ? blocks.raw + head * blocks.raw_head_stride + block * blocks.raw_block_stride
                     : blocks.data + head * blocks.head_stride + block * blocks.block_stride;
    rows += (u32)(first + RUN * (lane_id() % RUNS) & size - 1) * stride;
    const u32 thread = opaque(threadIdx.x);
    const s32 rest = range.end - range.begin, before = first - range.begin;
    if constexpr (IN_COLUMNS<CHUNKS>) {
        const u32 row = thread / CHUNKS, column = thread % CHUNKS;
        constexpr s32 step = THREADS / CHUNKS;
        u8 *const to = chunk_of<CHUNKS>(tile, row, column);
        const s64 offset = row * stride + 16 * column;
#pragma unroll
        for (s32 run = 0; run < KEYS; run += RUN) {
            const u8 *from =
                reinterpret_cast<const u8 *>(shfl(reinterpret_cast<u64>(rows), run / RUN)) + offset;
            const bool wanted = there >> run / RUN & 1 && column < DIM / 8;
#pragma unroll
            for (s32 at = 0; at < RUN; at += step)
                cp_async16(to + 16 * TILE_PITCH<CHUNKS> * (run + at), from + at * stride,
                           wanted && (u32)(before + run + at + (s32)row) < (u32)rest);
        }
    } else {
#pragma unroll 1
        for (u32 start = 0; start < KEYS * CHUNKS; start += THREADS) {
            const u32 i = start + thread, row = i / CHUNKS, column = i % CHUNKS;
            const u8 *from =
                reinterpret_cast<const u8 *>(shfl(reinterpret_cast<u64>(rows), row / RUN));
            const bool wanted = there >> row / RUN & 1 && column < DIM / 8;
            if (i < KEYS * CHUNKS)
                cp_async16(chunk_of<CHUNKS>(tile, row, column),
                           from + row % RUN * stride + 16 * column,
                           wanted && (u32)(before + (s32)row) < (u32)rest);
        }
    }
}

/* BYTES of each token's from `at` on in a block's tile, TOKENS of them side by side in any block;
 * zeros for tokens in no wanted run. */
template <s32 BYTES, s32 TOKENS>
KV_DEVICE void load_bytes(u8 *to, const Blocks &blocks, s32 head, s64 at, s32 block, s32 first) {
    static_assert(BYTES * TOKENS % 16 == 0, "whole copies");
    constexpr u32 chunks = BYTES * TOKENS / 16, total = BYTES * KEYS / 16;
    const u32 there = ballot(block >= 0);
    const s32 in_block = first + RUN * (lane_id() % RUNS) & (1 << blocks.block_size_log2) - 1;
    /* Of the run with the lane's number. */
    const u8 *bytes = blocks.data + head * blocks.head_stride + at + block * blocks.block_stride +
                      in_block * BYTES;
    const u32 thread = opaque(threadIdx.x);
#pragma unroll
    for (u32 start = 0; start < total; start += THREADS) {
        const u32 i = start + thread, run = i / chunks * (TOKENS / RUN);
        const u8 *from = reinterpret_cast<const u8 *>(shfl(reinterpret_cast<u64>(bytes), run));
        if (start + THREADS <= total || i < total)
            cp_async16(to + 16 * i, from + 16 * (i % chunks), there >> run & 1);
    }
}

/* Codes and then metadata, each without gaps. */
template <s32 FORMAT, s32 DIM>
KV_DEVICE void load_codes_of_tile(u8 *to, const Blocks &blocks, s32 head, s32 block, s32 first) {
    constexpr s32 tokens = IS_CHANNEL<FORMAT> ? GROUP_TOKENS : RUN;
    load_bytes<CODE_BYTES<FORMAT, DIM>, tokens>(to, blocks, head, 0, block, first);
    if constexpr (METADATA_BYTES<FORMAT, DIM> > 0)
        load_bytes<METADATA_BYTES<FORMAT, DIM>, tokens>(to + KEYS * CODE_BYTES<FORMAT, DIM>, blocks,
                                                        head, blocks.metadata_offset, block, first);
}

template <s32 FORMAT, s32 CHUNKS, s32 DIM>
KV_DEVICE void load_operand(u8 *to, const Blocks &blocks, const Pass &pass, s32 stage, s32 head,
                            s32 first, const Range &range, bool raw) {
    constexpr bool is_quantized = !IS_FLOAT<FORMAT>;
    const s32 block = block_of_lane(pass, stage, is_quantized && raw, first, range);
    if constexpr (is_quantized)
        if (!raw) {
            load_codes_of_tile<FORMAT, DIM>(to, blocks, head, block, first);
            return;
        }
    load_rows<CHUNKS, DIM, is_quantized>(to, blocks, head, block, first, range);
}

KV_DEVICE void load_tile(const AttendParams &p, const Shared &shared, s32 stage, s32 head,
                         s32 first, bool raw) {
    const Pass &pass = *shared.pass;
    const Range range = range_of(pass.wanted, first);
    load_operand<K_FORMAT, K_CHUNKS, HEAD_DIM>(k_stage(shared, raw, stage), p.k, pass, stage, head,
                                               first, range, raw);
    load_operand<V_FORMAT, V_CHUNKS, HEAD_DIM_V>(v_stage(shared, raw, stage), p.v, pass, stage,
                                                 head, first, range, raw);
}
