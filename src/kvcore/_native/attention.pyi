from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore._native.blocks import Blocks, Plan

NHD: int
HND: int
BSHD: int
BHSD: int

def append(plan: Plan, array: NDArray[Any], dtype: int, layout: int, blocks: Blocks) -> None: ...
def attend(
    plan: Plan,
    q: NDArray[Any],
    q_dtype: int,
    k: Blocks,
    v: Blocks,
    out: NDArray[Any],
    layout: int,
    scale: float,
    exact: bool,
    lse: NDArray[np.float32] | None,
    softcap: float,
    causal: bool,
    window: int,
    alibi_slopes: NDArray[np.float32] | None,
    positions: NDArray[np.int32] | None,
    mask: NDArray[np.uint8] | None,
    mask_offsets: NDArray[np.int64] | None,
    sinks: NDArray[np.float32] | None,
) -> None: ...
def copy_blocks(plan: Plan, blocks: Blocks) -> None: ...
def read(
    blocks: Blocks, block_row: NDArray[np.int32], start: int, stop: int
) -> NDArray[np.float32]: ...
def merge_states(
    outs: NDArray[np.float32],
    lses: NDArray[np.float32],
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None: ...
