"""One cache on two backends: what each operation leaves in memory must be the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuda_emulator.runtime import EmulatedRuntime
from kvcore.backend import Plan
from kvcore.cpu_backend import CpuBackend
from kvcore.cpu_storage import CpuStorage
from kvcore.spec import CacheSpec
from kvcore_gpu.backend import CudaBackend


def assert_same_bytes(mine: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert mine.shape == expected.shape and mine.dtype == expected.dtype, what
    differ = np.flatnonzero(
        np.frombuffer(mine.tobytes(), np.uint8) != np.frombuffer(expected.tobytes(), np.uint8)
    )
    assert not differ.size, f"{what}: {differ.size} bytes differ, first {differ[:4].tolist()}"


class BothBackends(CpuBackend):
    """The CPU backend, which has the GPU's do all again on blocks of its own.

    Attributes:
        cuda: the other backend.
        mirror: its storage, of the cache that was made last.
    """

    def __init__(self, runtime: EmulatedRuntime) -> None:
        self.cuda = CudaBackend(runtime)

    def allocate(
        self, spec: CacheSpec, num_blocks: Sequence[int], device: int | None
    ) -> CpuStorage:
        self.mirror = self.cuda.allocate(spec, num_blocks, device)
        return super().allocate(spec, num_blocks, device)

    def compare(self, storage: CpuStorage, what: str) -> None:
        for pool, (mine, expected) in enumerate(
            zip(self.mirror.pool_blocks, storage.pool_blocks, strict=True)
        ):
            for gpu, cpu in zip(mine, expected, strict=True):
                assert_same_bytes(gpu.array, cpu.array, f"pool {pool} after {what}")

    def begin_step(self, storage: CpuStorage, plans: Sequence[Plan]) -> None:
        self.cuda.begin_step(self.mirror, plans)

    def append(
        self, storage: CpuStorage, layer: int, plan: Plan, k: Any, v: Any | None, layout: str
    ) -> None:
        super().append(storage, layer, plan, k, v, layout)
        self.cuda.append(self.mirror, layer, plan, k, v, layout)
        self.compare(storage, "append")

    def copy_blocks(self, storage: CpuStorage, pool: int, plan: Plan) -> None:
        super().copy_blocks(storage, pool, plan)
        self.cuda.copy_blocks(self.mirror, pool, plan)
        self.compare(storage, "copy_blocks")

    def restore_raw(self, storage: CpuStorage, group: int, plan: Plan) -> None:
        super().restore_raw(storage, group, plan)
        self.cuda.restore_raw(self.mirror, group, plan)
        self.compare(storage, "restore_raw")

    def read(
        self,
        storage: CpuStorage,
        layer: int,
        block_row: np.ndarray,
        start: int,
        stop: int,
        raw_row: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = super().read(storage, layer, block_row, start, stop, raw_row)
        same = self.cuda.read(self.mirror, layer, block_row, start, stop, raw_row)
        for name, mine, expected in zip("kv", same, rows, strict=True):
            assert_same_bytes(mine, expected, f"read: {name}")
        return rows
