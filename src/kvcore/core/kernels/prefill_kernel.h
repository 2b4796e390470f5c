/* Kernel text: attention of many query rows over one split.
 *
 * Here the lanes of a vector are rows, so that a score needs no horizontal sum: the elements of K are
 * broadcast, partial sum l of docs/numerics.md is a vector of KV_LANES rows, and the fold adds whole
 * vectors. For the values the lanes are dims again, and the weights are broadcast. K and V are read
 * where they lie if they are float32, and are otherwise decoded once for all rows. The bits of a row
 * are those that attend_kernel.h gives it. */

enum {
    KV_TILE_VECTORS = 3, /* vectors of rows, or of dims, that a tile in registers has */
    KV_TILE_SCALARS = KV_REGISTERS / 4, /* numbers that are broadcast to each of them */
    KV_TILE_SUMS = KV_TILE_VECTORS * KV_TILE_SCALARS,
    KV_TILE_TOKENS = KV_TILE_SCALARS / 2, /* of scores, where a token has two sums */
    KV_QUERY_PANEL = KV_TILE_VECTORS * KV_LANES
};

/* ---- queries --------------------------------------------------------------------------------- */

/* The partial sum that is the x-th leaf of the fold's tree: x with its bits reversed. Two leaves
 * that are neighbours are half a vector apart. */
KV_INLINE int kv_fold_leaf(int x) {
    int leaf = 0;
    for (int bit = 1; bit < KV_LANES; bit *= 2)
        leaf = leaf * 2 + !!(x & bit);
    return leaf;
}

KV_INLINE int32_t kv_num_steps(int32_t head_dim) { return (head_dim + KV_LANES - 1) / KV_LANES; }

/* Panels of KV_QUERY_PANEL rows by dims. The dims come in the order in which scores need them: the
 * leaves of the fold from left to right in pairs, and for each pair its dims, q_width in all. */
static void kv_pack_blocks(const float *q, int32_t num_rows, int32_t q_width, float *panels) {
    const int32_t num_steps = q_width / KV_LANES;
    for (int32_t first = 0; first < num_rows; first += KV_QUERY_PANEL) {
        float *to = panels + (int64_t)first * q_width;
        const int32_t left = num_rows - first;
        for (int x = 0; x < KV_LANES; x += 2)
            for (int32_t i = 0; i < 2 * num_steps; i++) {
                const float *from =
                    q + (int64_t)first * q_width + kv_fold_leaf(x) + i * (KV_LANES / 2);
                for (int32_t r = 0; r < KV_QUERY_PANEL; r++)
                    *to++ = r < left ? from[(int64_t)r * q_width] : 0.0f;
            }
    }
}

/* ---- keys and values ------------------------------------------------------------------------- */

/* The rows of a split's tokens as float32, with zeros up to a multiple of KV_LANES. Only tokens with
 * a bit in `needed` are decoded; what stands for a token that is not there must not be used. */
static void kv_list_rows(const kv_split_runs *runs, const kv_run *list, kv_format format,
                         const kv_channels *channels, int32_t head_dim, int32_t width,
                         const uint32_t *needed, float *decoded, const float **rows) {
    const int in_place = format == KV_FORMAT_FP32 && head_dim % KV_LANES == 0;
    int32_t token = runs->start;
    for (int32_t i = 0; i < runs->num_runs; token += list[i++].count) {
        for (int32_t t = 0; t < list[i].count; t++)
            rows[token + t] = in_place ? (const float *)(list[i].rows + t * list[i].stride)
                                       : decoded + (int64_t)(token + t) * width;
        if (!in_place && needed[token / 32])
            kv_decode_run(&list[i], format, channels, head_dim, decoded + (int64_t)token * width,
                          width);
    }
    for (int32_t end = token; token <= KV_SPLIT; token++) /* tiles reach beyond the last */
        rows[token] = rows[end - 1];
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* KV_TILE_TOKENS tokens and num_vectors vectors of a panel's rows. */
KV_INLINE void kv_score_panel(int num_vectors, const float *panel, const float *const *k,
                              int32_t num_steps, int32_t q_width, float *scores) {
    enum { MOST = KV_TILE_SUMS / 2 };
    float pending[4][MOST * KV_LANES] __attribute__((aligned(64)));
    const int num_sums = num_vectors * KV_TILE_TOKENS;
    const int32_t padding = 2 * (q_width / KV_LANES - num_steps) * KV_QUERY_PANEL;
    const float *token[KV_TILE_TOKENS];
    KV_UNROLL
    for (int t = 0; t < KV_TILE_TOKENS; t++)
        token[t] = k[t];
    for (int x = 0; x < KV_LANES / 2; x++) {
        kv_vec sum[2][MOST];
        int64_t d = kv_fold_leaf(2 * x);
        /* The first products need no zero to be added to: only the sign of a zero could differ. */
        KV_UNROLL
        for (int half = 0; half < 2; half++, d += KV_LANES / 2, panel += KV_QUERY_PANEL)
            KV_UNROLL
        for (int t = 0; t < KV_TILE_TOKENS; t++) {
            const kv_vec y = kv_broadcast(token[t][d]);
            KV_UNROLL
            for (int v = 0; v < num_vectors; v++)
                sum[half][t * num_vectors + v] = kv_mul(kv_load(panel + v * KV_LANES), y);
        }
        for (int32_t i = 1; i < num_steps; i++)
            KV_UNROLL
        for (int half = 0; half < 2; half++, d += KV_LANES / 2, panel += KV_QUERY_PANEL) {
            kv_vec a[KV_TILE_VECTORS];
            KV_UNROLL
            for (int v = 0; v < num_vectors; v++)
                a[v] = kv_load(panel + v * KV_LANES);
            KV_UNROLL
            for (int t = 0; t < KV_TILE_TOKENS; t++) {
                const kv_vec y = kv_broadcast(token[t][d]);
                KV_UNROLL
                for (int v = 0; v < num_vectors; v++)
                    sum[half][t * num_vectors + v] =
                        kv_fma(a[v], y, sum[half][t * num_vectors + v]);
            }
        }
        panel += padding;
        /* The fold, depth first: what is complete on the left waits for what is on the right. */
        KV_UNROLL
        for (int i = 0; i < num_sums; i++)
            sum[0][i] = kv_add(sum[0][i], sum[1][i]);
        int level = 0;
        for (; x >> level & 1; level++)
            KV_UNROLL
        for (int i = 0; i < num_sums; i++)
            sum[0][i] = kv_add(kv_load(pending[level] + i * KV_LANES), sum[0][i]);
        const int last = x + 1 == KV_LANES / 2,
                  step = last ? KV_BLOCK_ROWS : num_vectors * KV_LANES;
        float *to = last ? scores : pending[level];
        KV_UNROLL
        for (int t = 0; t < KV_TILE_TOKENS; t++)
            KV_UNROLL
        for (int v = 0; v < num_vectors; v++)
            kv_store(to + t * step + v * KV_LANES, sum[0][t * num_vectors + v]);
    }
}

/* The rows of one block and the tokens [t, t + KV_TILE_TOKENS). */
KV_INLINE void kv_score_tile(const kv_split_task *task, const float *panels, int32_t num_rows,
                             const float *const *k, int32_t t) {
    const int32_t num_steps = kv_num_steps(task->head_dim);
    float *scores = task->scores + t * KV_BLOCK_ROWS;
    for (int32_t row = 0; row < num_rows; row += KV_QUERY_PANEL) {
        const int32_t left = num_rows - row;
        const float *panel = panels + (int64_t)row * task->q_width;
        if (left > 2 * KV_LANES)
            kv_score_panel(3, panel, k + t, num_steps, task->q_width, scores + row);
        else if (left > KV_LANES)
            kv_score_panel(2, panel, k + t, num_steps, task->q_width, scores + row);
        else
            kv_score_panel(1, panel, k + t, num_steps, task->q_width, scores + row);
    }
}

/* ---- softmax --------------------------------------------------------------------------------- */

/* Sets the scores of tokens that a row does not see to -inf. */
static void kv_hide_scores(const kv_split_task *task, int32_t row, int32_t num_rows,
                           int32_t count) {
    for (int32_t r = 0; r < num_rows; r++) {
        const int32_t visible = task->visible[row + r];
        float *scores = task->scores + r;
        for (int32_t j = 0; task->seen && j < visible; j += 32) {
            uint32_t hidden = ~task->seen[(row + r) * KV_SPLIT_WORDS + j / 32];
            for (; hidden; hidden &= hidden - 1)
                scores[(j + __builtin_ctz(hidden)) * KV_BLOCK_ROWS] = -INFINITY;
        }
        for (int32_t j = visible; j < count; j++)
            scores[j * KV_BLOCK_ROWS] = -INFINITY;
    }
}

/* What options do to the scores of a vector of rows; `n` of its lanes exist. */
static void kv_adjust_rows(const kv_split_task *task, float *scores, int32_t row, int n,
                           int32_t count) {
    if (task->softcap > 0.0f) {
        const kv_vec cap = kv_broadcast(task->softcap);
        for (int32_t j = 0; j < count; j++) {
            float *s = scores + j * KV_BLOCK_ROWS;
            kv_store(s, kv_mul(cap, kv_tanh(kv_div(kv_load(s), cap))));
        }
    }
    if (task->slopes) {
        const kv_vec slope =
            kv_sub(kv_zero(), kv_load_elements(KV_FORMAT_FP32, (const char *)task->slopes, row, n));
        const kv_vec distance =
            kv_load_elements(KV_FORMAT_FP32, (const char *)task->distances, row, n);
        for (int32_t j = 0; j < count; j++) {
            const float place = task->places ? task->places[j] : (float)j;
            float *s = scores + j * KV_BLOCK_ROWS;
            kv_store(s, kv_fma(slope, kv_sub(distance, kv_broadcast(place)), kv_load(s)));
        }
    }
}

/* The largest of `count` scores, for a vector of rows. */
KV_INLINE kv_vec kv_top_rows(const float *scores, int32_t count) {
    kv_vec tops[4];
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        tops[i] = kv_load(scores);
    int32_t j = 0;
    for (; j + 4 <= count; j += 4)
        KV_UNROLL
    for (int i = 0; i < 4; i++)
        tops[i] = kv_max(tops[i], kv_load(scores + (j + i) * KV_BLOCK_ROWS));
    for (; j < count; j++)
        tops[0] = kv_max(tops[0], kv_load(scores + j * KV_BLOCK_ROWS));
    return kv_max(kv_max(tops[0], tops[1]), kv_max(tops[2], tops[3]));
}

/* Turns `count` scores of a vector of rows into exp(s - m); sets m and l. */
KV_INLINE void kv_softmax_rows(float *scores, int32_t count, kv_vec *m, kv_vec *l) {
    kv_vec sums[KV_LANES];
    *m = kv_top_rows(scores, count);
    for (int i = 0; i < KV_LANES; i++)
        sums[i] = kv_zero();
    for (int32_t j = 0; j < count; j++) {
        const kv_vec p = kv_exp(kv_sub(kv_load(scores + j * KV_BLOCK_ROWS), *m));
        sums[j % KV_LANES] = kv_add(sums[j % KV_LANES], p);
        kv_store(scores + j * KV_BLOCK_ROWS, p);
    }
    for (int half = KV_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            sums[i] = kv_add(sums[i], sums[i + half]);
    *l = sums[0];
}

typedef void kv_softmax_function(float *scores, int32_t count, kv_vec *m, kv_vec *l);

KV_INLINE void kv_softmax_block(const kv_split_task *task, int32_t row, int32_t num_rows,
                                int32_t count, kv_softmax_function *softmax_rows) {
    const int adjusts = task->slopes || task->softcap > 0.0f;
    for (int32_t r = 0; r < num_rows && adjusts; r += KV_LANES)
        kv_adjust_rows(task, task->scores + r, row + r,
                       num_rows - r < KV_LANES ? num_rows - r : KV_LANES, count);
    kv_hide_scores(task, row, num_rows, count);
    for (int32_t r = 0; r < num_rows; r += KV_LANES) {
        const int n = num_rows - r < KV_LANES ? num_rows - r : KV_LANES;
        kv_vec m, l;
        softmax_rows(task->scores + r, count, &m, &l);
        kv_store_elements(KV_FORMAT_FP32, (char *)task->out.m, row + r, m, n);
        kv_store_elements(KV_FORMAT_FP32, (char *)task->out.l, row + r, l, n);
    }
    for (int32_t r = row; r < row + num_rows; r++)
        if (task->visible[r] <= 0)
            task->out.l[r] = 0.0f;
}

/* ---- values ---------------------------------------------------------------------------------- */

/* num_vectors vectors of dims from d on: o_r += p_r[t] v[t], tokens in order; `fresh` rows start
 * from 0. */
KV_INLINE void kv_value_panel(int num_rows, int num_vectors, const float *p, const float *const *v,
                              int32_t begin, int32_t end, int64_t d, float *o, int64_t o_width,
                              int fresh) {
    kv_vec sum[KV_TILE_SUMS];
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        KV_UNROLL
    for (int i = 0; i < num_vectors; i++)
        sum[r * num_vectors + i] = fresh ? kv_zero() : kv_load(o + r * o_width + d + i * KV_LANES);
    p += begin * KV_BLOCK_ROWS;
    const float *const *next = v + begin;
    const float *row = *next + d; /* found one token ahead, so that no load waits for it */
    for (const float *const *last = v + end; next < last; p += KV_BLOCK_ROWS) {
        kv_vec y[KV_TILE_VECTORS];
        KV_UNROLL
        for (int i = 0; i < num_vectors; i++)
            y[i] = kv_load(row + i * KV_LANES);
        row = *++next + d;
        KV_UNROLL
        for (int r = 0; r < num_rows; r++) {
            const kv_vec x = kv_broadcast(p[r]);
            KV_UNROLL
            for (int i = 0; i < num_vectors; i++)
                sum[r * num_vectors + i] = kv_fma(x, y[i], sum[r * num_vectors + i]);
        }
    }
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        KV_UNROLL
    for (int i = 0; i < num_vectors; i++)
        kv_store(o + r * o_width + d + i * KV_LANES, sum[r * num_vectors + i]);
}

KV_INLINE void kv_value_dims(const kv_split_task *task, int num_rows, int32_t row, int32_t r,
                             const float *const *v, int32_t begin, int32_t end, int fresh) {
    const float *p = task->scores + r;
    float *o = task->out.o + (int64_t)(row + r) * task->o_width;
    int32_t d = 0, left = kv_num_steps(task->head_dim_v);
    /* Threes, and twos for what threes would leave one of. */
    for (; left == 3 || left > 4; left -= 3, d += 3 * KV_LANES)
        kv_value_panel(num_rows, 3, p, v, begin, end, d, o, task->o_width, fresh);
    for (; left >= 2; left -= 2, d += 2 * KV_LANES)
        kv_value_panel(num_rows, 2, p, v, begin, end, d, o, task->o_width, fresh);
    if (left == 1)
        kv_value_panel(num_rows, 1, p, v, begin, end, d, o, task->o_width, fresh);
}

/* Tokens [begin, end), all of which num_rows rows from `r` of the block on see: KV_TILE_SCALARS, 4
 * or 1. The first stretch of a row is fresh, though there may be nothing in it.
 * `values` are the split's, as the function takes them. */
typedef void kv_stretch_function(const kv_split_task *task, int num_rows, int32_t row, int32_t r,
                                 const void *values, int32_t begin, int32_t end, int fresh);

static void kv_value_stretch(const kv_split_task *task, int num_rows, int32_t row, int32_t r,
                             const void *values, int32_t begin, int32_t end, int fresh) {
    const float *const *v = values;
    if (begin >= end && !fresh)
        return;
    if (num_rows == KV_TILE_SCALARS)
        kv_value_dims(task, KV_TILE_SCALARS, row, r, v, begin, end, fresh);
    else if (num_rows == 4)
        kv_value_dims(task, 4, row, r, v, begin, end, fresh);
    else
        kv_value_dims(task, 1, row, r, v, begin, end, fresh);
}

/* Tokens [begin, end) of one word of `seen`: stretches that the same rows see, in order. */
static void kv_value_word(const kv_split_task *task, int num_rows, int32_t row, int32_t r,
                          const void *values, kv_stretch_function *sum_values, int32_t w) {
    uint32_t changes = 0, all = UINT32_MAX, any = 0;
    const uint32_t *seen = task->seen + (int64_t)(row + r) * KV_SPLIT_WORDS + w;
    for (int i = 0; i < num_rows; i++) {
        const uint32_t word = seen[i * KV_SPLIT_WORDS];
        changes |= word ^ word >> 1;
        all &= word;
        any |= word;
    }
    for (int32_t begin = 0, end; begin < 32; begin = end) {
        const uint32_t left = changes >> begin;
        end = left ? begin + __builtin_ctz(left) + 1 : 32;
        if (all >> begin & 1)
            sum_values(task, num_rows, row, r, values, 32 * w + begin, 32 * w + end, 0);
        else if (any >> begin & 1)
            for (int i = 0; i < num_rows; i++)
                if (seen[i * KV_SPLIT_WORDS] >> begin & 1)
                    sum_values(task, 1, row, r + i, values, 32 * w + begin, 32 * w + end, 0);
    }
}

/* num_rows rows from `r` of the block that begins at `row`. */
static void kv_value_rows(const kv_split_task *task, int num_rows, int32_t row, int32_t r,
                          const void *values, kv_stretch_function *sum_values) {
    const int32_t *visible = task->visible + row + r;
    if (!task->seen) {
        sum_values(task, num_rows, row, r, values, 0, visible[0], 1);
        for (int i = 1; i < num_rows; i++)
            sum_values(task, 1, row, r + i, values, visible[0], visible[i], 0);
        return;
    }
    int32_t whole = 0; /* words that all rows see whole and that are not summed yet */
    for (int32_t w = 0; w < KV_SPLIT_WORDS; w++) {
        uint32_t all = UINT32_MAX;
        for (int i = 0; i < num_rows; i++)
            all &= task->seen[(int64_t)(row + r + i) * KV_SPLIT_WORDS + w];
        if (all == UINT32_MAX) {
            whole++;
            continue;
        }
        sum_values(task, num_rows, row, r, values, 32 * (w - whole), 32 * w, 0);
        kv_value_word(task, num_rows, row, r, values, sum_values, w);
        whole = 0;
    }
    sum_values(task, num_rows, row, r, values, KV_SPLIT - 32 * whole, KV_SPLIT, 0);
}

static void kv_value_block(const kv_split_task *task, int32_t row, int32_t num_rows,
                           const void *values, kv_stretch_function *sum_values) {
    int32_t r = 0;
    if (task->seen)
        memset(task->out.o + (int64_t)row * task->o_width, 0,
               (size_t)num_rows * (size_t)task->o_width * sizeof(float));
    for (; r + KV_TILE_SCALARS <= num_rows; r += KV_TILE_SCALARS)
        kv_value_rows(task, KV_TILE_SCALARS, row, r, values, sum_values);
    for (; r + 4 <= num_rows; r += 4)
        kv_value_rows(task, 4, row, r, values, sum_values);
    for (; r < num_rows; r++)
        kv_value_rows(task, 1, row, r, values, sum_values);
}

/* ---- one split ------------------------------------------------------------------------------- */

/* Tokens of the next split are fetched while the scores of this one are computed. */
typedef struct kv_fetch {
    const kv_split_runs *runs;
    int32_t run, token; /* the next to fetch */
} kv_fetch;

static void kv_fetch_tokens(kv_fetch *fetch, int32_t num_tokens) {
    for (; num_tokens > 0 && fetch->run < fetch->runs->num_runs; num_tokens--) {
        const kv_run *k = &fetch->runs->k[fetch->run], *v = &fetch->runs->v[fetch->run];
        for (int32_t b = 0; b < k->nbytes; b += 64)
            kv_prefetch(k->rows + fetch->token * k->stride + b);
        for (int32_t b = 0; b < v->nbytes; b += 64)
            kv_prefetch(v->rows + fetch->token * v->stride + b);
        if (++fetch->token == k->count) {
            fetch->token = 0;
            fetch->run++;
        }
    }
}

/* Whether one of num_tokens tokens from t on is seen; t is a multiple of num_tokens. */
static int kv_tile_is_seen(const uint32_t *seen, int32_t t, int num_tokens) {
    return seen[t / 32] >> t % 32 & ((1u << num_tokens) - 1);
}

/* Bits of the tokens that at least one of the rows [row, row + num_rows) sees; returns their end. */
static int32_t kv_find_seen(const kv_split_task *task, int32_t row, int32_t num_rows,
                            uint32_t seen[KV_SPLIT_WORDS]) {
    int32_t end = 0;
    for (int32_t r = row; r < row + num_rows; r++)
        end = task->visible[r] > end ? task->visible[r] : end;
    for (int32_t w = 0; w < KV_SPLIT_WORDS; w++) {
        const int32_t left = end - 32 * w;
        seen[w] = task->seen || left <= 0 ? 0 : left < 32 ? (1u << left) - 1 : UINT32_MAX;
        for (int32_t r = row; task->seen && r < row + num_rows; r++)
            seen[w] |= task->seen[r * KV_SPLIT_WORDS + w];
    }
    return end;
}

static void kv_attend_many(const kv_split_task *task) {
    const float *k[KV_SPLIT + 1], *v[KV_SPLIT + 1];
    uint32_t seen[KV_SPLIT_WORDS];
    const int32_t num_blocks = (task->num_rows + KV_BLOCK_ROWS - 1) / KV_BLOCK_ROWS;
    const int32_t tiles =
        num_blocks * (kv_find_seen(task, 0, task->num_rows, seen) / KV_TILE_TOKENS);
    kv_list_rows(task->runs, task->runs->k, task->k_format, &task->k_channels, task->head_dim,
                 task->q_width, seen, task->decoded, k);
    kv_list_rows(task->runs, task->runs->v, task->v_format, &task->v_channels, task->head_dim_v,
                 task->o_width, seen, task->decoded + KV_SPLIT * task->q_width, v);
    kv_fetch fetch = {.runs = task->next};
    const int32_t fetched = KV_SPLIT / (tiles > 0 ? tiles : 1) + 1; /* tokens, by each tile */
    for (int32_t row = 0; row < task->num_rows; row += KV_BLOCK_ROWS) {
        const int32_t left = task->num_rows - row;
        const int32_t num_rows = left < KV_BLOCK_ROWS ? left : KV_BLOCK_ROWS;
        const int32_t count = kv_find_seen(task, row, num_rows, seen);
        if (count == 0) {
            memset(task->out.l + row, 0, (size_t)num_rows * sizeof(float));
            continue;
        }
        for (int32_t t = 0; t < count; t += KV_TILE_TOKENS) {
            kv_fetch_tokens(&fetch, fetched);
            if (kv_tile_is_seen(seen, t, KV_TILE_TOKENS))
                kv_score_tile(task, task->panels + (int64_t)row * task->q_width, num_rows, k, t);
        }
        kv_softmax_block(task, row, num_rows, count, kv_softmax_rows);
        kv_value_block(task, row, num_rows, v, kv_value_stretch);
    }
}
