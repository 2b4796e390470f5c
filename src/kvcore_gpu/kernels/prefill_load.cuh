/* Tiles of keys and values from their blocks into a stage of the ring. */
#pragma once
#include "prefill_layout.cuh"

/* The keys that a pass reads for some row: [0, head) and [begin, end). */
struct Wanted {
    s32 head, begin, end;
};

KV_DEVICE bool wants(const Wanted &wanted, s32 j) {
    return (j >= wanted.begin && j < wanted.end) || j < wanted.head;
}
KV_DEVICE bool wants_some(const Wanted &wanted, s32 first, s32 count) {
    return (first + count > wanted.begin && first < wanted.end) || first < wanted.head;
}

/* What K or V of one head is read from. */
struct Source {
    const Blocks &blocks;
    const Plan &plan;
    const Sequence &seq;
    s32 head;
};

/* Rows of 16-bit numbers, with zeros where nobody wants them: what is not seen may be a NaN. */
template <s32 CHUNKS, s32 DIM, bool RAW>
KV_DEVICE void load_rows(u8 *tile, const Source &from, s32 first, const Wanted &wanted) {
    const s32 in_block = RAW ? (1 << RAW_BLOCK_LOG2) - 1 : (1 << from.blocks.block_size_log2) - 1;
    const s64 stride = RAW ? from.blocks.raw_token_stride : from.blocks.token_stride;
    const s32 thread = opaque(threadIdx.x);
#pragma unroll
    for (s32 run = 0; run < KEYS; run += RUN) {
        const u8 *rows = nullptr;
        if (wants_some(wanted, first + run, RUN))
            rows = RAW ? raw_block_rows(from.blocks, from.plan, from.seq, from.head, first + run)
                       : block_rows(from.blocks, from.plan, from.seq, from.head, first + run);
#pragma unroll
        for (s32 start = 0; start < RUN * CHUNKS; start += THREADS) {
            const s32 i = start + thread, row = run + i / CHUNKS, column = i % CHUNKS;
            const s32 j = first + row;
            const bool wanted_chunk = rows && wants(wanted, j) && column < DIM / 8;
            if (start + THREADS <= RUN * CHUNKS || i < RUN * CHUNKS)
                cp_async16(chunk_of<CHUNKS>(tile, row, column),
                           rows + (j & in_block) * stride + 16 * column, wanted_chunk);
        }
    }
}

/* `bytes` of each token's from `at` on in a block's tile; tokens in no wanted run are left out. */
template <s32 BYTES, s32 TOKENS>
KV_DEVICE void load_bytes(u8 *to, const Source &from, s64 at, s32 first, const Wanted &wanted) {
    static_assert(BYTES * TOKENS % 16 == 0, "whole copies");
    const s32 in_block = (1 << from.blocks.block_size_log2) - 1;
#pragma unroll
    for (s32 run = 0; run < KEYS; run += TOKENS) {
        const s32 j = first + run;
        const u8 *tile = nullptr;
        if (wants_some(wanted, j, TOKENS))
            tile = block_rows(from.blocks, from.plan, from.seq, from.head, j);
        const u8 *bytes = tile + at + (j & in_block) * BYTES;
        for (s32 i = 16 * threadIdx.x; i < BYTES * TOKENS; i += 16 * THREADS)
            cp_async16(to + run * BYTES + i, bytes + i, tile != nullptr);
    }
}

/* Codes and then metadata, each without gaps. */
template <s32 FORMAT, s32 DIM>
KV_DEVICE void load_codes_of_tile(u8 *to, const Source &from, s32 first, const Wanted &wanted) {
    constexpr s32 tokens = IS_CHANNEL<FORMAT> ? GROUP_TOKENS : RUN;
    load_bytes<CODE_BYTES<FORMAT, DIM>, tokens>(to, from, 0, first, wanted);
    if constexpr (METADATA_BYTES<FORMAT, DIM> > 0)
        load_bytes<METADATA_BYTES<FORMAT, DIM>, tokens>(to + KEYS * CODE_BYTES<FORMAT, DIM>, from,
                                                        from.blocks.metadata_offset, first, wanted);
}

template <bool RAW>
KV_DEVICE void load_tile(const Shared &shared, s32 stage, const Source &k, const Source &v,
                         s32 first, const Wanted &wanted) {
    if constexpr (K_ENCODED<RAW>)
        load_codes_of_tile<K_FORMAT, HEAD_DIM>(k_stage<RAW>(shared, stage), k, first, wanted);
    else
        load_rows<K_CHUNKS, HEAD_DIM, RAW && K_QUANTIZED>(k_stage<RAW>(shared, stage), k, first,
                                                          wanted);
    if constexpr (V_ENCODED<RAW>)
        load_codes_of_tile<V_FORMAT, HEAD_DIM_V>(v_stage<RAW>(shared, stage), v, first, wanted);
    else
        load_rows<V_CHUNKS, HEAD_DIM_V, RAW && V_QUANTIZED>(v_stage<RAW>(shared, stage), v, first,
                                                            wanted);
    cp_async_commit();
}
