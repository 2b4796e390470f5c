"""Sequence: one running text and the blocks that hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvcore import checks
from kvcore.errors import SequenceFreed, TokensReleased

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

        Raw rows that it lacks at that length are restored as `truncate` says.

        Raises:
            SequenceBusy: an open step holds this sequence.
            SequenceFreed: it was freed.
            TokensReleased: a group's retention has released tokens that the next one would read.
        """
        tokens = -1 if length is None else checks.integer(length, "length", 0, len(self))
        try:
            return Sequence(self.cache, self.cache._control.fork(self._live(), tokens))
        except TokensReleased:
            raise self._released(tokens) from None

    def truncate(self, length: int, *, exact: bool = False) -> None:
        """Keeps the first `length` tokens (transformers calls it crop).

        With quantized formats the rows that the next token reads raw may have been released. They
        are then decoded from the encoded ones when the next step begins (counted in
        `stats().reencoded_rows`), and what follows is no longer published for prefix reuse.

        Args:
            length: tokens to keep.
            exact: rather raise TokensReleased than lose raw rows so.

        Raises:
            SequenceBusy, SequenceFreed, TokensReleased: as for `fork`.
        """
        kept = checks.integer(length, "length", 0, len(self))
        try:
            self.cache._control.truncate(self._live(), kept, exact)
        except TokensReleased:
            raise self._released(kept) from None

    def free(self) -> None:
        """Gives the blocks back. The sequence cannot be used afterwards.

        Raises:
            SequenceBusy, SequenceFreed: as for `fork`.
        """
        self.cache._control.free(self._live())

    def read(self, layer: int, start: int | None = None) -> tuple[Any, Any]:
        """What the cache holds of this sequence in a layer, decoded.

        Args:
            layer: the layer.
            start: the first token to read; `first_kept` of the layer's group when left out, which
                is 0 unless the group has a retention.

        Returns:
            k float32 [len - start, num_kv_heads, head_dim] and v [len - start, num_kv_heads,
            head_dim_v], a view of k where V lies in K (`v_in_k`).

        Raises:
            SequenceBusy, SequenceFreed: as for `fork`.
            TokensReleased: `start` lies before what is kept.
        """
        return self.cache._read(self, layer, start)

    def first_kept(self, group: int = 0) -> int:
        """The first token that a group still holds; 0 unless it has a retention."""
        groups = self.cache.spec.groups
        spec = groups[checks.integer(group, "group", 0, len(groups) - 1)]
        if spec.retention is None:
            return 0
        return int(np.count_nonzero(self.blocks(group) < 0)) * spec.block_size

    def blocks(self, group: int = 0) -> Any:
        """The numbers of the sequence's blocks in a group, in order: int32 [columns].

        -1 stands for a block that was released. A pool of raw rows has a number as well, see
        `CacheSpec.raw_pool`.
        """
        last = len(self.cache.spec.pools) - 1
        return self.cache._control.blocks(self._live(), checks.integer(group, "group", 0, last))

    def _released(self, length: int) -> TokensReleased:
        """Why the sequence cannot be cut to `length` tokens."""
        groups = self.cache.spec.groups
        kept = [self.first_kept(g) for g in range(len(groups))]
        reads = [group.first_kept(length + group.slack) for group in groups]
        short = (g for g, first in enumerate(reads) if first < min(kept[g], length))
        g = next(short, None)
        if g is None:
            return TokensReleased(
                f"length: expected one that needs no released raw rows, as exact is True, of 0 to "
                f"{len(self)}, got {length}"
            )
        retention = groups[g].retention
        assert retention is not None
        return TokensReleased(
            f"length: expected 0 or {kept[g] + retention - 1} to {len(self)}, got {length}: "
            f"group {g}, with a retention of {retention} and a slack of {groups[g].slack}, keeps "
            f"the tokens from {kept[g]} on"
        )

    def _live(self) -> SequenceHandle:
        if not self._handle.is_live:
            raise SequenceFreed("the sequence was freed")
        return self._handle
