/* Partial results over disjoint keys into whole ones: a warp takes a row, a block of 128 threads
 * four. The order is that of merge_states in docs/numerics.md.
 */
#include "device.cuh"

#include "params.cuh"

/* The sum of the partials' weights; of each, 0 where it saw nothing, whatever its out holds. */
KV_DEVICE float weight(float lse, float top) {
    return lse == u32_as_float(0xff800000u) ? 0.0f : expf(lse - top);
}

KV_KERNEL(merge_states, MergeParams, 128, 8) {
    const s64 row = (s64)blockIdx.x * 4 + warp_id();
    if (row >= p.num_rows)
        return;
    const float minus_infinity = u32_as_float(0xff800000u);
    float top = minus_infinity;
    for (s32 i = 0; i < p.num_partials; i++)
        top = fmaxf(top, p.lses[i * p.num_rows + row]);
    const float base = top == minus_infinity ? 0.0f : top;
    float total = 0.0f;
    for (s32 i = 0; i < p.num_partials; i++)
        total += weight(p.lses[i * p.num_rows + row], base);
    for (s32 d = (s32)lane_id(); d < p.head_dim; d += 32) {
        float sum = 0.0f;
        for (s32 i = 0; i < p.num_partials; i++) {
            const s64 at = i * p.num_rows + row;
            if (p.lses[at] != minus_infinity)
                sum = fmaf(weight(p.lses[at], base), p.outs[at * p.head_dim + d], sum);
        }
        p.out[row * p.head_dim + d] = total == 0.0f ? 0.0f : sum / total;
    }
    if (p.lse && lane_id() == 0)
        p.lse[row] = total == 0.0f ? minus_infinity : base + logf(total);
}
