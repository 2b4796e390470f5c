/* Kernel text: attention of many query rows over one split of bf16 keys and values, by dot products of
 * bf16 pairs. It is prefill_kernel.h with half the instructions and none of its bits: queries and
 * weights are rounded to bf16, docs/numerics.md says with what error.
 *
 * A lane of 32 bits holds a pair. For the scores the lanes are rows, with dims 2i and 2i + 1 of each
 * query, and the same two elements of K are broadcast from where they lie. For the values the lanes
 * are dims, with tokens 2i and 2i + 1 of V, and the two tokens' weights are broadcast. */

enum { KV_DOT_TILE_TOKENS = KV_TILE_SCALARS };

typedef __m512i kv_pairs;

KV_INLINE kv_vec kv_dot(kv_vec sum, kv_pairs a, kv_pairs b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

KV_INLINE kv_pairs kv_load_pairs(const uint32_t *p) { return _mm512_loadu_si512(p); }

/* The two elements at p in every lane. */
KV_INLINE kv_pairs kv_broadcast_pair(const void *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
}

/* Pairs of `first` and `second`, which lie in the lower halves of 32 bits. */
KV_INLINE kv_pairs kv_zip_pairs(__m512i first, __m512i second) {
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

KV_INLINE __m512i kv_round_bf16(kv_vec x) { return _mm512_cvtepu16_epi32(kv_narrow_bf16(x)); }

KV_INLINE __m512i kv_load_halves(const uint16_t *p, int n) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kv_lane_mask(n), p));
}

KV_INLINE kv_vec kv_first_of_pairs(kv_pairs x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}

KV_INLINE kv_vec kv_second_of_pairs(kv_pairs x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int32_t)0xffff0000)));
}

/* ---- queries --------------------------------------------------------------------------------- */

/* Row r of a panel of KV_QUERY_PANEL rows by pairs of dims. */
static void kv_dot_pack_row(const float *q, int32_t q_width, int32_t r, uint32_t *panel) {
    uint16_t halves[1024];
    kv_convert(q, KV_FORMAT_FP32, halves, KV_FORMAT_BF16, q_width);
    for (int32_t i = 0; i < q_width / 2; i++)
        memcpy(panel + i * KV_QUERY_PANEL + r, halves + 2 * i, sizeof(*panel));
}

/* Leaves of a row what it loses when it is rounded to bf16. */
static void kv_dot_take_remainders(float *q, int32_t q_width) {
    uint16_t halves[1024];
    float rounded[1024];
    kv_convert(q, KV_FORMAT_FP32, halves, KV_FORMAT_BF16, q_width);
    kv_convert(halves, KV_FORMAT_BF16, rounded, KV_FORMAT_FP32, q_width);
    for (int32_t d = 0; d < q_width; d++)
        q[d] -= rounded[d];
}

/* A panel for the rows rounded to bf16, and with two terms one for what they lose by it. */
static void kv_dot_pack(const float *q, int32_t num_rows, int32_t q_width, int num_terms,
                        float *panels) {
    const int64_t size = (int64_t)q_width / 2 * KV_QUERY_PANEL;
    const int32_t num_panels = (num_rows + KV_QUERY_PANEL - 1) / KV_QUERY_PANEL;
    for (int32_t r = 0; r < num_panels * KV_QUERY_PANEL; r++, q += q_width) {
        uint32_t *panel = (uint32_t *)panels + r / KV_QUERY_PANEL * 2 * size;
        float row[1024] = {0};
        if (r < num_rows)
            memcpy(row, q, (size_t)q_width * sizeof(*row));
        kv_dot_pack_row(row, q_width, r % KV_QUERY_PANEL, panel);
        if (num_terms > 1) {
            kv_dot_take_remainders(row, q_width);
            kv_dot_pack_row(row, q_width, r % KV_QUERY_PANEL, panel + size);
        }
    }
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* Where the rows of a split's tokens lie; the last stands in for those that are not there. */
static void kv_dot_list_keys(const kv_split_runs *runs, const char **rows) {
    int32_t token = 0;
    for (; token < runs->start; token++)
        rows[token] = runs->k[0].rows;
    for (int32_t i = 0; i < runs->num_runs; i++)
        for (int32_t t = 0; t < runs->k[i].count; t++)
            rows[token++] = runs->k[i].rows + t * runs->k[i].stride;
    for (; token < KV_SPLIT; token++)
        rows[token] = rows[token - 1];
}

/* KV_DOT_TILE_TOKENS tokens and num_vectors vectors of rows. */
KV_INLINE void kv_dot_score_panel(const kv_split_task *task, int num_vectors, const uint32_t *panel,
                                  const char *const *k, float *scores) {
    const int64_t num_pairs = task->head_dim / 2;
    const int64_t padding = (int64_t)(task->q_width / 2 - num_pairs) * KV_QUERY_PANEL;
    kv_vec sum[KV_TILE_SUMS];
    const char *token[KV_DOT_TILE_TOKENS];
    KV_UNROLL
    for (int t = 0; t < KV_DOT_TILE_TOKENS; t++)
        token[t] = k[t];
    KV_UNROLL
    for (int i = 0; i < KV_DOT_TILE_TOKENS * num_vectors; i++)
        sum[i] = kv_zero();
    for (int term = 0; term < task->dots; term++, panel += padding)
        for (int64_t i = 0; i < num_pairs; i++, panel += KV_QUERY_PANEL) {
            kv_pairs a[KV_TILE_VECTORS];
            KV_UNROLL
            for (int v = 0; v < num_vectors; v++)
                a[v] = kv_load_pairs(panel + v * KV_LANES);
            KV_UNROLL
            for (int t = 0; t < KV_DOT_TILE_TOKENS; t++) {
                const kv_pairs y = kv_broadcast_pair(token[t] + 4 * i);
                KV_UNROLL
                for (int v = 0; v < num_vectors; v++)
                    sum[t * num_vectors + v] = kv_dot(sum[t * num_vectors + v], a[v], y);
            }
        }
    KV_UNROLL
    for (int t = 0; t < KV_DOT_TILE_TOKENS; t++)
        KV_UNROLL
    for (int v = 0; v < num_vectors; v++)
        kv_store(scores + t * KV_BLOCK_ROWS + v * KV_LANES,
                 kv_mul(sum[t * num_vectors + v], kv_broadcast(task->scale)));
}

/* The rows of the block that begins at `row`, and the tokens [t, t + KV_DOT_TILE_TOKENS). */
KV_INLINE void kv_dot_score_tile(const kv_split_task *task, int32_t row, int32_t num_rows,
                                 const char *const *k, int32_t t) {
    _Static_assert((int)KV_BLOCK_ROWS == (int)KV_QUERY_PANEL, "a block is one panel");
    const uint32_t *panel = (const uint32_t *)task->panels + (int64_t)row * task->q_width;
    float *scores = task->scores + t * KV_BLOCK_ROWS;
    if (num_rows > 2 * KV_LANES)
        kv_dot_score_panel(task, 3, panel, k + t, scores);
    else if (num_rows > KV_LANES)
        kv_dot_score_panel(task, 2, panel, k + t, scores);
    else
        kv_dot_score_panel(task, 1, panel, k + t, scores);
}

/* ---- softmax --------------------------------------------------------------------------------- */

/* Turns `count` scores of a vector of rows into weights exp(s - m), rounded to bf16, the pair of tokens
 * 2i and 2i + 1 where the score of 2i was. l sums what the weights have become, so that their
 * average is one of the values still. */
KV_INLINE void kv_dot_softmax_rows(float *scores, int32_t count, kv_vec *m, kv_vec *l) {
    kv_vec sum[2] = {kv_zero(), kv_zero()};
    if (count % 2 != 0)
        kv_store(scores + count * KV_BLOCK_ROWS, kv_broadcast(-INFINITY));
    *m = kv_top_rows(scores, count);
    for (int32_t j = 0; j < count; j += 2) {
        float *at = scores + j * KV_BLOCK_ROWS;
        const kv_pairs p =
            kv_zip_pairs(kv_round_bf16(kv_exp(kv_sub(kv_load(at), *m))),
                         kv_round_bf16(kv_exp(kv_sub(kv_load(at + KV_BLOCK_ROWS), *m))));
        sum[0] = kv_add(sum[0], kv_first_of_pairs(p));
        sum[1] = kv_add(sum[1], kv_second_of_pairs(p));
        kv_store(at, _mm512_castsi512_ps(p));
    }
    *l = kv_add(sum[0], sum[1]);
}

/* ---- values ---------------------------------------------------------------------------------- */

/* Pairs of a split's tokens, [KV_SPLIT / 2][o_width]; zeros beside a token that has no partner and up
 * to a multiple of KV_LANES. Only words of tokens with a bit in `needed` are read. */
static void kv_dot_pair_values(const kv_split_task *task, const uint32_t *needed, uint32_t *pairs) {
    const kv_split_runs *runs = task->runs;
    int32_t token = runs->start;
    for (int32_t i = 0; i < runs->num_runs; token += runs->v[i++].count) {
        const kv_run *run = &runs->v[i];
        if (!needed[token / 32])
            continue;
        for (int32_t t = 0; t < run->count; t += 2) {
            const uint16_t *first = (const uint16_t *)(run->rows + t * run->stride);
            const int paired = t + 1 < run->count;
            const uint16_t *second = (const uint16_t *)(run->rows + (t + paired) * run->stride);
            uint32_t *to = pairs + (int64_t)(token + t) / 2 * task->o_width;
            for (int32_t d = 0; d < task->head_dim_v; d += KV_LANES) {
                const int left = task->head_dim_v - d, n = left < KV_LANES ? left : KV_LANES;
                _mm512_storeu_si512(to + d,
                                    kv_zip_pairs(kv_load_halves(first + d, n),
                                                 kv_load_halves(second + d, paired ? n : 0)));
            }
        }
    }
}

/* num_vectors vectors of dims: o_r += p_r[t] v[t] over num_pairs pairs of tokens, of which only the
 * halves in `kept` exist. */
KV_INLINE void kv_dot_value_panel(int num_rows, int num_vectors, const float *p,
                                  const uint32_t *values, int32_t num_pairs, uint32_t kept,
                                  float *o, int64_t o_width, int fresh) {
    kv_vec sum[KV_TILE_SUMS];
    const __m512i mask = _mm512_set1_epi32((int32_t)kept);
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        KV_UNROLL
    for (int i = 0; i < num_vectors; i++)
        sum[r * num_vectors + i] = fresh ? kv_zero() : kv_load(o + r * o_width + i * KV_LANES);
    for (; num_pairs > 0; num_pairs--, p += 2 * KV_BLOCK_ROWS, values += o_width) {
        kv_pairs y[KV_TILE_VECTORS];
        KV_UNROLL
        for (int i = 0; i < num_vectors; i++)
            y[i] = _mm512_and_si512(kv_load_pairs(values + i * KV_LANES), mask);
        KV_UNROLL
        for (int r = 0; r < num_rows; r++) {
            const kv_pairs x = kv_broadcast_pair(p + r);
            KV_UNROLL
            for (int i = 0; i < num_vectors; i++)
                sum[r * num_vectors + i] = kv_dot(sum[r * num_vectors + i], x, y[i]);
        }
    }
    KV_UNROLL
    for (int r = 0; r < num_rows; r++)
        KV_UNROLL
    for (int i = 0; i < num_vectors; i++)
        kv_store(o + r * o_width + i * KV_LANES, sum[r * num_vectors + i]);
}

KV_INLINE void kv_dot_value_dims(int num_rows, const float *p, const uint32_t *values,
                                 int32_t num_pairs, uint32_t kept, float *o, int32_t o_width,
                                 int32_t num_steps, int fresh) {
    int32_t d = 0;
    for (; num_steps == 3 || num_steps > 4; num_steps -= 3, d += 3 * KV_LANES)
        kv_dot_value_panel(num_rows, 3, p, values + d, num_pairs, kept, o + d, o_width, fresh);
    for (; num_steps >= 2; num_steps -= 2, d += 2 * KV_LANES)
        kv_dot_value_panel(num_rows, 2, p, values + d, num_pairs, kept, o + d, o_width, fresh);
    if (num_steps == 1)
        kv_dot_value_panel(num_rows, 1, p, values + d, num_pairs, kept, o + d, o_width, fresh);
}

/* Pairs [begin, end) of tokens for KV_TILE_SCALARS, 4 or 1 rows. */
static void kv_dot_value_pairs(const kv_split_task *task, int num_rows, int32_t row, int32_t r,
                               const uint32_t *pairs, int32_t begin, int32_t end, uint32_t kept,
                               int fresh) {
    const float *p = task->scores + 2 * begin * KV_BLOCK_ROWS + r;
    const uint32_t *values = pairs + (int64_t)begin * task->o_width;
    float *o = task->out.o + (int64_t)(row + r) * task->o_width;
    const int32_t num_pairs = end - begin, num_steps = kv_num_steps(task->head_dim_v);
    if (num_rows == KV_TILE_SCALARS)
        kv_dot_value_dims(KV_TILE_SCALARS, p, values, num_pairs, kept, o, task->o_width, num_steps,
                          fresh);
    else if (num_rows == 4)
        kv_dot_value_dims(4, p, values, num_pairs, kept, o, task->o_width, num_steps, fresh);
    else
        kv_dot_value_dims(1, p, values, num_pairs, kept, o, task->o_width, num_steps, fresh);
}

/* A kv_stretch_function. At its ends the other token of a pair may be one that the rows do not see,
 * and may hold NaN: it is left out of the pair. */
static void kv_dot_value_stretch(const kv_split_task *task, int num_rows, int32_t row, int32_t r,
                                 const void *values, int32_t begin, int32_t end, int fresh) {
    const uint32_t *pairs = values;
    if (begin >= end && !fresh)
        return;
    if (begin % 2 != 0 && begin < end) {
        kv_dot_value_pairs(task, num_rows, row, r, pairs, begin / 2, begin / 2 + 1, 0xffff0000,
                           fresh);
        begin++;
        fresh = 0;
    }
    if (begin / 2 < end / 2 || fresh) {
        kv_dot_value_pairs(task, num_rows, row, r, pairs, begin / 2, end / 2, UINT32_MAX, fresh);
        begin = end / 2 * 2;
    }
    if (begin < end)
        kv_dot_value_pairs(task, num_rows, row, r, pairs, begin / 2, begin / 2 + 1, 0xffff, 0);
}

/* ---- one split ------------------------------------------------------------------------------- */

static void kv_dot_attend(const kv_split_task *task) {
    const char *k[KV_SPLIT];
    uint32_t seen[KV_SPLIT_WORDS], *pairs = (uint32_t *)task->decoded;
    const int32_t num_blocks = (task->num_rows + KV_BLOCK_ROWS - 1) / KV_BLOCK_ROWS;
    const int32_t tiles =
        num_blocks * (kv_find_seen(task, 0, task->num_rows, seen) / KV_DOT_TILE_TOKENS);
    kv_dot_list_keys(task->runs, k);
    kv_dot_pair_values(task, seen, pairs);
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
        for (int32_t t = 0; t < count; t += KV_DOT_TILE_TOKENS) {
            kv_fetch_tokens(&fetch, fetched);
            if (kv_tile_is_seen(seen, t, KV_DOT_TILE_TOKENS))
                kv_dot_score_tile(task, row, num_rows, k, t);
        }
        kv_softmax_block(task, row, num_rows, count, kv_dot_softmax_rows);
        kv_value_block(task, row, num_rows, pairs, kv_dot_value_stretch);
    }
}
