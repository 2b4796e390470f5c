/* What the CPU can do and the operating system saves on a context switch. */
#ifndef KVCORE_CORE_CPU_FEATURES_H
#define KVCORE_CORE_CPU_FEATURES_H

#include "kvcore.h"

/* Whether kv_cpu_features lists `name`. */
int kv_cpu_has(const char *name);

/* Whether a dot product of bf16 pairs, where the CPU has it, is expected to take less time than the
 * two FMAs whose work it does. */
int kv_cpu_dots_fast(void);

#endif
