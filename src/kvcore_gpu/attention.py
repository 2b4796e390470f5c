"""Which kernels a call of attend takes, their grids, and the memory that their blocks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from kvcore.formats import Format
from kvcore_gpu import decode, prefill, simt
from kvcore_gpu.params import AttendParams
from kvcore_gpu.runtime import Function, Runtime

__all__ = ["Attention", "Launch", "Shape"]

#: Keys of a split, as kernels/work.cuh has it.
SPLIT = 512
#: So many tiles of a sequence's query rows read its keys in splits, each for itself.
FEW_TILES = 4
#: What partial results of one launch may take; a call that needs more is launched in pieces.
MAX_PARTIAL_BYTES = 256 << 20
MAX_INT32 = 2**31 - 1

#: The address of so many elements of a dtype, by name; zeros when they are new.
GetScratch = Callable[[str, int, type], int]

_DTYPE_OF = {"fp32": 0, "fp16": 1, "bf16": 2}


@dataclass(frozen=True)
class Shape:
    """What kernels are chosen by.

    Attributes:
        k_format, v_format, head_dim, head_dim_v: as the layer has them.
        v_in_k: V is the first head_dim_v elements of K.
        num_kv_heads, group: KV heads, and query heads of each.
        block_size: token slots of a block.
        q_dtype: 0 float32, 1 float16, 2 bfloat16.
        options: whether a mask, positions, slopes, a window, a soft cap, no causality, or a scale
            that is not above 0 is given.
        exact: bits are not to depend on how a prompt was chunked.
    """

    k_format: Format
    v_format: Format
    head_dim: int
    head_dim_v: int
    v_in_k: bool
    num_kv_heads: int
    group: int
    block_size: int
    q_dtype: int
    options: bool
    exact: bool

    @property
    def query_parts(self) -> int:
        """1 if q has K's dtype, or bfloat16 where K is quantized; else 2."""
        return 1 if _DTYPE_OF.get(self.k_format.name, 2) == self.q_dtype else 2


class Splitting(Protocol):
    """A specialisation of a kernel whose blocks share the keys of a sequence."""

    @property
    def source(self) -> str: ...
    @property
    def entry(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def rows(self) -> int:
        """Query rows of a tile."""

    @property
    def slices(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    def defines(self) -> Mapping[str, int]: ...


class Launch(NamedTuple):
    """What Runtime.launch takes beside the params, and what differs in these.

    Attributes:
        tiles: first_tile and num_tiles.
    """

    function: Function
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    tiles: tuple[int, int]
    first_sequence: int = 0


class Attention:
    """The kernels of one shape, compiled."""

    def __init__(self, runtime: Runtime, shape: Shape) -> None:
        self._runtime = runtime
        self._shape = shape
        self._few = _choose(shape, runtime.shared_per_block)
        self._function = self._load(self._few)
        self._many = _choose_prefill(shape, runtime.shared_per_block)
        self._many_function: Function | None = None  # which few calls need

    @property
    def few_rows(self) -> int:
        """Sequences with at most so many query rows of a KV head are read in splits, as are those
        of one new token; the others by prefill.cu where it serves."""
        return max(FEW_TILES * self._few.rows, self._shape.group)

    def _load(self, kernel: Splitting | prefill.Prefill) -> Function:
        return self._runtime.function(kernel.source, kernel.entry, kernel.defines())

    def launches(self, params: AttendParams, scratch: GetScratch) -> list[Launch]:
        """What attends to all sequences of params.plan, in this order.

        It serves for later calls as well whose params differ in nothing but addresses.

        Args:
            params: all up to `group` filled in; the rest but what launches have is set here.
            scratch: memory that stays as it is until the next launch in the stream.
        """
        plan = params.plan
        most_rows = plan.max_new * self._shape.group
        params.few_rows = MAX_INT32
        launches: list[Launch] = []
        few_rows = self.few_rows
        if self._many is not None and most_rows > few_rows:
            params.few_rows = most_rows = few_rows
            launches = self._prefill(self._many, params, scratch)
            if plan.max_new * plan.num_sequences == plan.num_tokens:
                return launches  # as many new tokens in each
        return launches + self._splits(params, most_rows, scratch)

    def _prefill(
        self, kernel: prefill.Prefill, params: AttendParams, scratch: GetScratch
    ) -> list[Launch]:
        """For sequences with more than params.few_rows query rows of a KV head."""
        if self._many_function is None:
            self._many_function = self._load(kernel)
        plan, shape = params.plan, self._shape
        few_tokens = params.few_rows // shape.group
        sequences = prefill.max_sequences(
            plan.num_sequences, plan.num_tokens, plan.max_new, few_tokens
        )
        alike = plan.max_new * plan.num_sequences == plan.num_tokens
        cut = kernel.max_cut(
            plan.max_new * shape.group if alike else 0,
            shape.num_kv_heads,
            sequences,
            plan.table_width * shape.block_size,
        )
        units = prefill.MOST_BLOCKS // shape.num_kv_heads  # of a sequence that is cut
        rows = units * shape.num_kv_heads * kernel.rows
        nbytes = 4 * rows * (shape.head_dim_v + 2)
        at_once = min(cut, max(1, MAX_PARTIAL_BYTES // max(1, nbytes)))
        if cut:
            params.partial_out = scratch(
                "partial_out", at_once * rows * shape.head_dim_v, np.float32
            )
            params.partial_states = scratch("partial_states", at_once * rows * 2, np.float32)
            params.counters = scratch("counters", at_once * units * shape.num_kv_heads, np.int32)
        tiles = plan.num_tokens * shape.group // kernel.rows + sequences
        grid = tiles + at_once * units, shape.num_kv_heads, 1
        block = kernel.threads, 1, 1
        return [
            Launch(self._many_function, grid, block, kernel.shared_bytes, (first, at_once))
            for first in range(0, max(1, cut), max(1, at_once))
        ]

    def _splits(self, params: AttendParams, most_rows: int, scratch: GetScratch) -> list[Launch]:
        if most_rows == 0:
            return []
        kernel, shape, plan = self._few, self._shape, params.plan
        params.num_splits = max(1, -(-plan.table_width * shape.block_size // SPLIT))
        params.tile_rows = min(kernel.rows, most_rows)
        tiles = -(-most_rows // kernel.rows)
        states = shape.num_kv_heads * params.tile_rows * (params.num_splits + 1)  # of a tile
        most = max(1, MAX_PARTIAL_BYTES // (4 * states * (shape.head_dim_v + 2)))
        sequences = min(plan.num_sequences, most)
        at_once = min(tiles, max(1, most // sequences))
        units = sequences * at_once
        params.partial_out = scratch("partial_out", units * states * shape.head_dim_v, np.float32)
        params.partial_states = scratch("partial_states", units * states * 2, np.float32)
        params.counters = scratch("counters", units * shape.num_kv_heads, np.int32)
        parts = params.num_splits + bool(params.k.raw or params.v.raw)
        width, block = at_once * kernel.slices * parts, (kernel.threads, 1, 1)
        return [
            Launch(
                self._function,
                (width, shape.num_kv_heads, min(sequences, plan.num_sequences - sequence)),
                block,
                kernel.shared_bytes,
                (tile, at_once),
                sequence,
            )
            for sequence in range(0, plan.num_sequences, sequences)
            for tile in range(0, tiles, at_once)
        ]


def _choose(shape: Shape, shared_per_block: int) -> Splitting:
    """decode.cu where matrix instructions pay and the rows fit, else simt.cu."""
    formats, dims = (shape.k_format, shape.v_format), (shape.head_dim, shape.head_dim_v)
    alone = shape.group == 1 and not any(format.is_quantized for format in formats)
    if decode.serves(*formats) and not alone:
        wanted = decode.Decode(*formats, *dims, shape.v_in_k, shape.query_parts, shape.options)
        fitted = decode.fit(wanted, shared_per_block)
        if fitted is not None:
            return fitted
    rows = simt.rows_for(shape.group, *dims)
    return simt.Simt(*formats, *dims, rows, shape.options)


def _choose_prefill(shape: Shape, shared_per_block: int) -> prefill.Prefill | None:
    """prefill.cu where it serves, and its order of sums may: it is another than that of splits."""
    formats, dims = (shape.k_format, shape.v_format), (shape.head_dim, shape.head_dim_v)
    if shape.exact or not prefill.serves(*formats, *dims):
        return None
    kernel = prefill.Prefill(*formats, *dims, shape.query_parts, shape.options)
    return kernel if kernel.shared_bytes <= shared_per_block else None
