/* Kernel text: codes of a row, one a byte, to and from the planes that store them:
 * docs/formats.md. A plane of `width` bits holds bits [shift, shift + width) of each code. */

/* Sixteen bytes, or eight and zeros. Shifts move bits from byte to byte, where masks drop them. */
typedef uint64_t kv_unit __attribute__((vector_size(16)));

KV_INLINE kv_unit kv_load_unit(const uint8_t *p, int bytes) {
    kv_unit unit = {0};
    memcpy(&unit, p, (size_t)bytes);
    return unit;
}

/* The lowest `width` bits of each byte. */
KV_INLINE kv_unit kv_keep_low(kv_unit unit, int width) {
    const uint64_t mask = 0x0101010101010101 * ((1u << width) - 1);
    return unit & (kv_unit){mask, mask};
}

KV_INLINE void kv_pack_unit(const uint8_t *codes, int shift, int width, int bytes, uint8_t *to) {
    kv_unit unit = {0};
    KV_UNROLL
    for (int k = 0; k < 8 / width; k++)
        unit |= kv_keep_low(kv_load_unit(codes + bytes * k, bytes) >> shift, width) << (width * k);
    memcpy(to, &unit, (size_t)bytes);
}

/* Where the next plane begins. */
KV_INLINE uint8_t *kv_pack_plane(const uint8_t *codes, int32_t head_dim, int shift, int width,
                                 uint8_t *to) {
    const int32_t per_unit = 128 / width, rest = head_dim % per_unit;
    for (int32_t at = 0; at < head_dim - rest; at += per_unit, to += 16)
        kv_pack_unit(codes + at, shift, width, 16, to);
    if (rest)
        kv_pack_unit(codes + head_dim - rest, shift, width, 8, to);
    return to + rest * width / 8;
}

KV_INLINE void kv_pack(const uint8_t *codes, int32_t head_dim, int bits, uint8_t *to) {
    if (bits == 8) {
        memcpy(to, codes, (size_t)head_dim);
    } else if (bits == 6) {
        to = kv_pack_plane(codes, head_dim, 0, 4, to);
        kv_pack_plane(codes, head_dim, 4, 2, to);
    } else if (bits == 3) {
        to = kv_pack_plane(codes, head_dim, 0, 2, to);
        kv_pack_plane(codes, head_dim, 2, 1, to);
    } else {
        kv_pack_plane(codes, head_dim, 0, bits, to);
    }
}

/* The codes of a unit; those of a plane with a shift join what the planes below it left. */
KV_INLINE void kv_unpack_unit(const uint8_t *from, int shift, int width, int bytes,
                              uint8_t *codes) {
    const kv_unit unit = kv_load_unit(from, bytes);
    KV_UNROLL
    for (int k = 0; k < 8 / width; k++) {
        kv_unit code = kv_keep_low(unit >> (width * k), width) << shift;
        if (shift)
            code |= kv_load_unit(codes + bytes * k, bytes);
        memcpy(codes + bytes * k, &code, (size_t)bytes);
    }
}

KV_INLINE const uint8_t *kv_unpack_plane(const uint8_t *from, int32_t head_dim, int shift,
                                         int width, uint8_t *codes) {
    const int32_t per_unit = 128 / width, rest = head_dim % per_unit;
    for (int32_t at = 0; at < head_dim - rest; at += per_unit, from += 16)
        kv_unpack_unit(from, shift, width, 16, codes + at);
    if (rest)
        kv_unpack_unit(from, shift, width, 8, codes + head_dim - rest);
    return from + rest * width / 8;
}

KV_INLINE void kv_unpack(const uint8_t *from, int32_t head_dim, int bits, uint8_t *codes) {
    if (bits == 8) {
        memcpy(codes, from, (size_t)head_dim);
    } else if (bits == 6) {
        from = kv_unpack_plane(from, head_dim, 0, 4, codes);
        kv_unpack_plane(from, head_dim, 4, 2, codes);
    } else if (bits == 3) {
        from = kv_unpack_plane(from, head_dim, 0, 2, codes);
        kv_unpack_plane(from, head_dim, 2, 1, codes);
    } else {
        kv_unpack_plane(from, head_dim, 0, bits, codes);
    }
}
