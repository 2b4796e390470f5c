#include "attend_sight.h"

static int32_t num_stored(const kv_plan *plan, int32_t s) {
    return plan->seq_lens[s] - (plan->query_starts[s + 1] - plan->query_starts[s]);
}

int64_t kv_query_position(const kv_sight *sight, int32_t s, int32_t token) {
    if (sight->options->positions)
        return sight->options->positions[sight->plan->query_starts[s] + token];
    return (int64_t)num_stored(sight->plan, s) + token;
}

const uint8_t *kv_mask_row(const kv_sight *sight, int32_t s, int32_t token) {
    const kv_attend_options *options = sight->options;
    if (!options->mask || options->mask_offsets[s] < 0)
        return NULL;
    return options->mask + options->mask_offsets[s] + (int64_t)token * sight->plan->seq_lens[s];
}

kv_span kv_visible_span(const kv_sight *sight, int32_t s, int32_t token) {
    const kv_attend_options *options = sight->options;
    const uint8_t *mask = kv_mask_row(sight, s, token);
    int64_t begin = 0, end = sight->plan->seq_lens[s];
    if (!mask && !options->non_causal)
        end = (int64_t)num_stored(sight->plan, s) + token + 1;
    if (options->window > 0) {
        const int64_t position = kv_query_position(sight, s, token);
        if (position - options->window + 1 > begin)
            begin = position - options->window + 1;
        if (position + 1 < end)
            end = position + 1;
    }
    if (mask) {
        while (begin < end && !mask[end - 1])
            end--;
        while (begin < end && !mask[begin])
            begin++;
    }
    return begin < end ? (kv_span){(int32_t)begin, (int32_t)end} : (kv_span){0, 0};
}

/* Bits [begin, end) of one word, each counted from its first. */
static uint32_t bit_range(int32_t begin, int32_t end) {
    begin = begin < 0 ? 0 : begin;
    end = end > 32 ? 32 : end;
    return begin < end ? UINT32_MAX >> (32 - (end - begin)) << begin : 0;
}

int32_t kv_visible_bits(kv_span span, const uint8_t *mask, int32_t begin,
                        uint32_t words[KV_SPLIT_WORDS]) {
    int32_t end = 0;
    for (int32_t w = 0; w < KV_SPLIT_WORDS; w++) {
        const int32_t first = begin + 32 * w;
        uint32_t word = bit_range(span.begin - first, span.end - first);
        if (mask && word) {
            uint32_t kept = 0;
            for (int32_t t = 0; t < 32 && first + t < span.end; t++)
                kept |= (uint32_t)(mask[first + t] != 0) << t;
            word &= kept;
        }
        words[w] = word;
        if (word)
            end = 32 * (w + 1) - __builtin_clz(word);
    }
    return end;
}
