#include "attend_sight.h"

#include "raw_rows.h"

static int32_t num_new(const kv_plan *plan, int32_t s) {
    return plan->query_starts[s + 1] - plan->query_starts[s];
}

/* Below 0 where queries outnumber the keys, none of which is then a new token's. */
static int32_t num_stored(const kv_plan *plan, int32_t s) {
    return plan->seq_lens[s] - num_new(plan, s);
}

static int is_moved(const kv_plan *plan, const int32_t *positions) {
    for (int32_t s = 0; s < plan->num_sequences; s++)
        for (int32_t t = 0; t < num_new(plan, s); t++)
            if (positions[plan->query_starts[s] + t] != num_stored(plan, s) + t)
                return 1;
    return 0;
}

kv_sight kv_sight_of(const kv_plan *plan, const kv_attend_options *options) {
    return (kv_sight){.plan = plan,
                      .options = options,
                      .narrowed = options->window > 0 || options->mask,
                      .moved = options->positions && is_moved(plan, options->positions)};
}

int32_t kv_raw_begin(const kv_sight *sight, int32_t s, int32_t token) {
    return sight->quantized ? kv_raw_start(sight->quantized, num_stored(sight->plan, s) + token)
                            : INT32_MAX;
}

static const uint8_t *mask_row(const kv_sight *sight, int32_t s, int32_t token) {
    const kv_attend_options *options = sight->options;
    if (!options->mask || options->mask_offsets[s] < 0)
        return NULL;
    return options->mask + options->mask_offsets[s] +
           token * kv_mask_row_bytes(sight->plan->seq_lens[s]);
}

/* The shortest span of set bits; whole bytes of zeros are passed at once. */
static kv_span trim(const uint8_t *bits, kv_span span) {
    while (span.begin < span.end) {
        const int rest = bits[span.begin / 8] >> span.begin % 8;
        if (rest & 1)
            break;
        span.begin += rest ? 1 : 8 - span.begin % 8;
    }
    while (span.begin < span.end) {
        const int32_t last = span.end - 1;
        const int rest = (uint8_t)(bits[last / 8] << (7 - last % 8));
        if (rest & 0x80)
            break;
        span.end -= rest ? 1 : last % 8 + 1;
    }
    return span;
}

kv_view kv_look(const kv_sight *sight, int32_t s, int32_t token) {
    const kv_attend_options *options = sight->options;
    const kv_plan *plan = sight->plan;
    const int32_t stored = num_stored(plan, s);
    kv_view view = {.mask = mask_row(sight, s, token), .position = (int64_t)stored + token};
    int64_t begin = 0, end = plan->seq_lens[s];
    if (!view.mask && !options->non_causal)
        end = view.position + 1;
    if (sight->moved)
        view.position = options->positions[plan->query_starts[s] + token];
    if (options->window > 0) {
        begin = view.position - options->window + 1 > 0 ? view.position - options->window + 1 : 0;
        if (sight->moved && stored >= 0) {
            view.placed = options->positions + plan->query_starts[s];
            view.first_placed = stored;
            view.window = options->window;
            begin = begin < stored ? begin : stored;
        } else if (view.position + 1 < end) {
            end = view.position + 1;
        }
    }
    view.span = begin < end ? (kv_span){(int32_t)begin, (int32_t)end} : (kv_span){0, 0};
    if (view.mask)
        view.span = trim(view.mask, view.span);
    if (view.span.begin >= view.span.end)
        view.span = (kv_span){0, 0};
    return view;
}

kv_span kv_joint_span(const kv_sight *sight, int32_t s, int32_t first, int32_t last) {
    const kv_view view = kv_look(sight, s, last);
    kv_span span = view.span;
    /* Unless something narrows it, the last token sees all that the others see. */
    if (!sight->narrowed)
        return span;
    if (!sight->moved && !view.mask)
        return (kv_span){kv_look(sight, s, first).span.begin, span.end};
    for (int32_t token = first; token < last; token++) {
        const kv_span other = kv_look(sight, s, token).span;
        if (span.begin == span.end) {
            span = other;
        } else if (other.begin < other.end) {
            span.begin = other.begin < span.begin ? other.begin : span.begin;
            span.end = other.end > span.end ? other.end : span.end;
        }
    }
    return span;
}

/* Bits [begin, end) of one word, each counted from its first. */
static uint32_t bit_range(int64_t begin, int64_t end) {
    begin = begin < 0 ? 0 : begin;
    end = end > 32 ? 32 : end;
    return begin < end ? UINT32_MAX >> (32 - (end - begin)) << begin : 0;
}

/* Bits of 32 keys from `first` on, a multiple of 8, of which those before `end` exist. */
static uint32_t mask_word(const uint8_t *mask, int32_t first, int32_t end) {
    uint32_t word = 0;
    for (int32_t i = 0; i < 4 && first + 8 * i < end; i++)
        word |= (uint32_t)mask[first / 8 + i] << 8 * i;
    return word;
}

/* Bits of 32 keys from `first` on that lie in the view's window by where they stand. */
static uint32_t window_word(const kv_view *view, int32_t first, int32_t end) {
    const int64_t low = view->position - view->window + 1, high = view->position + 1;
    const int64_t last_stored = high < view->first_placed ? high : view->first_placed;
    uint32_t word = bit_range(low - first, last_stored - first);
    for (int32_t t = 0; t < 32 && first + t < end; t++) {
        const int32_t i = first + t - view->first_placed;
        if (i >= 0)
            word |= (uint32_t)(low <= view->placed[i] && view->placed[i] < high) << t;
    }
    return word;
}

int32_t kv_visible_bits(const kv_view *view, int32_t begin, uint32_t words[KV_SPLIT_WORDS]) {
    const kv_span span = view->span;
    int32_t end = 0;
    for (int32_t w = 0; w < KV_SPLIT_WORDS; w++) {
        const int32_t first = begin + 32 * w;
        uint32_t word = bit_range((int64_t)span.begin - first, (int64_t)span.end - first);
        if (word && view->mask)
            word &= mask_word(view->mask, first, span.end);
        if (word && view->placed)
            word &= window_word(view, first, span.end);
        words[w] = word;
        if (word)
            end = 32 * (w + 1) - __builtin_clz(word);
    }
    return end;
}

int kv_key_places(const kv_sight *sight, int32_t s, int32_t begin, float *places) {
    const kv_plan *plan = sight->plan;
    const int32_t stored = num_stored(plan, s), left = plan->seq_lens[s] - begin;
    const int32_t count = left < KV_SPLIT ? left : KV_SPLIT;
    if (!sight->moved || stored < 0 || begin + count <= stored)
        return 0;
    const int32_t *positions = sight->options->positions + plan->query_starts[s];
    for (int32_t t = 0; t < KV_SPLIT; t++)
        places[t] = (float)t;
    for (int32_t t = stored > begin ? stored - begin : 0; t < count; t++)
        places[t] = (float)((int64_t)positions[begin + t - stored] - begin);
    return 1;
}
