cimport numpy as cnp


cpdef cnp.ndarray token_ids(object value)
