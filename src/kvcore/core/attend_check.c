#include "attend_check.h"

#include "attend_sight.h"
#include "raw_rows.h"
#include "storage.h"

#include <math.h>
#include <string.h>

/* The struct of the first release ended here. */
#define FIRST_OPTIONS_SIZE offsetof(kv_attend_options, non_causal)

static kv_status read_options(const kv_attend_options *options, kv_attend_options *known) {
    if (!options)
        return KV_ERR_NULL;
    if (options->struct_size < FIRST_OPTIONS_SIZE)
        return KV_ERR_VALUE;
    memset(known, 0, sizeof(*known));
    memcpy(known, options,
           options->struct_size < sizeof(*known) ? options->struct_size : sizeof(*known));
    if (!isfinite(known->scale) || known->window < 0 || !isfinite(known->softcap) ||
        known->softcap < 0.0f || (known->mask && known->mask_size < 0))
        return KV_ERR_VALUE;
    return known->mask && !known->mask_offsets ? KV_ERR_NULL : KV_OK;
}

static int all_finite(const float *x, int32_t count) {
    for (int32_t i = 0; x && i < count; i++)
        if (!isfinite(x[i]))
            return 0;
    return 1;
}

/* The arrays of options, whose lengths the plan and the heads give. */
static kv_status check_option_arrays(const kv_plan *plan, const kv_attend_options *options,
                                     int32_t num_heads) {
    if (!all_finite(options->alibi_slopes, num_heads) || !all_finite(options->sinks, num_heads))
        return KV_ERR_VALUE;
    for (int32_t t = 0; options->positions && t < plan->num_tokens; t++)
        if (options->positions[t] < 0)
            return KV_ERR_RANGE;
    for (int32_t s = 0; options->mask && s < plan->num_sequences; s++) {
        const int64_t num_new = plan->query_starts[s + 1] - plan->query_starts[s];
        const int64_t offset = options->mask_offsets[s];
        if (offset < -1 || (offset >= 0 && (offset > options->mask_size ||
                                            num_new * kv_mask_row_bytes(plan->seq_lens[s]) >
                                                options->mask_size - offset)))
            return KV_ERR_RANGE;
    }
    return KV_OK;
}

/* Without causality a sequence may hold fewer tokens than it asks about. */
static int is_causal(const kv_attend_options *options, int32_t s) {
    return !options->non_causal && !(options->mask && options->mask_offsets[s] >= 0);
}

static kv_status check_lengths(const kv_plan *plan, const kv_attend_options *options) {
    if (plan->num_sequences > 0 && (!plan->seq_lens || !plan->block_rows))
        return KV_ERR_NULL;
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        const int32_t num_new = plan->query_starts[s + 1] - plan->query_starts[s];
        const int32_t length = plan->seq_lens[s];
        if (length < 0 || (length < num_new && is_causal(options, s)))
            return KV_ERR_RANGE;
        if (num_new > 0 && length > 0 && !plan->block_rows[s])
            return KV_ERR_NULL;
    }
    return KV_OK;
}

/* Blocks that no new token sees may have been released. */
static kv_status check_seen_blocks(const kv_plan *plan, int32_t num_blocks,
                                   const kv_attend_options *options) {
    const kv_sight sight = kv_sight_of(plan, options);
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        const int32_t num_new = plan->query_starts[s + 1] - plan->query_starts[s];
        if (num_new == 0)
            continue;
        const kv_span span = kv_joint_span(&sight, s, 0, num_new - 1);
        if (span.begin == span.end)
            continue;
        const int32_t first = span.begin / plan->block_size;
        const int32_t last = (span.end - 1) / plan->block_size;
        const kv_status status =
            kv_check_block_ids(plan->block_rows[s] + first, last - first + 1, num_blocks);
        if (status != KV_OK)
            return status;
    }
    return KV_OK;
}

/* The raw rows that some new token of a sequence may read: its first one reads the most. */
static kv_status check_raw_blocks(const kv_sight *sight, int32_t s) {
    const kv_blocks *quantized = sight->quantized;
    const kv_plan *plan = sight->plan, *raw = plan->raw;
    const int32_t length = plan->seq_lens[s];
    if (!raw->block_rows[s])
        return KV_ERR_NULL;
    const int32_t first = kv_raw_begin(sight, s, 0) / KV_RAW_BLOCK_SIZE;
    const int32_t columns = (length - 1) / KV_RAW_BLOCK_SIZE + 1;
    const int32_t *row = raw->block_rows[s];
    const int32_t num_blocks = quantized->raw->num_blocks;
    const kv_status status =
        first < columns ? kv_check_block_ids(row + first, columns - first, num_blocks) : KV_OK;
    return status == KV_OK && quantized->raw_first > 0 ? kv_check_block_ids(row, 1, num_blocks)
                                                       : status;
}

static kv_status check_all_raw_blocks(const kv_plan *plan, const kv_blocks *k, const kv_blocks *v,
                                      const kv_attend_options *options) {
    kv_sight sight = kv_sight_of(plan, options);
    sight.quantized = k->raw ? k : v->raw ? v : NULL;
    if (!sight.quantized)
        return KV_OK;
    if (k->raw && v->raw && (k->raw_first != v->raw_first || k->raw_last != v->raw_last))
        return KV_ERR_VALUE;
    if (plan->num_sequences > 0 && (!plan->raw || !plan->raw->block_rows))
        return KV_ERR_NULL;
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        const int32_t num_new = plan->query_starts[s + 1] - plan->query_starts[s];
        if (plan->seq_lens[s] < num_new)
            return KV_ERR_RANGE;
        const kv_status status = num_new > 0 ? check_raw_blocks(&sight, s) : KV_OK;
        if (status != KV_OK)
            return status;
    }
    return KV_OK;
}

static kv_status check_shapes(const kv_plan *plan, const kv_rows *q, const kv_blocks *k,
                              const kv_blocks *v, const kv_rows *out) {
    if (k->num_heads != v->num_heads || k->block_size != v->block_size ||
        k->block_size != plan->block_size || q->head_dim != k->head_dim ||
        out->head_dim != v->head_dim || out->num_heads != q->num_heads ||
        q->num_heads % k->num_heads != 0)
        return KV_ERR_VALUE;
    /* A row of a tile is an int32. */
    if ((int64_t)plan->num_tokens * q->num_heads > INT32_MAX / 2)
        return KV_ERR_OVERFLOW;
    return KV_OK;
}

kv_status kv_check_attend(const kv_plan *plan, const kv_rows *q, const kv_blocks *k,
                          const kv_blocks *v, const kv_attend_options *options, const kv_rows *out,
                          kv_attend_options *known) {
    kv_status status;
    if (!plan || !q || !out)
        return KV_ERR_NULL;
    if ((status = read_options(options, known)) != KV_OK ||
        (status = kv_check_blocks(k)) != KV_OK || (status = kv_check_blocks(v)) != KV_OK ||
        (status = kv_check_queries(plan, q->padded_length)) != KV_OK ||
        (status = kv_check_queries(plan, out->padded_length)) != KV_OK ||
        (status = kv_check_rows(q, plan->num_sequences, plan->num_tokens, 0)) != KV_OK ||
        (status = kv_check_rows(out, plan->num_sequences, plan->num_tokens, 1)) != KV_OK ||
        (status = check_shapes(plan, q, k, v, out)) != KV_OK)
        return status;
    if ((status = check_lengths(plan, known)) != KV_OK ||
        (status = check_option_arrays(plan, known, q->num_heads)) != KV_OK)
        return status;
    const int32_t num_blocks = k->num_blocks < v->num_blocks ? k->num_blocks : v->num_blocks;
    if ((status = check_seen_blocks(plan, num_blocks, known)) != KV_OK)
        return status;
    return check_all_raw_blocks(plan, k, v, known);
}

kv_status kv_plan_check_sight(const kv_plan *plan, int32_t num_blocks,
                              const kv_attend_options *options) {
    kv_attend_options known;
    kv_status status;
    if (!plan)
        return KV_ERR_NULL;
    if (plan->block_size <= 0 || num_blocks < 0)
        return KV_ERR_VALUE;
    if ((status = read_options(options, &known)) != KV_OK ||
        (status = kv_check_queries(plan, 0)) != KV_OK ||
        (status = check_lengths(plan, &known)) != KV_OK ||
        (status = check_option_arrays(plan, &known, 0)) != KV_OK)
        return status;
    return check_seen_blocks(plan, num_blocks, &known);
}
