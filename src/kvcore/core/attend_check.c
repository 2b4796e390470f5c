#include "attend_check.h"

#include "storage.h"

#include <math.h>

static kv_status check_sequences(const kv_plan *plan, const kv_blocks *k, const kv_blocks *v) {
    const int32_t num_blocks = k->num_blocks < v->num_blocks ? k->num_blocks : v->num_blocks;
    if (plan->num_sequences > 0 && (!plan->seq_lens || !plan->block_rows))
        return KV_ERR_NULL;
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        const int32_t num_new = plan->query_starts[s + 1] - plan->query_starts[s];
        const int32_t length = plan->seq_lens[s];
        if (length < num_new)
            return KV_ERR_RANGE;
        if (num_new == 0)
            continue;
        if (!plan->block_rows[s])
            return KV_ERR_NULL;
        const kv_status status = kv_check_block_ids(
            plan->block_rows[s], ((int64_t)length + k->block_size - 1) / k->block_size, num_blocks);
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
                          const kv_blocks *v, const kv_attend_options *options,
                          const kv_rows *out) {
    kv_status status;
    if (!plan || !q || !options || !out)
        return KV_ERR_NULL;
    if (options->struct_size < sizeof(*options) || !isfinite(options->scale))
        return KV_ERR_VALUE;
    if ((status = kv_check_blocks(k)) != KV_OK || (status = kv_check_blocks(v)) != KV_OK ||
        (status = kv_check_queries(plan, q->padded_length)) != KV_OK ||
        (status = kv_check_queries(plan, out->padded_length)) != KV_OK ||
        (status = kv_check_rows(q, plan->num_sequences, plan->num_tokens, 0)) != KV_OK ||
        (status = kv_check_rows(out, plan->num_sequences, plan->num_tokens, 1)) != KV_OK ||
        (status = check_shapes(plan, q, k, v, out)) != KV_OK)
        return status;
    return check_sequences(plan, k, v);
}
