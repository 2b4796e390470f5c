/* Runs the units of one line in parallel parts, and joins the units that were cut. */
#ifndef KVCORE_CORE_ATTEND_LINE_H
#define KVCORE_CORE_ATTEND_LINE_H

#include "attend_tile.h"

typedef struct kv_line {
    const kv_attend_call *call;
    kv_unit *units; /* [num_units + 1], with room for KV_MAX_THREADS - 1 more */
    kv_bound *bounds;
    kv_cut *cuts;
    int64_t num_units, slot_rows;
    int32_t tile_rows; /* of the unit that has the most */
    int32_t num_parts, num_cuts, num_join_parts;
    float *slots;  /* [slot_rows] o, then m, then l */
    char *scratch; /* [num_parts] of scratch_bytes */
    int64_t scratch_bytes;
} kv_line;

/* Cuts the listed units, which cost `cost`, into parts. */
void kv_line_cut(kv_line *line, int64_t cost);

/* Bytes of the slots and of the scratch of all parts. */
int64_t kv_line_nbytes(kv_line *line);

/* Runs the line in that many bytes of memory. */
void kv_line_run(kv_line *line, char *memory);

#endif
