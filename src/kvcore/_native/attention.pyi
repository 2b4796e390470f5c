from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore._native.blocks import Blocks, Plan

NHD: int
HND: int
BSHD: int
BHSD: int

DTYPES: dict[np.dtype[Any], int]

def fits(plan: Plan, value: Any, layout: int, blocks: Blocks, grouped: bool = False) -> bool: ...
def append(plan: Plan, array: NDArray[Any], layout: int, blocks: Blocks) -> None: ...
def attend(
    plan: Plan,
    q: NDArray[Any],
    layout: int,
    k: Blocks,
    v: Blocks,
    out: NDArray[Any] | None,
    return_lse: bool,
    scale: float,
    exact: bool,
    softcap: float,
    causal: bool,
    window: int,
    alibi_slopes: NDArray[np.float32] | None,
    positions: NDArray[np.int32] | None,
    mask: NDArray[np.uint8] | None,
    mask_offsets: NDArray[np.int64] | None,
    sinks: NDArray[np.float32] | None,
) -> Any: ...
def check_sight(
    plan: Plan,
    num_blocks: int,
    causal: bool,
    window: int,
    positions: NDArray[np.int32] | None,
    mask: NDArray[np.uint8] | None,
    mask_offsets: NDArray[np.int64] | None,
) -> None: ...
def copy_blocks(plan: Plan, blocks: Blocks) -> None: ...
def restore_raw(plan: Plan, blocks: Blocks) -> None: ...
def find_not_finite(plan: Plan, array: NDArray[Any], layout: int) -> tuple[int, int] | None: ...
def read(
    blocks: Blocks,
    block_row: NDArray[np.int32],
    start: int,
    stop: int,
    raw_row: NDArray[np.int32] | None = None,
) -> NDArray[np.float32]: ...
def merge_states(
    outs: NDArray[np.float32],
    lses: NDArray[np.float32],
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None: ...
