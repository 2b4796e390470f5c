from typing import Any

import numpy as np
from numpy.typing import NDArray

def token_ids(value: Any) -> NDArray[np.int32] | None: ...
