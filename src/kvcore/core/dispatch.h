/* Which kernels run: chosen once from the CPU, or by the environment variable KVCORE_ISA. */
#ifndef KVCORE_CORE_DISPATCH_H
#define KVCORE_CORE_DISPATCH_H

#include "kernels/kernels.h"

/* The kernels in use. NULL when KVCORE_ISA names an ISA that is unknown or not available here; the
 * caller then returns KV_ERR_UNSUPPORTED. kv_get_isa reports such a state as "none". */
const kv_kernels *kv_active_kernels(void);

#endif
