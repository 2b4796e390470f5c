/* Kernel text: a run of K or V as plain float32 rows, whatever it is stored as. */

/* Up to a multiple of KV_LANES the rest of a row is zero. */
static void kv_decode_run(const kv_run *run, kv_format format, const kv_channels *channels,
                          int32_t head_dim, float *rows, int64_t width) {
    const kv_format stored = run->raw ? KV_FORMAT_BF16 : format;
    if (run->metadata)
        kv_decode(format, run->rows, run->metadata, run->first, run->count, head_dim, channels,
                  rows, width);
    for (int32_t t = 0; t < run->count; t++) {
        if (!run->metadata)
            kv_convert(run->rows + t * run->stride, stored, rows + t * width, KV_FORMAT_FP32,
                       head_dim);
        for (int64_t d = head_dim; d < width; d++)
            rows[t * width + d] = 0.0f;
    }
}
