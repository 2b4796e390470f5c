"""How attention.py cuts a call into launches."""

from __future__ import annotations

from typing import Any

import pytest

from kvcore import formats
from kvcore_gpu import attention
from kvcore_gpu.params import AttendParams

HEADS, DIM, GROUP = 8, 128, 4


def launches_for(
    runtime: Any, num_sequences: int, new: int, num_tokens: int
) -> tuple[list[attention.Launch], int]:
    """Launches for tables of so many tokens, and the bytes of their partial results."""
    bf16 = formats.get_format("bf16")
    shape = attention.Shape(
        bf16, bf16, DIM, DIM, False, HEADS, GROUP, 16, 2, options=False, exact=True
    )
    params = AttendParams()
    plan = params.plan
    plan.num_sequences, plan.max_new = num_sequences, new
    plan.num_tokens, plan.table_width = num_sequences * new, num_tokens // 16
    taken: dict[str, int] = {}

    def scratch(name: str, count: int, dtype: type) -> int:
        taken[name] = 4 * count
        return 0

    found = attention.Attention(runtime, shape).launches(params, scratch)
    return found, taken["partial_out"] + taken["partial_states"]


@pytest.mark.parametrize(
    ("num_sequences", "new", "num_tokens"), [(1, 1, 512), (1000, 1, 131072), (64, 16, 32768)]
)
def test_partial_results_are_bounded(
    emulated_backend: Any, num_sequences: int, new: int, num_tokens: int
) -> None:
    launches, nbytes = launches_for(emulated_backend.runtime, num_sequences, new, num_tokens)
    assert nbytes <= attention.MAX_PARTIAL_BYTES
    assert (len(launches) == 1) == (num_sequences == 1)
    # Each tile of each sequence is taken once.
    splits = -(-num_tokens // 512)
    places = [
        (launch.first_sequence + sequence, launch.tiles[0] + tile)
        for launch in launches
        for sequence in range(launch.grid[2])
        for tile in range(launch.grid[0] // splits)
        if launch.tiles[0] + tile < -(-new * GROUP // 16)
    ]
    assert len(places) == len(set(places)) == num_sequences * -(-new * GROUP // 16)
