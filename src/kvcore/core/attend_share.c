#include "attend_share.h"

#include <stdlib.h>

enum { MAX_SEQUENCE_ROWS = 16 /* with more, arithmetic and not reading takes the time */ };

_Static_assert((int)MAX_SEQUENCE_ROWS < (int)KV_DOT_TOKENS, "members of a share take no dots");
_Static_assert((int)MAX_SEQUENCE_ROWS <= (int)KV_ENCODED_ROWS, "... and read encoded rows alike");

/* Sorted as a whole: what counts above, the sequence below. */
typedef struct candidate {
    int64_t key;
    int32_t sequence;
    int32_t num_splits; /* that it could share */
} candidate;

int64_t kv_shares_nbytes(int32_t num_sequences) {
    return num_sequences * (int64_t)(sizeof(candidate) + sizeof(kv_share) + 4 * sizeof(int32_t));
}

static void lay_out(int32_t num_sequences, void *memory, candidate **candidates, kv_shares *out) {
    *candidates = memory;
    out->list = (kv_share *)(*candidates + num_sequences);
    out->members = (int32_t *)(out->list + num_sequences);
    out->first_rows = out->members + num_sequences;
    out->share_of = out->first_rows + num_sequences;
    out->member_of = out->share_of + num_sequences;
    out->count = 0;
}

static int32_t num_new(const kv_plan *plan, int32_t s) {
    return plan->query_starts[s + 1] - plan->query_starts[s];
}

/* Splits stored before this call that all rows of the sequence see whole. */
static int32_t num_whole_splits(const kv_sight *sight, int32_t group_size, int32_t s) {
    const int32_t count = num_new(sight->plan, s);
    if (count == 0 || (int64_t)count * group_size > MAX_SEQUENCE_ROWS)
        return 0;
    int32_t end =
        sight->plan->seq_lens[s] - count + 1; /* so that a token is left to the sequence */
    for (int32_t t = 0; t < count; t++) {
        const kv_view view = kv_look(sight, s, t);
        if (kv_is_scattered(&view) || view.span.begin > 0)
            return 0;
        end = view.span.end < end ? view.span.end : end;
    }
    /* What one member reads raw another may not. The first token reads most of it. */
    const int32_t raw_begin = kv_raw_begin(sight, s, 0);
    end = raw_begin < end ? raw_begin + 1 : end;
    return end > 0 ? (end - 1) / KV_SPLIT : 0;
}

static int compare(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->key != y->key)
        return x->key < y->key ? -1 : 1;
    return x->sequence < y->sequence ? -1 : x->sequence > y->sequence;
}

/* Candidates by their first block; those that share nothing with a neighbour stay in as well. */
static int32_t list_candidates(const kv_sight *sight, int32_t group_size, candidate *candidates) {
    const kv_plan *plan = sight->plan;
    int32_t count = 0;
    for (int32_t s = 0; s < plan->num_sequences; s++) {
        const int32_t num_splits = num_whole_splits(sight, group_size, s);
        if (num_splits > 0)
            candidates[count++] = (candidate){plan->block_rows[s][0], s, num_splits};
    }
    qsort(candidates, (size_t)count, sizeof(*candidates), compare);
    return count;
}

/* Whole splits that two sequences have in the same blocks. */
static int32_t common_splits(const kv_plan *plan, const candidate *a, const candidate *b) {
    const int32_t most = a->num_splits < b->num_splits ? a->num_splits : b->num_splits;
    const int32_t *x = plan->block_rows[a->sequence], *y = plan->block_rows[b->sequence];
    const int32_t columns =
        (int32_t)(((int64_t)most * KV_SPLIT + plan->block_size - 1) / plan->block_size);
    int32_t same = 0;
    while (same < columns && x[same] == y[same])
        same++;
    const int64_t splits = (int64_t)same * plan->block_size / KV_SPLIT;
    return splits < most ? (int32_t)splits : most;
}

static void add_share(const kv_sight *sight, int32_t group_size, const candidate *members,
                      int32_t count, int32_t num_splits, kv_shares *out) {
    const kv_share *before = out->count > 0 ? &out->list[out->count - 1] : NULL;
    kv_share *share = &out->list[out->count];
    *share = (kv_share){.first_member = before ? before->first_member + before->num_members : 0,
                        .num_members = count,
                        .num_splits = num_splits,
                        .rows_before = before ? before->rows_before + before->num_rows : 0};
    for (int32_t i = 0; i < count; i++) {
        const int32_t s = members[i].sequence, place = share->first_member + i;
        out->members[place] = s;
        out->first_rows[place] = share->num_rows;
        out->share_of[s] = out->count;
        out->member_of[s] = place;
        share->num_rows += num_new(sight->plan, s) * group_size;
    }
    out->count++;
}

/* Takes from candidates with the same first block those that share most with the first of them.
 * Returns how many now lie, done with, at their front. */
static int32_t take_share(const kv_sight *sight, int32_t group_size, candidate *candidates,
                          int32_t count, kv_shares *out) {
    const candidate leader = candidates[0];
    for (int32_t i = 0; i < count; i++)
        candidates[i].key = -(int64_t)common_splits(sight->plan, &leader, &candidates[i]);
    candidates[0].key = -(int64_t)leader.num_splits;
    qsort(candidates, (size_t)count, sizeof(*candidates), compare);
    int64_t most = 0;
    int32_t taken = 1;
    for (int32_t i = 1; i < count; i++) {
        const int64_t spared = i * -candidates[i].key;
        if (spared >= most && spared > 0) {
            most = spared;
            taken = i + 1;
        }
    }
    if (taken > 1)
        add_share(sight, group_size, candidates, taken, (int32_t)-candidates[taken - 1].key, out);
    return taken;
}

void kv_find_shares(const kv_sight *sight, int32_t group_size, void *memory, kv_shares *out) {
    const int32_t num_sequences = sight->plan->num_sequences;
    candidate *candidates;
    lay_out(num_sequences, memory, &candidates, out);
    for (int32_t s = 0; s < num_sequences; s++)
        out->share_of[s] = -1;
    const int32_t count = list_candidates(sight, group_size, candidates);
    for (int32_t begin = 0, end; begin < count; begin = end) {
        end = begin + 1;
        while (end < count && candidates[end].key == candidates[begin].key)
            end++;
        for (int32_t i = begin; end - i > 1;)
            i += take_share(sight, group_size, candidates + i, end - i, out);
    }
}

int32_t kv_share_member(const kv_shares *shares, const kv_share *share, int32_t row) {
    int32_t low = share->first_member, high = low + share->num_members - 1;
    while (low < high) {
        const int32_t middle = (low + high + 1) / 2;
        if (shares->first_rows[middle] <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}
