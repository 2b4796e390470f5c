"""The transformer decoder over a paged cache, written against an array module."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvcore.errors import InvalidArgument
from kvcore.models import reference
from kvcore.models.config import ModelConfig
from kvcore.models.layers import MANY_ROWS, Linear, cpu_linear, rms_norm, swiglu
from kvcore.models.parallel import cut, for_each, one_blas_thread
from kvcore.models.rope import Rotation, inverse_frequencies
from kvcore.models.weights import DecoderWeights, LayerWeights

if TYPE_CHECKING:
    from kvcore.step import Step

LOGITS = ("last", "all", "none")


class Decoder:
    """A decoder-only transformer that keeps its keys and values in a `KVCache`.

    Args:
        config: the architecture.
        weights: float32 arrays of `xp`.
        xp: the array module, NumPy or one with its interface.
        linear: the linear layer over arrays of `xp`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        *,
        xp: Any = np,
        linear: Linear = cpu_linear,
    ) -> None:
        self.config = config
        self.weights = weights
        self._xp = xp
        self._linear = linear
        inv_freq, self._attention_factor = inverse_frequencies(config.rope)
        self._inv_freq = xp.asarray(inv_freq)

    def forward(self, step: Step, tokens: npt.ArrayLike, logits: str = "last") -> Any:
        """Runs the tokens of one step through all layers, appending to the step's cache.

        Args:
            step: an open step of a cache with this model's layers.
            tokens: integers [T], the new tokens of the step's sequences, one after the other.
            logits: "last" for the last new token of each sequence, "all" for every token, "none"
                for a chunk of a prompt whose logits nobody reads.

        Returns:
            float32 [S, vocab], [T, vocab] or None.

        Raises:
            InvalidArgument: before anything is appended, if `tokens` has another length than the
                step or holds an id outside the vocabulary, if a sequence would outgrow
                max_context, or if `logits` is none of the three.
        """
        ids = self._check(step, tokens, logits)
        x = self.weights.embedding[self._xp.asarray(ids)]
        with one_blas_thread() if len(ids) >= MANY_ROWS else nullcontext():
            return self._run(step, x, logits)

    def forward_full(self, tokens: npt.ArrayLike, logits: str = "all") -> npt.NDArray[np.float32]:
        """Recomputes a whole text without a cache, in plain NumPy.

        Args:
            tokens: integers [n].
            logits: "all" for every token, "last" for the last one.

        Returns:
            float32 [n, vocab] or [1, vocab].

        Raises:
            InvalidArgument: as in `forward`.
        """
        ids = check_tokens(self.config, tokens)
        if len(ids) > self.config.max_context:
            raise InvalidArgument(
                f"tokens: at most max_context ({self.config.max_context}) expected, got {len(ids)}"
            )
        if logits not in ("all", "last"):
            raise InvalidArgument(f"logits: 'all' or 'last' expected, got {logits!r}")
        return reference.forward(self.config, self.weights, ids, last_only=logits == "last")

    def _check(self, step: Step, tokens: npt.ArrayLike, logits: str) -> npt.NDArray[np.int64]:
        if logits not in LOGITS:
            raise InvalidArgument(f"logits: one of {', '.join(LOGITS)} expected, got {logits!r}")
        ids = check_tokens(self.config, tokens)
        if len(ids) != step.num_tokens:
            raise InvalidArgument(
                f"tokens: the step's {step.num_tokens} tokens expected, got {len(ids)}"
            )
        longest = int(np.max(step.seq_lens))
        if longest > self.config.max_context:
            raise InvalidArgument(
                f"step: sequences of at most max_context ({self.config.max_context}) tokens "
                f"expected, got one of {longest}"
            )
        return ids

    def _run(self, step: Step, x: Any, logits: str) -> Any:
        """All layers and the head over embedded tokens x [T, hidden], which is changed."""
        xp, config, weights = self._xp, self.config, self.weights
        positions = xp.asarray(_positions(step))
        rotation = Rotation(xp, positions, self._inv_freq, self._attention_factor)
        buffers = _Buffers(xp, config, len(x))
        last = config.num_layers - 1
        for index, layer in enumerate(weights.layers):
            self._project(layer, x, rotation, buffers)
            step.append(index, buffers.k, buffers.v)
            if index == last and logits == "none":
                return None
            attended = step.attend(index, buffers.q).reshape(len(x), config.q_size)
            if index == last and logits == "last" and len(step.seq_lens) < len(x):
                # Above the last layer's attention only the rows that someone reads are of use.
                rows = xp.asarray(step.query_starts[1:] - 1)
                x, attended = x[rows], attended[rows]
                buffers = _Buffers(xp, config, len(x))
            self._finish(layer, x, attended, buffers)
        self._norm(x, weights.norm, buffers)
        out = xp.empty((len(x), config.vocab_size), xp.float32)
        self._linear(buffers.normed, weights.head, None, out)
        return out

    def _project(self, layer: LayerWeights, x: Any, rotation: Rotation, b: _Buffers) -> None:
        """The layer's queries, keys and values of x [T, hidden], to b.q, b.k and b.v."""
        xp, eps = self._xp, self.config.norm_eps

        def turn(rows: slice) -> None:
            if self.config.qk_norm:
                rms_norm(xp, b.straight_q[rows], layer.q_norm, eps, b.straight_q[rows])
                rms_norm(xp, b.straight_k[rows], layer.k_norm, eps, b.straight_k[rows])
            rotation.apply(b.straight_qk, b.qk, rows)

        self._norm(x, layer.attention_norm, b)
        self._linear(b.normed, layer.qkv, layer.qkv_bias, b.qkv)
        for_each(turn, b.parts)

    def _finish(self, layer: LayerWeights, x: Any, attended: Any, b: _Buffers) -> None:
        """Adds the output projection of attended [R, Hq D], then the SwiGLU, to x [R, hidden]."""

        def activate(rows: slice) -> None:
            swiglu(self._xp, b.gate[rows], b.up[rows], b.hidden[rows])

        self._linear(attended, layer.output, layer.output_bias, b.normed)
        x += b.normed
        self._norm(x, layer.mlp_norm, b)
        self._linear(b.normed, layer.gate_up, layer.gate_up_bias, b.gate_up)
        for_each(activate, b.parts)
        self._linear(b.hidden, layer.down, layer.down_bias, b.normed)
        x += b.normed

    def _norm(self, x: Any, weight: Any, b: _Buffers) -> None:
        """The normed rows of x, to b.normed."""

        def norm(rows: slice) -> None:
            rms_norm(self._xp, x[rows], weight, self.config.norm_eps, b.normed[rows])

        for_each(norm, b.parts)


class _Buffers:
    """What the layers of one forward call write to, R rows each, and the views that they need.

    Attributes:
        parts: the rows as threads share them, where a product does not.
    """

    def __init__(self, xp: Any, config: ModelConfig, rows: int) -> None:
        self.parts = cut(rows, MANY_ROWS // 2 if xp is np else rows)
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.normed = xp.empty((rows, config.hidden_size), xp.float32)
        self.gate_up = xp.empty((rows, 2 * config.intermediate_size), xp.float32)
        self.gate = self.gate_up[:, : config.intermediate_size]
        self.up = self.gate_up[:, config.intermediate_size :]
        self.hidden = xp.empty((rows, config.intermediate_size), xp.float32)

        # Queries and keys are neighbours before and after the rotation: one call turns both.
        self.qkv = xp.empty((rows, config.q_size + 2 * config.kv_size), xp.float32)
        straight = self.qkv.reshape(rows, heads + 2 * kv_heads, head_dim)
        self.straight_q = straight[:, :heads]
        self.straight_k = straight[:, heads : heads + kv_heads]
        self.straight_qk = straight[:, : heads + kv_heads]
        self.v = straight[:, heads + kv_heads :]
        self.qk = xp.empty((rows, heads + kv_heads, head_dim), xp.float32)
        self.q, self.k = self.qk[:, :heads], self.qk[:, heads:]


def check_tokens(config: ModelConfig, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Token ids as an int64 array [n], n > 0, all inside the vocabulary, or InvalidArgument."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise InvalidArgument(
            f"tokens: a non-empty one-dimensional array of integers expected, "
            f"got {ids.dtype} of shape {ids.shape}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        outside = low if low < 0 else high
        raise InvalidArgument(
            f"tokens: ids from 0 to {config.vocab_size - 1} expected, got {outside}"
        )
    return ids.astype(np.int64)


def _positions(step: Step) -> npt.NDArray[np.int64]:
    """The place of each of the step's tokens in its sequence, [T]."""
    starts = step.query_starts.astype(np.int64)
    counts = np.diff(starts)
    first = step.seq_lens - counts
    return np.arange(starts[-1]) + np.repeat(first - starts[:-1], counts)
