static void kv_decode(kv_format format, const char *codes, const char *metadata, int32_t first,
                      int32_t count, int32_t head_dim, const kv_channels *channels, float *rows,
                      int64_t row_stride) {
    (void)format;
    (void)rows;
    (void)count;
    (void)head_dim;
    (void)channels;
    (void)codes;
    (void)metadata;
    (void)first;
    (void)row_stride;
}
