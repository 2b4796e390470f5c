"""Sequence: one running text and the blocks that hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcore import checks
from kvcore.errors import SequenceFreed

if TYPE_CHECKING:
    from kvcore._native.blocks import SequenceHandle
    from kvcore.cache import KVCache


class Sequence:
    """A sequence of a cache, made by `KVCache.sequence` or `fork`.

    len() is the number of tokens stored. The sequence keeps its cache alive; dropped without
    `free`, it gives its blocks back.
    """

    __slots__ = ("__weakref__", "_handle", "cache")

    def __init__(self, cache: KVCache, handle: SequenceHandle) -> None:
        self.cache = cache
        self._handle = handle

    def __len__(self) -> int:
        length: int = self.cache._control.length(self._live())
        return length

    def __bool__(self) -> bool:
        return True  # an empty sequence is a sequence

    def __repr__(self) -> str:
        if self.is_freed:
            return "Sequence(freed)"
        return f"Sequence({len(self)} tokens, {len(self.blocks())} blocks)"

    @property
    def is_freed(self) -> bool:
        """Whether `free` was called."""
        return not self._handle.is_live

    def fork(self, length: int | None = None) -> Sequence:
        """A sequence that shares the first `length` tokens (all when left out), copy on write.

        Raises:
            SequenceBusy: an open step holds this sequence.
            SequenceFreed: it was freed.
        """
        tokens = -1 if length is None else checks.integer(length, "length", 0, len(self))
        return Sequence(self.cache, self.cache._control.fork(self._live(), tokens))

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens (transformers calls it crop).

        Raises:
            SequenceBusy, SequenceFreed: as for `fork`.
        """
        kept = checks.integer(length, "length", 0, len(self))
        self.cache._control.truncate(self._live(), kept)

    def free(self) -> None:
        """Gives the blocks back. The sequence cannot be used afterwards.

        Raises:
            SequenceBusy, SequenceFreed: as for `fork`.
        """
        self.cache._control.free(self._live())

    def read(self, layer: int) -> tuple[Any, Any]:
        """What the cache holds of this sequence in a layer, decoded.

        Returns:
            k float32 [len, num_kv_heads, head_dim] and v [len, num_kv_heads, head_dim_v], a view
            of k where V lies in K (`v_in_k`).

        Raises:
            SequenceBusy, SequenceFreed: as for `fork`.
        """
        return self.cache._read(self, layer)

    def blocks(self, group: int = 0) -> Any:
        """The numbers of the sequence's blocks in a group, in order: int32 [columns]."""
        last = len(self.cache.spec.groups) - 1
        return self.cache._control.blocks(self._live(), checks.integer(group, "group", 0, last))

    def _live(self) -> SequenceHandle:
        if not self._handle.is_live:
            raise SequenceFreed("the sequence was freed")
        return self._handle
