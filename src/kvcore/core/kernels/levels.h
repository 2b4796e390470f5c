/* The levels that the codes of the rot formats stand for: docs/formats.md. */
#ifndef KVCORE_CORE_KERNELS_LEVELS_H
#define KVCORE_CORE_KERNELS_LEVELS_H

#include <stdint.h>

/* Lloyd-Max levels of a normal distribution, the outermost 127. Codes 2^(bits - 1) and up stand for
 * these, in order; the codes below for the same, negative and backwards. */
static const int8_t kv_rot4_levels[8] = {6, 18, 31, 44, 58, 75, 96, 127};
static const int8_t kv_rot3_levels[4] = {14, 45, 79, 127};
static const int8_t kv_rot2_levels[2] = {38, 127};

/* Levels in one standard deviation of what is encoded. */
#define KV_ROT4_UNIT 46.47f
#define KV_ROT3_UNIT 59.02f
#define KV_ROT2_UNIT 84.11f

#endif
