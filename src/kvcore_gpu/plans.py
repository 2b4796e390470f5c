"""Plans in a device's memory: one buffer and one copy for each step."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcore.backend import Plan
from kvcore.errors import InvalidArgument
from kvcore_gpu import params
from kvcore_gpu.runtime import Runtime

_ITEM = 4  # bytes of an int32
_LEAST_TOKENS = 512
_MOST_KEPT = 64  # layouts
_MOST_SEQUENCES = 65535  # blocks of a grid along z, which sequences are


def table_width(num_columns: int, block_size: int) -> int:
    """Columns to keep for sequences of so many blocks: up to a quarter more, or 512 tokens.

    Launches and addresses depend on it, and so stay the same while sequences grow for a while.
    """
    if not num_columns:
        return 0  # a plan of slots alone
    step = 1 << max(0, (num_columns - 1).bit_length() - 3)
    return max(_LEAST_TOKENS // block_size, -(-num_columns // step) * step)


@dataclass(slots=True)
class _Layout:
    """Where the plans of steps of one key lie."""

    structs: list[params.Plan]
    starts: list[int]
    size: int


class PlanBuffer:
    """Device memory that holds the plans of one step, and of the next when that has closed.

    After `upload`, plan.device of each plan is the struct that kernels take. Steps of equal keys
    have the same structs, with the same addresses.
    """

    def __init__(self, runtime: Runtime, number: int) -> None:
        self._runtime = runtime
        self._number = number
        self._array: Any = None
        self._base = 0
        self._size = 0
        self._kept: list[Any] = []
        self._layouts: dict[tuple[int, ...], _Layout] = {}
        self._owner: weakref.ref[Plan] | None = None

    @property
    def is_free(self) -> bool:
        """Whether the step whose plans it holds has closed, which empties them."""
        owner = None if self._owner is None else self._owner()
        return owner is None or owner.num_sequences == 0

    def upload(self, plans: Sequence[Plan]) -> Hashable:
        """Sends the plans of groups, then of raw rows; returns the key of their addresses."""
        first = plans[0]
        if first.num_sequences > _MOST_SEQUENCES:
            raise InvalidArgument(
                f"entries: expected at most {_MOST_SEQUENCES} sequences in one call on a CUDA "
                f"device, got {first.num_sequences}"
            )
        widths = [table_width(plan.num_columns, plan.block_size) for plan in plans]
        sizes = first.num_sequences, first.num_tokens, first.max_new, *widths
        fixed = self._layouts.get(sizes)
        total = self._total(plans, widths) if fixed is None else fixed.size
        at = total
        total += sum([plan.packed_changes_size() for plan in plans])
        self._grow(total)
        layout = self._layouts.get(sizes) or self._lay_out(sizes, plans, widths)
        staged = self._runtime.stage(total)
        for plan, start, width, struct in zip(
            plans, layout.starts, widths, layout.structs, strict=True
        ):
            plan.pack(staged, start, width)
            plan.device = struct
        for plan in plans:
            if plan.num_copies or plan.num_restores:
                at = self._pack_changes(plan, staged, at)
        for plan in plans:
            if plan.raw is not None:
                plan.device.restores = plan.raw.device.restores
                plan.device.num_restores = plan.raw.num_restores
        self._runtime.upload(staged, self._array)
        self._owner = weakref.ref(first)
        return (self._number, len(self._kept), *sizes)

    def _total(self, plans: Sequence[Plan], widths: list[int]) -> int:
        return sum(plan.packed_size(width) for plan, width in zip(plans, widths, strict=True))

    def _grow(self, count: int) -> None:
        """Makes room; memory that graphs may use is kept."""
        if count > self._size:
            self._size = 1 << max(12, (count - 1).bit_length())
            self._array = self._runtime.empty((self._size,), np.int32)
            self._base = self._runtime.address(self._array)
            self._kept.append(self._array)
            self._layouts.clear()

    def _lay_out(self, sizes: tuple[int, ...], plans: Sequence[Plan], widths: list[int]) -> _Layout:
        """Places for the plans of steps of these sizes; launches compare structs by identity."""
        scratch = np.empty(self._total(plans, widths), np.int32)
        structs, starts, at = [], [], 0
        for plan, width in zip(plans, widths, strict=True):
            starts.append(at)
            structs.append(_struct_of(plan, self._base, width, plan.pack(scratch, at, width)))
            at += plan.packed_size(width)
        for plan, struct in zip(plans, structs, strict=True):
            if plan.raw is not None:
                raw = structs[plans.index(plan.raw)]
                struct.raw_slots, struct.raw_tables = raw.slots, raw.tables
                struct.raw_width = raw.table_width
        if len(self._layouts) >= _MOST_KEPT:
            self._layouts.clear()
        layout = self._layouts[sizes] = _Layout(structs, starts, at)
        return layout

    def _pack_changes(self, plan: Plan, staged: Any, at: int) -> int:
        """Copies and restores, whose number changes from step to step, behind all the rest."""
        copies, restores = plan.pack_changes(staged, at)
        struct = plan.device
        struct.copies, struct.num_copies = self._base + _ITEM * copies, plan.num_copies
        struct.restores, struct.num_restores = self._base + _ITEM * restores, plan.num_restores
        return at + plan.packed_changes_size()


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
        max_new=plan.max_new,
    )


class PlanBuffers:
    """As many buffers as steps have been open at once."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._buffers: list[PlanBuffer] = []

    def upload(self, plans: Sequence[Plan]) -> Hashable:
        """See PlanBuffer.upload."""
        for buffer in self._buffers:
            if buffer.is_free:
                return buffer.upload(plans)
        self._buffers.append(PlanBuffer(self._runtime, len(self._buffers)))
        return self._buffers[-1].upload(plans)
