/* A warp's ring of tiles: copies of keys and values as they are stored, some tiles ahead. */
#pragma once
#include "decode_layout.cuh"
#include "decode_place.cuh"

/* Copies take 16 bytes a lane (8 where rows of codes are no multiple of that), and what a lane takes
 * first is where its pointers begin. */

/* `BYTES` that lie together. */
template <s32 BYTES> KV_DEVICE void copy_bytes(u8 *to, const u8 *from, bool there) {
    static_assert(BYTES % 16 == 0, "16 bytes at once");
    const s32 lane_byte = 16 * (s32)lane_id();
#pragma unroll
    for (s32 first = 0; first < BYTES; first += 512)
        if (first + 512 <= BYTES || first + lane_byte < BYTES)
            cp_async16(to + first + lane_byte, from + first, there);
}

/* Of tiles that are not WHOLE there are few: their code is to be short. */
template <bool WHOLE> constexpr s32 UNROLL = WHOLE ? 64 : 1;

/* Rows of 16-bit floats, `stride` bytes apart, from chunk `first` on; zeros beyond the row, and for
 * keys beyond `count` unless the tile is WHOLE. */
template <bool WHOLE, s32 KEYS, s32 CHUNKS, s32 DIM>
KV_DEVICE void copy_float_rows(u8 *tile, const u8 *from, u32 stride, s32 first, s32 count) {
    const s32 lane = (s32)lane_id();
#pragma unroll UNROLL < WHOLE>
    for (s32 i = 0; i < KEYS * CHUNKS / 32; i++) {
        const s32 at = 32 * i + lane, row = at / CHUNKS, column = at % CHUNKS;
        const bool there =
            (WHOLE || row < count) && (DIM == 8 * CHUNKS || first + column < DIM / 8);
        const s64 further =
            (u64)(u32)(row - lane / CHUNKS) * stride + 16 * (column - lane % CHUNKS);
        cp_async16(chunk_of<CHUNKS>(tile, row, column), from + further, there);
    }
}

/* Codes of a row format, which lie together where they come from. */
template <bool WHOLE, s32 KEYS, s32 FORMAT, s32 DIM>
KV_DEVICE void copy_code_rows(u8 *tile, const u8 *from, s32 count) {
    constexpr s32 bytes = CODE_BYTES<FORMAT, DIM>, unit = CODE_UNIT<FORMAT, DIM>;
    constexpr s32 units = bytes / unit, pitch = CODE_PITCH<FORMAT, DIM>;
    const s32 lane = (s32)lane_id();
#pragma unroll UNROLL < WHOLE>
    for (s32 i = 0; i < (KEYS * units + 31) / 32; i++) {
        const s32 at = 32 * i + lane, row = at / units;
        if (KEYS * units % 32 && row >= KEYS)
            break;
        u8 *to = pitch == bytes ? tile + unit * at
                 : 32 % units == 0
                     ? tile + (lane / units * pitch + lane % units * unit) + 32 / units * pitch * i
                     : tile + row * pitch + at % units * unit;
        if constexpr (unit == 16)
            cp_async16(to, from + 512 * i, WHOLE || row < count);
        else
            cp_async8(to, from + 256 * i, WHOLE || row < count);
    }
}

/* Where in a block's rows what a lane copies of floats begins. */
template <s32 CHUNKS> KV_DEVICE s64 lane_offset(u32 token_stride, s32 first) {
    const s32 lane = (s32)lane_id();
    return (u64)(u32)(lane / CHUNKS) * token_stride + 16 * (first + lane % CHUNKS);
}

/* K or V as they are stored: tiles of TILE keys, CHUNKS chunks of floats each where these are not
 * encoded. */
template <s32 FORMAT, s32 CHUNKS, s32 DIM> struct Operand {
    static constexpr bool ENCODED = !IS_FLOAT<FORMAT>;
    static constexpr s32 UNIT = ENCODED ? CODE_UNIT<FORMAT, DIM> : 16;
    const u8 *from; /* of this lane, in block 0 */
    s64 block_stride, metadata;
    u32 token_stride;

    KV_DEVICE void start(const Place &place, s32 first) {
        const s32 lane = (s32)lane_id();
        block_stride = place.block_stride;
        token_stride = place.token_stride;
        from =
            opaque(place.data + (ENCODED ? UNIT * lane : lane_offset<CHUNKS>(token_stride, first)));
        metadata = place.metadata + (16 - UNIT) * lane;
    }

    /* Keys `offset` to offset + TILE - 1 of a block, of which `count` exist, into a tile. Chunk
     * `first` of floats is the tile's first. */
    template <bool WHOLE>
    KV_DEVICE void copy(u8 *tile, s32 block, s32 offset, s32 first, s32 count) const {
        const u8 *rows = from + (u64)(u32)block * block_stride;
        if constexpr (!ENCODED) {
            copy_float_rows<WHOLE, TILE, CHUNKS, DIM>(tile, rows + (u64)(u32)offset * token_stride,
                                                      token_stride, first, count);
        } else {
            const u8 *codes = rows + (u64)(u32)offset * CODE_BYTES<FORMAT, DIM>;
            if constexpr (IS_CHANNEL<FORMAT>)
                copy_bytes<GROUP_TOKENS * CODE_BYTES<FORMAT, DIM>>(tile, codes, WHOLE || count > 0);
            else
                copy_code_rows<WHOLE, TILE, FORMAT, DIM>(tile, codes, count);
            if constexpr (METADATA_BYTES<FORMAT, DIM> > 0)
                copy_bytes<TILE * METADATA_BYTES<FORMAT, DIM>>(
                    tile + TILE_METADATA<FORMAT, DIM>,
                    rows + (u64)(u32)offset * METADATA_BYTES<FORMAT, DIM> + metadata,
                    WHOLE || count > 0);
        }
    }
};

/* The blocks are looked up one tile ahead, so that no copy waits for its table. */
struct Ring {
    Operand<K_FORMAT, K_CHUNKS, HEAD_DIM> k;
    Operand<V_FORMAT, V_CHUNKS, HEAD_DIM_V> v;
    Cursor<false, WARPS> ahead; /* of the next copy */
    TableRow table;
    s32 block;
    s32 first_chunk; /* of V's slice */
    s32 end;         /* of all keys that some row sees */

    KV_DEVICE void look_up() {
        if (ahead.has_tile())
            block = table.block_of(ahead.at * TILE);
    }

    template <bool WHOLE> KV_DEVICE void copy(u8 *stage, s32 j) const {
        const s32 count = block < 0 ? 0 : end - j, offset = table.offset_of(j);
        k.template copy<WHOLE>(stage, block, offset, 0, count);
        if constexpr (!V_IN_K)
            v.template copy<WHOLE>(stage + K_TILE_BYTES, block, offset, first_chunk, count);
    }

    /* Copies the next tile, if there is one. */
    KV_DEVICE void copy_next(u8 *stage) {
        if (ahead.has_tile()) {
            const s32 j = ahead.at * TILE;
            if (block >= 0 && j + TILE <= end)
                copy<true>(stage, j);
            else
                copy<false>(stage, j);
            ahead.advance();
            look_up();
        }
        cp_async_commit();
    }
};

KV_DEVICE s32 first_chunk_of(const Work &work) {
    return V_IN_K || SLICES == 1 ? 0 : work.slice * (SLICE_DIM / 8);
}

KV_DEVICE Ring make_ring(const AttendParams &p, const Work &work,
                         const Cursor<false, WARPS> &cursor) {
    Ring ring;
    ring.first_chunk = first_chunk_of(work);
    ring.k.start(place_of(p.k, work.head, false), 0);
    ring.v.start(place_of(p.v, work.head, false), ring.first_chunk);
    ring.table = table_row(p.k, p.plan, work.seq.index, false);
    ring.ahead = cursor;
    ring.block = 0;
    ring.end = work.joint.end;
    ring.look_up();
    return ring;
}

/* Of keys j to j + RAW_TILE - 1, K or V as it is read raw; all of it found anew. */
template <s32 CHUNKS, s32 DIM>
KV_DEVICE void copy_raw_rows(const AttendParams &p, const Blocks &blocks, const Work &work,
                             u8 *tile, s32 j, s32 first) {
    const TableRow table = table_row(blocks, p.plan, work.seq.index, true);
    const Place place = place_of(blocks, work.head, true);
    const s32 block = table.block_of(j);
    const u8 *rows = place.data + (u64)(u32)block * place.block_stride +
                     (u64)(u32)table.offset_of(j) * place.token_stride;
    copy_float_rows<false, RAW_TILE, CHUNKS, DIM>(
        tile, rows + lane_offset<CHUNKS>(place.token_stride, first), place.token_stride, first,
        block < 0 ? 0 : work.joint.end - j);
}

KV_DEVICE void copy_raw_tile(const AttendParams &p, const Work &work, u8 *stage, s32 j) {
    copy_raw_rows<K_CHUNKS, HEAD_DIM>(p, p.k, work, stage, j, 0);
    copy_raw_rows<V_CHUNKS, HEAD_DIM_V>(p, p.v, work, stage + RAW_K_TILE_BYTES, j,
                                        first_chunk_of(work));
    cp_async_commit();
}
