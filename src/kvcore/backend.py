"""The Backend protocol, and the registry that loads a backend when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvcore._native.blocks import Plan
from kvcore.attend_options import AttendOptions
from kvcore.errors import BackendUnavailable, InvalidArgument

if TYPE_CHECKING:
    from kvcore.spec import CacheSpec

__all__ = [
    "AttendOptions",
    "Backend",
    "Plan",
    "Storage",
    "available_backends",
    "backend_of",
    "get_backend",
    "known_backends",
    "lies_on_device",
]


class Storage(Protocol):
    """A backend's memory for all blocks of a cache."""

    @property
    def nbytes(self) -> int: ...


class Backend(Protocol):
    """The data plane: operations over (storage, plan) that keep no state of their own.

    A plan is what a step means for the group of the layer at hand. `append` and `attend` check
    shapes and dtypes of what the user gave.

    Attributes:
        name: what `get_backend` knows it by.
        xp: the module of its arrays: NumPy, or one with NumPy's functions, such as CuPy.
    """

    name: str
    xp: Any

    def on_device(self, device: int | None) -> AbstractContextManager[Any]:
        """A context in which `xp` makes its arrays where a cache on this device keeps its blocks.

        Args:
            device: as in `allocate`: a device's number, or None for the current one.

        Raises:
            InvalidArgument: there is no such device.
        """
        ...

    def describe(self, device: int | None) -> str:
        """What computes on this device, in a few words; `device` as in `on_device`."""
        ...

    def available_memory(self, device: int | None) -> int:
        """Bytes that blocks on this device could still take; `device` as in `on_device`."""
        ...

    def allocate(self, spec: CacheSpec, num_blocks: Sequence[int], device: int | None) -> Storage:
        """Memory for num_blocks[p] blocks of each of spec.pools: groups, then their raw rows."""
        ...

    def begin_step(self, storage: Storage, plans: Sequence[Plan]) -> Hashable:
        """Takes over the plans of a step that begins: those of groups, then those of raw rows.

        Returns:
            Step.graph_key.
        """
        ...

    def append(
        self, storage: Storage, layer: int, plan: Plan, k: Any, v: Any | None, layout: str
    ) -> None:
        """Encodes K and V of the plan's new tokens into their slots; v: None where V lies in K."""
        ...

    def attend(
        self,
        storage: Storage,
        layer: int,
        plan: Plan,
        q: Any,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
        out: Any | None,
    ) -> Any:
        """out, or (out, lse): attention of the new tokens over their sequences."""
        ...

    def copy_blocks(self, storage: Storage, pool: int, plan: Plan) -> None:
        """Runs the plan's copies in every layer of a group, or in the raw rows of one."""
        ...

    def restore_raw(self, storage: Storage, group: int, plan: Plan) -> None:
        """Decodes the raw rows that the group's plan restores, after all copies."""
        ...

    def blocks(self, storage: Storage, layer: int) -> tuple[Any, Any]:
        """K and V of a layer where they lie: [N, H, B, D] and [N, H, B, Dv], or tiles of bytes."""
        ...

    def read(
        self,
        storage: Storage,
        layer: int,
        block_row: Any,
        start: int,
        stop: int,
        raw_row: Any | None,
    ) -> tuple[Any, Any]:
        """K and V of tokens [start, stop) of a sequence as its next token reads them, in float32.

        The sequence ends at `stop`; block_row and raw_row are its blocks, raw_row None where its
        group has no raw rows. V is a view of K where it lies there.
        """
        ...

    def check_finite(self, storage: Storage) -> None:
        """See KVCache.check_finite."""
        ...

    def append_kv(
        self, k: Any, v: Any | None, k_blocks: Any, v_blocks: Any | None, slots: Any, layout: str
    ) -> None:
        """See kvcore.ops.append_kv."""
        ...

    def paged_attention(
        self,
        q: Any,
        k_blocks: Any,
        v_blocks: Any,
        block_tables: Any,
        seq_lens: Any,
        query_starts: Any,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
    ) -> Any:
        """See kvcore.ops.paged_attention."""
        ...

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        query_cut: Any | None,
        kv_cut: Any | None,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
        out: Any | None,
    ) -> Any:
        """See kvcore.ops.attention; a cut is starts [S + 1] (ragged) or lengths [S] (padded)."""
        ...

    def merge_states(self, outs: Any, lses: Any) -> tuple[Any, Any]:
        """See kvcore.ops.merge_states."""
        ...

    def quantize(self, x: Any, format: str, scales: Any | None, bias: Any | None) -> Any:
        """See kvcore.ops.quantize."""
        ...

    def dequantize(self, code: Any, format: str, scales: Any | None, bias: Any | None) -> Any:
        """See kvcore.ops.dequantize."""
        ...


_MODULES = {"cpu": "kvcore.cpu_backend", "cuda": "kvcore_gpu.backend"}
_loaded: dict[str, Backend] = {}
_DLPACK_CUDA = (2, 13)  # memory of a device, and memory that it shares with the host
_CUDA_INTERFACE = "__cuda_array_interface__"


def get_backend(name: str) -> Backend:
    """The backend called "cpu" or "cuda", loaded on first use.

    Raises:
        InvalidArgument: there is no backend of this name.
        BackendUnavailable: it cannot be used here; the message says why.
    """
    if not isinstance(name, str) or name not in _MODULES:
        raise InvalidArgument(f"backend: expected one of {', '.join(_MODULES)}, got {name!r}")
    if name not in _loaded:
        try:
            module = importlib.import_module(_MODULES[name])
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("kvcore_gpu"):
                raise
            raise BackendUnavailable(
                f"backend {name!r}: this version of kvcore comes without it"
            ) from None
        _loaded[name] = module.create_backend()
    return _loaded[name]


def lies_on_device(value: Any) -> bool:
    """Whether a caller's array is in a CUDA device's memory."""
    if isinstance(value, np.ndarray):
        return False
    place = getattr(value, "__dlpack_device__", None)
    return hasattr(value, _CUDA_INTERFACE) if place is None else place()[0] in _DLPACK_CUDA


def backend_of(value: Any) -> Backend:
    """The backend that computes where a caller's array lies."""
    return get_backend("cuda" if lies_on_device(value) else "cpu")


def known_backends() -> tuple[str, ...]:
    """Names that `get_backend` accepts, whether or not they can be used here."""
    return tuple(_MODULES)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can be used here; never raises."""
    names = []
    for name in _MODULES:
        try:
            get_backend(name)
        except Exception:  # get_backend says what it is
            continue
        names.append(name)
    return tuple(names)
