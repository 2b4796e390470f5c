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

static void kv_attend_split(const kv_split_task *task) {
#if KV_HAS_DOT_BF16
    if (task->dots) {
        kv_dot_attend(task);
        return;
    }
#endif
    if (task->num_rows >= KV_MANY_ROWS) {
        kv_attend_many(task);
        return;
    }
    const int adjusts = task->seen || task->slopes || task->softcap > 0.0f;
    kv_score_split(task);
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
    kv_value_split(task);
}
