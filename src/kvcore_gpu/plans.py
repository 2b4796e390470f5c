"""Plans in a device's memory: one buffer and one copy for each step."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from kvcore.backend import Plan
from kvcore_gpu import params
from kvcore_gpu.runtime import Runtime

_ITEM = 4  # bytes of an int32
_LEAST_TOKENS = 512


def table_width(num_columns: int, block_size: int) -> int:
    """Columns to keep for sequences of so many blocks: up to a quarter more, or 512 tokens.

    Launches and addresses depend on it, and so stay the same while sequences grow a while.
    """
    if not num_columns:
        return 0  # a plan of slots alone
    step = 1 << max(0, (num_columns - 1).bit_length() - 3)
    return max(_LEAST_TOKENS // block_size, -(-num_columns // step) * step)


class PlanBuffer:
    """Device memory that holds the plans of one step, and of the next when that has closed.

    After `upload`, plan.device of each plan is the struct that kernels take. The arrays of steps of
    equal keys lie at the same addresses.
    """

    def __init__(self, runtime: Runtime, number: int) -> None:
        self._runtime = runtime
        self._number = number
        self._array: Any = None
        self._size = 0
        self._kept: list[Any] = []
        self._owner: weakref.ref[Plan] | None = None

    @property
    def is_free(self) -> bool:
        """Whether the step whose plans it holds has closed, which empties them."""
        owner = None if self._owner is None else self._owner()
        return owner is None or owner.num_sequences == 0

    def upload(self, plans: Sequence[Plan]) -> Hashable:
        """Sends the plans of groups, then of raw rows; returns the key of their addresses."""
        first = plans[0]
        widths = [table_width(plan.num_columns, plan.block_size) for plan in plans]
        sizes = [plan.packed_size(width) for plan, width in zip(plans, widths, strict=True)]
        changes = [plan.packed_changes_size() for plan in plans]
        total = sum(sizes) + sum(changes)
        self._grow(total)
        staged = self._runtime.stage(total)
        base = self._runtime.address(self._array)
        at = 0
        for plan, width, size in zip(plans, widths, sizes, strict=True):
            plan.device = _struct_of(plan, base, width, plan.pack(staged, at, width))
            at += size
        for plan, size in zip(plans, changes, strict=True):
            copies, restores = plan.pack_changes(staged, at)
            plan.device.copies = base + _ITEM * copies
            plan.device.restores = base + _ITEM * restores
            at += size
        for plan in plans:
            if plan.raw is not None:
                _add_raw(plan.device, plan.raw.device)
        self._runtime.upload(staged, self._array)
        self._owner = weakref.ref(first)
        shape = first.num_sequences, first.num_tokens, first.max_new
        return (self._number, len(self._kept), *shape, *widths)

    def _grow(self, count: int) -> None:
        """Makes room; memory that graphs may use is kept."""
        if count > self._size:
            self._size = 1 << max(12, (count - 1).bit_length())
            self._array = self._runtime.empty((self._size,), np.int32)
            self._kept.append(self._array)


def _struct_of(
    plan: Plan, base: int, width: int, offsets: tuple[int, int, int, int]
) -> params.Plan:
    starts, lens, slots, tables = (base + _ITEM * offset for offset in offsets)
    return params.Plan(
        query_starts=starts,
        seq_lens=lens,
        slots=slots,
        tables=tables,
        num_sequences=plan.num_sequences,
        num_tokens=plan.num_tokens,
        table_width=width,
        num_copies=plan.num_copies,
        num_restores=plan.num_restores,
        max_new=plan.max_new,
    )


def _add_raw(struct: params.Plan, raw: params.Plan) -> None:
    struct.raw_slots, struct.raw_tables = raw.slots, raw.tables
    struct.raw_width = raw.table_width
    struct.restores, struct.num_restores = raw.restores, raw.num_restores


class PlanBuffers:
    """As many buffers as steps have been open at once."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._buffers: list[PlanBuffer] = []

    def upload(self, plans: Sequence[Plan]) -> Hashable:
        """See PlanBuffer.upload."""
        buffer = next((buffer for buffer in self._buffers if buffer.is_free), None)
        if buffer is None:
            buffer = PlanBuffer(self._runtime, len(self._buffers))
            self._buffers.append(buffer)
        return buffer.upload(plans)
