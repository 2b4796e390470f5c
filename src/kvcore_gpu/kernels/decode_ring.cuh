/* A warp's ring of tiles: copies of keys and values as they are stored, some tiles ahead. */
#pragma once
#include "decode_layout.cuh"
#include "decode_place.cuh"

/* `bytes` that lie together. */
template <s32 BYTES> KV_DEVICE void copy_bytes(u8 *to, const u8 *from, bool there) {
    static_assert(BYTES % 16 == 0, "16 bytes at once");
#pragma unroll
    for (s32 first = 0; first < BYTES; first += 512) {
        const s32 at = first + 16 * lane_id();
        if (at < BYTES)
            cp_async16(to + at, from + at, there);
    }
}

/* Rows of 16-bit floats, from chunk `first` on; zeros beyond the row, and for keys beyond `count`. */
template <s32 CHUNKS, s32 DIM>
KV_DEVICE void copy_float_rows(u8 *tile, const u8 *rows, s64 stride, s32 first, s32 count) {
#pragma unroll
    for (s32 i = 0; i < TILE * CHUNKS / 32; i++) {
        const s32 at = 32 * i + lane_id(), row = at / CHUNKS, column = at % CHUNKS;
        const bool there = row < count && first + column < DIM / 8;
        cp_async16(chunk_of<CHUNKS>(tile, row, column), rows + row * stride + 16 * (first + column),
                   there);
    }
}

/* Codes of a row format and their metadata, which both lie together. */
template <s32 FORMAT, s32 DIM>
KV_DEVICE void copy_code_rows(u8 *tile, const u8 *codes, const u8 *metadata, s32 count) {
    constexpr s32 bytes = CODE_BYTES<FORMAT, DIM>, unit = bytes % 16 ? 8 : 16;
    constexpr s32 units = bytes / unit;
#pragma unroll
    for (s32 i = 0; i < (TILE * units + 31) / 32; i++) {
        const s32 at = 32 * i + lane_id(), row = at / units;
        if (TILE * units % 32 && row >= TILE)
            break;
        u8 *to = tile + row * CODE_PITCH<FORMAT, DIM> + at % units * unit;
        if constexpr (unit == 16)
            cp_async16(to, codes + 16 * at, row < count);
        else
            cp_async8(to, codes + 8 * at, row < count);
    }
    if constexpr (METADATA_BYTES<FORMAT, DIM> > 0)
        copy_bytes<TILE * METADATA_BYTES<FORMAT, DIM>>(tile + TILE_METADATA<FORMAT, DIM>, metadata,
                                                       count > 0);
}

/* Keys j to j + TILE - 1 of a place into a tile, of which `count` exist. */
template <s32 FORMAT, bool ENCODED, s32 CHUNKS, s32 DIM>
KV_DEVICE void copy_tile(u8 *tile, const Place &place, s32 block, s32 j, s32 first_chunk,
                         s32 count) {
    const s32 offset = j & ((1 << place.block_size_log2) - 1);
    const u8 *rows = place.data + block * place.block_stride;
    count = block < 0 ? 0 : count;
    if constexpr (!ENCODED) {
        copy_float_rows<CHUNKS, DIM>(tile, rows + offset * place.token_stride, place.token_stride,
                                     first_chunk, count);
    } else {
        const u8 *codes = rows + offset * CODE_BYTES<FORMAT, DIM>;
        const u8 *metadata = rows + place.metadata + offset * METADATA_BYTES<FORMAT, DIM>;
        if constexpr (IS_CHANNEL<FORMAT>) {
            copy_bytes<GROUP_TOKENS * CODE_BYTES<FORMAT, DIM>>(tile, codes, count > 0);
            copy_bytes<GROUP_TOKENS * METADATA_BYTES<FORMAT, DIM>>(
                tile + TILE_METADATA<FORMAT, DIM>, metadata, count > 0);
        } else {
            copy_code_rows<FORMAT, DIM>(tile, codes, metadata, count);
        }
    }
}

/* The blocks are looked up one tile ahead, so that no copy waits for its table. */
template <bool RAW> struct Ring {
    u8 *stages; /* of this warp */
    Place k, v;
    Cursor ahead; /* of the next copy */
    s32 k_block, v_block;
    s32 first_chunk; /* of V's slice */
    s32 end;         /* of all keys that some row sees */

    KV_DEVICE u8 *k_tile(s32 turn) const {
        return stages + turn % RING_STAGES<RAW> * STAGE_BYTES<RAW>;
    }
    KV_DEVICE u8 *v_tile(s32 turn) const {
        return V_IN_K ? k_tile(turn) : k_tile(turn) + K_TILE_BYTES<RAW>;
    }

    KV_DEVICE void look_up() {
        if (!has_tile(ahead))
            return;
        const s32 j = ahead.at * TILE;
        k_block = k.table[j >> k.block_size_log2];
        v_block = V_IN_K ? k_block : v.table[j >> v.block_size_log2];
    }

    /* Copies the next tile into the place of turn `turn`, if there is one. */
    KV_DEVICE void copy_next(s32 turn) {
        if (has_tile(ahead)) {
            const s32 j = ahead.at * TILE, count = end - j;
            copy_tile<K_FORMAT, K_ENCODED<RAW>, K_CHUNKS, HEAD_DIM>(k_tile(turn), k, k_block, j, 0,
                                                                    count);
            if constexpr (!V_IN_K)
                copy_tile<V_FORMAT, V_ENCODED<RAW>, V_CHUNKS, HEAD_DIM_V>(v_tile(turn), v, v_block,
                                                                          j, first_chunk, count);
            advance(ahead);
            look_up();
        }
        cp_async_commit();
    }
};

template <bool RAW>
KV_DEVICE Ring<RAW> make_ring(const AttendParams &p, const Work &work, const Shared &shared,
                              const Cursor &cursor) {
    const s32 sequence = work.seq.index;
    Ring<RAW> ring;
    ring.stages = shared.ring + warp_id() * WARP_RING_BYTES<RAW>;
    ring.k = place_of(p.k, p.plan, sequence, work.head, RAW);
    ring.v = place_of(p.v, p.plan, sequence, work.head, RAW);
    ring.ahead = cursor;
    ring.first_chunk = V_IN_K ? 0 : work.slice * (SLICE_DIM / 8);
    ring.end = work.joint.end;
    ring.look_up();
    return ring;
}
