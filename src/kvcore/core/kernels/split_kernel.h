/* Kernel text: what options do to scores, and a split as a whole. */

/* What options do to the scores that a row has, up to where it sees the last. */
static void kv_adjust_row(const kv_split_task *task, int32_t r) {
    float *scores = task->scores + (int64_t)r * KV_SPLIT;
    const int32_t count = task->visible[r];
    float ramp[KV_LANES];
    for (int l = 0; l < KV_LANES; l++)
        ramp[l] = (float)l;
    if (task->softcap > 0.0f) {
        const kv_vec cap = kv_broadcast(task->softcap);
        for (int32_t j = 0; j < count; j += KV_LANES)
            kv_store(scores + j, kv_mul(cap, kv_tanh(kv_div(kv_load(scores + j), cap))));
    }
    if (task->slopes) {
        const kv_vec slope = kv_broadcast(-task->slopes[r]);
        for (int32_t j = 0; j < count; j += KV_LANES) {
            const kv_vec place = task->places ? kv_load(task->places + j)
                                              : kv_add(kv_broadcast((float)j), kv_load(ramp));
            const kv_vec distance = kv_sub(kv_broadcast(task->distances[r]), place);
            kv_store(scores + j, kv_fma(slope, distance, kv_load(scores + j)));
        }
    }
    /* Last, as what is unseen may hold anything up to here. */
    for (int32_t j = 0; task->seen && j < count; j += 32) {
        const uint32_t seen = task->seen[r * KV_SPLIT_WORDS + j / 32];
        for (int32_t i = 0; i < 32 && seen != UINT32_MAX; i++)
            if (!(seen >> i & 1))
                scores[j + i] = -INFINITY;
    }
}

static void kv_pack_queries(const float *q, int32_t num_rows, int32_t q_width, kv_format k_format,
                            int dots, float *panels) {
#if KV_HAS_DOT_BF16
    if (dots) {
        kv_dot_pack(q, num_rows, q_width, dots, panels);
        return;
    }
#endif
    (void)dots;
    if (num_rows >= KV_MANY_ROWS)
        kv_pack_blocks(q, num_rows, q_width, panels);
    else
        kv_pack_groups(q, num_rows, q_width, k_format, panels);
}

/* Scores of a few rows to weights. */
static void kv_softmax_few(const kv_split_task *task) {
    const int adjusts = task->seen || task->slopes || task->softcap > 0.0f;
    for (int32_t r = 0; r < task->num_rows; r++) {
        task->out.m[r] = -INFINITY;
        task->out.l[r] = 0.0f;
        if (task->visible[r] <= 0)
            continue;
        if (adjusts)
            kv_adjust_row(task, r);
        kv_softmax_row(task->scores + (int64_t)r * KV_SPLIT, task->visible[r], task->out.m + r,
                       task->out.l + r);
    }
}

static void kv_attend_few(const kv_split_task *task) {
    kv_score_split(task);
    kv_softmax_few(task);
    kv_value_split(task);
}

static void kv_attend_encoded(const kv_split_task *task) {
    const kv_encoded_scratch scratch = kv_encoded_scratch_of(task);
    if (kv_is_float(task->k_format))
        kv_score_split(task);
    else
        kv_score_encoded(task, &scratch);
    kv_softmax_few(task);
    if (kv_is_float(task->v_format))
        kv_value_split(task);
    else
        kv_value_encoded(task, &scratch);
}

/* ---- quantized formats ----------------------------------------------------------------------- */

/* Replaces what is quantized of a split's K or V, as far as a row sees it, by decoded rows. */
static void kv_replace_runs(const kv_split_runs *runs, kv_run *list, kv_format format,
                            const kv_channels *channels, int32_t head_dim, int32_t width,
                            const uint32_t *needed, float *decoded) {
    int32_t token = runs->start;
    for (int32_t i = 0; i < runs->num_runs; token += list[i++].count) {
        float *rows = decoded + (int64_t)token * width;
        if (needed[token / 32])
            kv_decode_run(&list[i], format, channels, head_dim, rows, width);
        list[i] = (kv_run){.rows = (const char *)rows,
                           .stride = width * (int64_t)sizeof(float),
                           .count = list[i].count,
                           .nbytes = head_dim * (int32_t)sizeof(float)};
    }
}

/* What is decoded once has the bits that many rows give it. */
static void kv_attend_decoded(const kv_split_task *task) {
    static const kv_split_runs nothing = {0};
    kv_split_runs runs = *task->runs;
    kv_split_task plain = *task;
    uint32_t seen[KV_SPLIT_WORDS];
    kv_find_seen(task, 0, task->num_rows, seen);
    if (!kv_is_float(task->k_format)) {
        kv_replace_runs(&runs, runs.k, task->k_format, &task->k_channels, task->head_dim,
                        task->q_width, seen, task->decoded);
        plain.k_format = KV_FORMAT_FP32;
    }
    if (!kv_is_float(task->v_format)) {
        kv_replace_runs(&runs, runs.v, task->v_format, &task->v_channels, task->head_dim_v,
                        task->o_width, seen, task->decoded + KV_SPLIT * task->q_width);
        plain.v_format = KV_FORMAT_FP32;
    }
    plain.runs = &runs;
    plain.next = &nothing;
    kv_attend_few(&plain);
}

static void kv_attend_split(const kv_split_task *task) {
#if KV_HAS_DOT_BF16
    if (task->dots) {
        kv_dot_attend(task);
        return;
    }
#endif
    if (task->encoded)
        kv_attend_encoded(task);
    else if (task->num_rows >= KV_MANY_ROWS)
        kv_attend_many(task);
    else if (kv_is_float(task->k_format) && kv_is_float(task->v_format))
        kv_attend_few(task);
    else
        kv_attend_decoded(task);
}
