"""Step: the transaction in which sequences grow."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcore import checks
from kvcore.backend import AttendOptions
from kvcore.errors import InvalidArgument, StepClosed, StepIncomplete

if TYPE_CHECKING:
    from kvcore._native.blocks import Plan
    from kvcore._native.steps import NativeStep
    from kvcore.cache import KVCache
    from kvcore.sequence import Sequence


class Step:
    """New tokens for some sequences of a cache, made by `KVCache.step`.

    Slots for all of them are reserved. Each layer that owns storage is appended exactly once;
    leaving the `with` block commits the new lengths, and an exception inside it rolls every
    sequence back. A step belongs to one thread at a time.

    Attributes:
        cache: the cache.
        sequences: the sequences, in the order in which their tokens stand in T.
        query_starts: int32 [S + 1], where each sequence's new tokens start.
        seq_lens: int32 [S], stored and new tokens.
        num_tokens: T.
        graph_key: with backend="cuda", steps of equal keys run the same launches on the same
            addresses, so that a CUDA graph of one may be replayed in another (docs/gpu.md); None on
            the CPU.
    """

    __slots__ = (
        "__weakref__",
        "_native",
        "_plans",
        "cache",
        "graph_key",
        "num_tokens",
        "query_starts",
        "seq_lens",
        "sequences",
    )

    def __init__(self, cache: KVCache, native: NativeStep) -> None:
        self.cache = cache
        self.sequences: tuple[Sequence, ...] = native.sequences
        self._native = native
        plans = [native.plan(group) for group in range(len(cache.spec.groups))]
        self._plans = plans + [plan.raw for plan in plans if plan.raw is not None]
        first = self._plans[0]
        self.query_starts: np.ndarray = first.query_starts
        self.seq_lens: np.ndarray = first.seq_lens
        self.num_tokens: int = first.num_tokens
        self.graph_key: Hashable = None

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.is_open:
            return
        if kind is None:
            self.commit()
        else:
            self.rollback()

    def __repr__(self) -> str:
        state = "open" if self.is_open else "closed"
        return f"Step({len(self.sequences)} sequences, {self.num_tokens} tokens, {state})"

    @property
    def is_open(self) -> bool:
        """Whether the step was neither committed nor rolled back yet."""
        return self._native.is_open

    def append(self, layer: int, k: Any, v: Any | None, *, layout: str = "NHD") -> None:
        """Stores K and V of the new tokens.

        Args:
            layer: a layer that owns storage, not appended in this step before.
            k: [T, H, D] with layout "NHD", [H, T, D] with "HND"; or padded to the longest,
                [S, n, H, D] with "BSHD", [S, H, n, D] with "BHSD", of which a sequence's first
                new tokens count. float32, float16 or bfloat16.
            v: likewise, with head_dim_v; None where V lies in K (`v_in_k`).

        Raises:
            InvalidArgument, InvalidType: naming the argument; the layer can be appended again.
            StepError: the layer was appended already, or reads another layer's cache.
        """
        plan = self._plan_of(layer)
        self._native.check_append(layer)
        cache = self.cache
        cache.backend.append(cache._storage, layer, plan, k, v, layout)
        self._native.mark_appended(layer)

    def attend(
        self,
        layer: int,
        q: Any,
        *,
        layout: str = "NHD",
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Any | None = None,
        window: int | None = None,
        causal: bool = True,
        mask: SequenceOf[Any] | None = None,
        positions: Any | None = None,
        sinks: Any | None = None,
        return_lse: bool = False,
        exact: bool = False,
        out: Any | None = None,
    ) -> Any:
        """Attention of the new tokens over everything their sequences hold.

        It is causal unless options say otherwise: a sequence's last new token sees all of it, the
        one before it all but the last, and so on.

        Args:
            layer: a layer that was appended in this step, or that reads such a layer's cache.
            q: [T, Hq, D] or as `layout` says (see `append`); Hq is a multiple of num_kv_heads.
            scale: s = (q . k) * scale; 1 / sqrt(head_dim) when left out.
            softcap: s = softcap * tanh(s / softcap).
            alibi_slopes: [Hq]; s -= slope * (i - j), with i where the query stands in its
                sequence and j where the key does.
            window: a token sees only the last `window` tokens up to its position and including it,
                i - window < j <= i, of all that it would see otherwise. Others are not read. At
                most the retention of the layer's group, where that has one.
            causal: False lets every new token see all that its sequence holds.
            mask: for each sequence a boolean [new tokens, seq_len], True where a token sees a key,
                or the same as bits, uint8 [new tokens, ceil(seq_len / 8)] as from
                np.packbits(mask, axis=1, bitorder="little"), or None; a mask stands instead of
                causality. Bits are taken as they are; booleans are packed on every call.
            positions: int32 [T], where the new tokens stand for alibi_slopes and window, their
                keys as well as their queries: in trees, a node's depth; where they are stored
                without it.
            sinks: [Hq], one more logit in each softmax's denominator, with no value.
            return_lse: also return the natural logarithm of the softmax's denominator.
            exact: never take a path whose bits depend on how a prompt was chunked. bf16 has one,
                on the instruction set "avx512_bf16", within 2e-3 instead of 2e-6; and quantized
                formats, which few query rows read undecoded: on "avx512_vnni" within 2e-4.
            out: an array to write to, of q's dtype and shape but with head_dim_v.

        Returns:
            out in q's dtype and layout, zero in the padding; or (out, lse) with lse float32
            [T, Hq], whatever the layout. A row that sees nothing has out 0 and lse -inf, or its
            head's sink.

        Raises:
            InvalidArgument, InvalidType: naming the argument.
            StepError: the layer was not appended yet.
            TokensReleased: by `positions`, a token sees one that its group has released.
        """
        plan = self._plan_of(layer)
        self._native.check_attend(layer)
        cache = self.cache
        options = AttendOptions(
            scale, exact, softcap, alibi_slopes, causal, mask, window, positions, sinks
        )
        retention = cache._retentions[layer]
        if retention is not None and (window is None or window > retention):
            raise InvalidArgument(
                f"window: expected at most {retention}, the retention of layer {layer}'s group, "
                f"got {window}"
            )
        return cache.backend.attend(
            cache._storage, layer, plan, q, layout, options, return_lse, out
        )

    def mark_appended(self) -> None:
        """Takes every layer as appended: a CUDA graph of the same `graph_key` has been replayed.

        Raises:
            StepClosed: it was committed or rolled back.
        """
        self._check_open()
        for layer in self._native.missing_layers():
            self._native.mark_appended(layer)

    def plan(self, group: int = 0) -> Plan:
        """What the step means for a group: block tables, slots, copies. Valid until it closes.

        `raw` of it, or plan(p) with the pool's number (see `CacheSpec.pools`), is the same for the
        group's raw rows.
        """
        self._check_open()
        return self._plans[checks.integer(group, "group", 0, len(self._plans) - 1)]

    def commit(self) -> None:
        """Makes the new lengths visible.

        Raises:
            StepIncomplete: a layer was not appended; the step has been rolled back.
            StepClosed: it was committed or rolled back before.
        """
        self._check_open()
        missing = self._native.missing_layers()
        if missing:
            self.rollback()
            raise StepIncomplete(
                f"expected every layer to be appended once, but layers {missing} were not; "
                "the step was rolled back"
            )
        self._native.commit()

    def rollback(self) -> None:
        """Leaves every sequence as it was before the step.

        Raises:
            StepClosed: the step was committed or rolled back before.
        """
        self._check_open()
        self._native.rollback()

    def _plan_of(self, layer: int) -> Plan:
        self._check_open()
        layers = self.cache.spec.layers
        if type(layer) is not int or not 0 <= layer < len(layers):
            layer = checks.integer(layer, "layer", 0, len(layers) - 1)
        return self._plans[layers[layer].group]

    def _check_open(self) -> None:
        if not self._native.is_open:
            raise StepClosed("the step was committed or rolled back")
