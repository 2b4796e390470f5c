"""KVCache: blocks, sequences and steps over one backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcore import arrays, checks
from kvcore._native import steps
from kvcore._native.blocks import ControlPlane
from kvcore.backend import get_backend
from kvcore.errors import (
    ForeignSequence,
    InvalidArgument,
    InvalidType,
    SequenceFreed,
    TokensReleased,
)
from kvcore.groups import MAX_SLOTS, RAW_BLOCK_SIZE, GroupSpec
from kvcore.sequence import Sequence
from kvcore.spec import CacheSpec
from kvcore.step import Step
from kvcore.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class GroupStats:
    """The blocks of a group, or of a group's raw rows: in_use + cached + free = total.

    Attributes:
        name: "group 0", or "group 0, raw rows".
        total, in_use, cached, free: blocks now. Cached ones hold prefixes that no sequence uses.
        allocations: blocks handed out so far.
        evictions: cached blocks given up for new ones.
        copies: blocks copied on write.
        released: blocks that sequences let go because they lay behind the group's retention.
        reencoded_rows: raw rows that a truncate or fork had lost and that were decoded again.
    """

    name: str
    total: int
    in_use: int
    cached: int
    free: int
    allocations: int
    evictions: int
    copies: int
    released: int
    reencoded_rows: int


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds and has done.

    Attributes:
        groups: each group's own counts, then those of `spec.raw_groups`' raw rows.
        total, in_use, cached, free, allocations, evictions, copies, released, reencoded_rows:
            their sums over the groups.
        bytes: bytes of storage, allocated when the cache was made.
        num_sequences: live sequences.
        open_steps: steps begun and not closed.
        prefix_queries: sequences made with tokens to look up.
        prefix_hits: those of them that found a cached prefix.
        prefix_hit_tokens: tokens that were adopted instead of computed.
    """

    groups: tuple[GroupStats, ...]
    bytes: int
    num_sequences: int
    open_steps: int
    prefix_queries: int
    prefix_hits: int
    prefix_hit_tokens: int

    @property
    def total(self) -> int:
        return sum(group.total for group in self.groups)

    @property
    def in_use(self) -> int:
        return sum(group.in_use for group in self.groups)

    @property
    def cached(self) -> int:
        return sum(group.cached for group in self.groups)

    @property
    def free(self) -> int:
        return sum(group.free for group in self.groups)

    @property
    def allocations(self) -> int:
        return sum(group.allocations for group in self.groups)

    @property
    def evictions(self) -> int:
        return sum(group.evictions for group in self.groups)

    @property
    def copies(self) -> int:
        return sum(group.copies for group in self.groups)

    @property
    def released(self) -> int:
        return sum(group.released for group in self.groups)

    @property
    def reencoded_rows(self) -> int:
        return sum(group.reencoded_rows for group in self.groups)


class KVCache:
    """A paged, shareable key/value cache.

    Args:
        spec: layers, groups and formats.
        num_blocks: blocks of each group, one number or one a group.
        num_raw_blocks: blocks of 32 raw rows for each group that has such (`spec.raw_groups`), one
            number or one a group. When left out, what sequences of `sequence_length` tokens (1,024
            when that is left out too) need that fill the cache, and 2,048 new tokens of one step;
            but no more than if every token were read raw.
        memory: instead of num_blocks, bytes of storage: a number, a text like "2GiB", or "auto"
            for half of the memory that is available on the device.
        sequence_length: tokens of the sequences that the cache is for. With memory, groups with a
            retention then take the blocks that as many of these need as the others have room for;
            when left out, every group has room for as many tokens.
        backend: "cpu" or "cuda".
        device: the CUDA device's number, None for the current one; None for the CPU.

    Raises:
        InvalidArgument, InvalidType: naming the argument.
        BackendUnavailable: the backend cannot be used here.
        MemoryError: the system gave no memory.
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_blocks: int | Iterable[int] | None = None,
        num_raw_blocks: int | Iterable[int] | None = None,
        *,
        memory: int | str | None = None,
        sequence_length: int | None = None,
        backend: str = "cpu",
        device: int | None = None,
    ) -> None:
        if not isinstance(spec, CacheSpec):
            raise InvalidType(f"spec: expected a CacheSpec, got {type(spec).__name__}")
        self.spec = spec
        self.backend = get_backend(backend)
        self.device = device
        self.num_blocks, self.num_raw_blocks = _count_blocks(
            spec,
            num_blocks,
            num_raw_blocks,
            memory,
            sequence_length,
            lambda: self.backend.available_memory(device),
        )
        self._salts: dict[str | bytes, int] = {}
        raw = dict(zip(spec.raw_groups, self.num_raw_blocks, strict=True))
        extents = {g: (n, spec.raw_first, spec.raw_last) for g, n in raw.items()}
        self._control = ControlPlane(
            [
                (group.block_size, n, group.retention or 0, group.slack, *extents.get(g, (0, 0, 0)))
                for g, (group, n) in enumerate(zip(spec.groups, self.num_blocks, strict=True))
            ],
            [(layer.group, layer.kv_source) for layer in spec.layers],
        )
        counts = (*self.num_blocks, *self.num_raw_blocks)
        self._storage = self.backend.allocate(spec, counts, device)
        self._retentions = [spec.groups[layer.group].retention for layer in spec.layers]

    def __repr__(self) -> str:
        stats, spec = self.stats(), self.spec
        formats = dict.fromkeys(
            layer.k_format if layer.v_in_k else f"{layer.k_format}/{layer.v_format}"
            for layer in spec.layers
        )
        sizes = " + ".join(
            f"{n} blocks of {group.block_size}"
            for group, n in zip(spec.groups, self.num_blocks, strict=True)
        )
        if self.num_raw_blocks:
            sizes += f" and {sum(self.num_raw_blocks)} of {RAW_BLOCK_SIZE} raw rows"
        return (
            f"KVCache({self.backend.name}, {spec.num_layers} layers {', '.join(formats)}, {sizes}, "
            f"{format_bytes(stats.bytes)}: {stats.in_use} in use, {stats.cached} cached, "
            f"{stats.free} free, {stats.num_sequences} sequences)"
        )

    def sequence(self, tokens: Any | None = None, *, salt: str | bytes | None = None) -> Sequence:
        """An empty sequence, or one that starts with what the cache already holds of `tokens`.

        With `tokens`, the longest cached prefix is adopted, in whole blocks and without the last
        token (its output is still to be computed); len() of the sequence tells how many tokens
        that is. Blocks become findable when a step that was given token ids commits them. A hit
        compares every token, and only sequences of the same salt see each other's blocks.

        Args:
            tokens: int token ids [n] of the prompt.
            salt: keeps tenants apart.
        """
        number = self._salt_number(salt)
        ids = np.empty(0, np.int32) if tokens is None else arrays.as_token_ids(tokens, "tokens")
        if tokens is None and number == 0:
            return Sequence(self, self._control.create())
        return Sequence(self, self._control.create_cached(ids, number))

    def step(self, entries: Iterable[tuple[Sequence, Any]]) -> Step:
        """Opens a step: reserves slots for new tokens of some sequences, or changes nothing.

        Args:
            entries: (sequence, n) or (sequence, token ids) each. With ids, the blocks that the
                step fills become reusable as prefixes.

        Raises:
            OutOfBlocks: too few blocks are free or cached.
            SequenceBusy: a sequence is in an open step.
            SequenceFreed, ForeignSequence: a sequence is not one of this cache's live ones.
            InvalidArgument, InvalidType: naming the argument.
        """
        step = Step(self, steps.begin(self._control, _listed(entries), self._read_entry))
        try:
            step.graph_key = self.backend.begin_step(self._storage, step._plans)
            for pool, plan in enumerate(step._plans):
                if plan.num_copies:
                    self.backend.copy_blocks(self._storage, pool, plan)
            for group, plan in enumerate(step._plans):
                if plan.raw is not None and plan.raw.num_restores:
                    self.backend.restore_raw(self._storage, group, plan)
        except BaseException:
            step.rollback()
            raise
        return step

    def blocks(self, layer: int) -> tuple[Any, Any]:
        """Where K and V of a layer lie, for `ops` or to move blocks elsewhere.

        Views, not copies. What is read from a block that no sequence holds means nothing, and what
        is written to one that sequences hold changes what they hold, with every sequence that
        shares it: `Sequence.blocks` says which they are. Nothing is checked, and no step waits.

        Returns:
            k [N, H, B, D] and v [N, H, B, Dv] in the dtype that the format is stored in, uint16
            bits for bf16, as `ops.paged_attention` takes them. A layer that reads another's cache
            gives that one's; with v_in_k, v is a part of k.

        Raises:
            InvalidArgument, InvalidType: there is no such layer.
        """
        last = self.spec.num_layers - 1
        return self.backend.blocks(self._storage, checks.integer(layer, "layer", 0, last))

    def stats(self) -> CacheStats:
        """Blocks by state, bytes, prefix hits, evictions and copies."""
        groups = tuple(
            GroupStats(name, **_without_size(self._control.group_stats(pool)))
            for pool, name in enumerate(_pool_names(self.spec))
        )
        counts = _without_size(self._control.stats())
        return CacheStats(groups=groups, bytes=self._storage.nbytes, **counts)

    def check(self) -> None:
        """Recounts the books from the sequences up.

        Raises:
            CacheCorrupt: they do not balance.
        """
        self._control.check()

    def check_finite(self) -> None:
        """Asks whether a NaN or an infinity has come to a quantized layer since the last call.

        For backend="cuda", which stores such values saturated, as with `CacheSpec(saturate=True)`,
        because to refuse them it would have to wait for the device; this does wait. On the CPU
        append raises at once, and this never does.

        Raises:
            NotFinite: one has come.
        """
        self.backend.check_finite(self._storage)

    def drop_prefixes(self) -> None:
        """Forgets the cached prefixes that no sequence holds, so that their blocks are free."""
        self._control.drop_prefixes()

    def _read_entry(self, place: int, entry: Any) -> tuple[Sequence, int, np.ndarray | None]:
        """An entry of a step as (sequence, number of new tokens, token ids or None)."""
        argument = f"entries[{place}]"
        try:
            sequence, new = entry
        except (TypeError, ValueError):
            raise InvalidType(
                f"{argument}: expected (sequence, number of new tokens or token ids), "
                f"got {type(entry).__name__}"
            ) from None
        if not isinstance(sequence, Sequence):
            raise InvalidType(f"{argument}: expected a Sequence, got {type(sequence).__name__}")
        if sequence.cache is not self:
            raise ForeignSequence(f"{argument}: expected a sequence of this cache")
        if sequence.is_freed:
            raise SequenceFreed(f"{argument}: the sequence was freed")
        if hasattr(new, "__index__") and not isinstance(new, np.ndarray):
            return sequence, checks.integer(new, argument, 1, 2**31 - 1), None
        ids = arrays.as_token_ids(new, argument)
        if not ids.size:
            raise InvalidArgument(f"{argument}: expected at least one token id, got none")
        return sequence, ids.size, ids

    def _read(self, sequence: Sequence, layer: int, start: int | None) -> tuple[Any, Any]:
        group = self.spec.layers[checks.integer(layer, "layer", 0, self.spec.num_layers - 1)].group
        raw = self.spec.raw_pool(group)
        # A fork holds the blocks while they are read, and refuses a sequence in an open step.
        held = sequence.fork()
        try:
            first, stop = held.first_kept(group), len(held)
            begin = first if start is None else checks.integer(start, "start", 0, stop)
            if begin < first:
                raise TokensReleased(
                    f"start: expected {first} to {stop}, the tokens that group {group} keeps, "
                    f"got {begin}"
                )
            raw_row = None if raw is None else held.blocks(raw)
            return self.backend.read(self._storage, layer, held.blocks(group), begin, stop, raw_row)
        finally:
            held.free()

    def _salt_number(self, salt: str | bytes | None) -> int:
        if salt is None:
            return 0
        if not isinstance(salt, str | bytes):
            raise InvalidType(f"salt: expected str, bytes or None, got {type(salt).__name__}")
        # Numbered rather than hashed: two salts can never be taken for one another.
        return self._salts.setdefault(salt, len(self._salts) + 1)


def _count_blocks(
    spec: CacheSpec,
    num_blocks: int | Iterable[int] | None,
    num_raw_blocks: int | Iterable[int] | None,
    memory: int | str | None,
    sequence_length: int | None,
    available: Callable[[], int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks of each group, and of each pool of raw rows."""
    if (num_blocks is None) == (memory is None):
        raise InvalidArgument(
            "num_blocks, memory: expected exactly one of them, got "
            + ("neither" if memory is None else "both")
        )
    if num_raw_blocks is not None and not spec.raw_groups:
        raise InvalidArgument(
            f"num_raw_blocks: expected None, as no group has raw rows, got {num_raw_blocks}"
        )
    given = tuple(num_raw_blocks) if isinstance(num_raw_blocks, Iterable) else num_raw_blocks
    if memory is not None:
        counts = spec.blocks_in(parse_bytes(memory, available=available), sequence_length, given)
    else:
        if sequence_length is not None and not spec.raw_groups:
            raise InvalidArgument(
                "sequence_length: expected None with num_blocks, as no group has raw rows, "
                f"got {sequence_length}"
            )
        wanted = tuple(num_blocks) if isinstance(num_blocks, Iterable) else num_blocks
        assert wanted is not None
        counts = spec.blocks_per_group(wanted)
    raw = spec.raw_blocks_per_group(counts, given, sequence_length)
    _check_slots(spec.groups, counts, "num_blocks")
    _check_slots(spec.pools[len(counts) :], raw, "num_raw_blocks")
    return counts, raw


def _check_slots(pools: Iterable[GroupSpec], counts: Iterable[int], argument: str) -> None:
    for pool, count in zip(pools, counts, strict=True):
        most = MAX_SLOTS // pool.block_size
        if count > most:
            raise InvalidArgument(
                f"{argument}: expected at most {most} blocks of {pool.block_size}, as slots are "
                f"int32, got {count}"
            )


def _pool_names(spec: CacheSpec) -> list[str]:
    names = [f"group {g}" for g in range(len(spec.groups))]
    return names + [f"group {g}, raw rows" for g in spec.raw_groups]


def _listed(entries: Any) -> tuple[Any, ...]:
    try:
        listed = tuple(entries)
    except TypeError:
        raise InvalidType(
            "entries: expected (sequence, number of new tokens or token ids) pairs, "
            f"got {type(entries).__name__}"
        ) from None
    if not listed:
        raise InvalidArgument("entries: expected at least one (sequence, tokens), got none")
    return listed


def _without_size(stats: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in stats.items() if name != "struct_size"}
