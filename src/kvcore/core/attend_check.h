/* Whether the arguments of kv_attend are sound; *known gets the options, those that the caller's
 * struct does not have being off. */
#ifndef KVCORE_CORE_ATTEND_CHECK_H
#define KVCORE_CORE_ATTEND_CHECK_H

#include "kvcore.h"

kv_status kv_check_attend(const kv_plan *plan, const kv_rows *q, const kv_blocks *k,
                          const kv_blocks *v, const kv_attend_options *options, const kv_rows *out,
                          kv_attend_options *known);

#endif
