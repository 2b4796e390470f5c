"""The transformer decoder over a paged cache, computed where the cache's blocks lie."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvcore.errors import InvalidArgument
from kvcore.models import reference
from kvcore.models.attention import Attention
from kvcore.models.config import ModelConfig
from kvcore.models.device import Device
from kvcore.models.latent_attention import AbsorbedAttention
from kvcore.models.layers import NORMS, Rows, softcap
from kvcore.models.mlp import Mlp
from kvcore.models.moe import ExpertLayer
from kvcore.models.parallel import MANY_ROWS, one_blas_thread
from kvcore.models.rope import Rotation, inverse_frequencies
from kvcore.models.weights import DecoderWeights, LayerWeights

if TYPE_CHECKING:
    from kvcore.step import Step

LOGITS = ("last", "all", "none")


class Decoder:
    """A decoder-only transformer that keeps its keys and values in a `KVCache`.

    Args:
        config: the architecture.
        weights: float32 arrays of NumPy; another device gets a copy of each.
        device: where to compute; the CPU when left out.

    Attributes:
        weights: arrays of the device.
        device: the device, which is also that of the caches that steps come from.
    """

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, device: Device | None = None
    ) -> None:
        self.config = config
        self.device = device = Device() if device is None else device
        # The ropes that layers use, each as what Rotation takes, and which one each layer uses.
        ropes = [rope for rope in (config.rope, config.local_rope) if rope is not None]
        with device.active():
            self.weights = weights if device.is_host else weights.converted(device.put)
            self._turns = [
                (device.put(inv_freq), factor)
                for inv_freq, factor in map(inverse_frequencies, ropes)
            ]
        self._attention = Attention if config.latent is None else AbsorbedAttention
        self._attend_options = [self._options_of(index) for index in range(config.num_layers)]
        self._layer_turn = [
            None if rope is None else ropes.index(rope)
            for rope in map(config.layer_rope, range(config.num_layers))
        ]

    def forward(self, step: Step, tokens: npt.ArrayLike, logits: str = "last") -> Any:
        """Runs the tokens of one step through all layers, appending to the step's cache.

        Args:
            step: an open step of a cache with this model's layers.
            tokens: integers [T], the new tokens of the step's sequences, one after the other.
            logits: "last" for the last new token of each sequence, "all" for every token, "none"
                for a chunk of a prompt whose logits nobody reads.

        Returns:
            float32 [S, vocab], [T, vocab] or None, as an array of the device.

        Raises:
            InvalidArgument: before anything is appended, if `tokens` has another length than the
                step or holds an id outside the vocabulary, if a sequence would outgrow
                max_context, if `logits` is none of the three, or if the step's cache lies on
                another device.
        """
        ids = self._check(step, tokens, logits)
        shares_work = self.device.is_host and len(ids) >= MANY_ROWS
        with one_blas_thread() if shares_work else nullcontext(), self.device.active():
            return self._run(step, self.device.put(ids), logits)

    def forward_full(self, tokens: npt.ArrayLike, logits: str = "all") -> npt.NDArray[np.float32]:
        """Recomputes a whole text without a cache, in plain NumPy.

        Weights of another device come back for each call.

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
        weights = self.weights
        if not self.device.is_host:
            weights = weights.converted(self.device.get)
        return reference.forward(self.config, weights, ids, last_only=logits == "last")

    def _check(self, step: Step, tokens: npt.ArrayLike, logits: str) -> npt.NDArray[np.int64]:
        if logits not in LOGITS:
            raise InvalidArgument(f"logits: one of {', '.join(LOGITS)} expected, got {logits!r}")
        ids = check_tokens(self.config, tokens)
        if len(ids) != step.num_tokens:
            raise InvalidArgument(
                f"tokens: the step's {step.num_tokens} tokens expected, got {len(ids)}"
            )
        self.device.check(step.cache, "step")
        longest = int(np.max(step.seq_lens))
        if longest > self.config.max_context:
            raise InvalidArgument(
                f"step: sequences of at most max_context ({self.config.max_context}) tokens "
                f"expected, got one of {longest}"
            )
        return ids

    def _embed(self, ids: Any, positions: Any) -> Any:
        """A new array [T, hidden]."""
        config, weights = self.config, self.weights
        x = weights.embedding[ids]
        if config.embedding_scale != 1:
            # The factor that checkpoints were trained with is a float32.
            x *= np.float32(config.embedding_scale)
        if weights.positions is not None:
            x += weights.positions[positions]
        return x

    def _run(self, step: Step, ids: Any, logits: str) -> Any:
        """All layers and the head over the step's tokens."""
        config, weights, device = self.config, self.weights, self.device
        xp = device.xp
        positions = device.put(_positions(step))
        rotations = [Rotation(xp, positions, *turn) for turn in self._turns]
        x = self._embed(ids, positions)
        rows = Rows(device, len(x))
        attention = self._attention(config, rows)
        blocks = _Blocks(config, rows)
        last = config.num_layers - 1
        for index, layer in enumerate(weights.layers):
            turn = self._layer_turn[index]
            blocks.norm(x, layer.attention_norm)
            attention.project(layer, blocks.normed, None if turn is None else rotations[turn])
            attention.append(step, index)
            if index == last and logits == "none":
                return None
            attended = attention.attend(step, index, self._attend_options[index])
            if index == last and logits == "last" and len(step.seq_lens) < len(x):
                # Above the last layer's attention only the rows that someone reads are of use.
                read = device.put(step.query_starts[1:] - 1)
                x, attended = x[read], attended[read]
                rows = Rows(device, len(x))
                blocks = _Blocks(config, rows)
            attention.output(layer, attended, rows, blocks.normed)
            blocks.add(x, layer.attention_post_norm)
            blocks.norm(x, layer.mlp_norm)
            blocks.mlp(index, layer)
            blocks.add(x, layer.mlp_post_norm)
        blocks.norm(x, weights.norm)
        out = rows.empty(config.vocab_size)
        rows.linear(blocks.normed, weights.head, None, out)
        if config.logit_softcap is not None:
            softcap(xp, out, config.logit_softcap)
        return out

    def _options_of(self, index: int) -> dict[str, Any]:
        """The options of a layer's attention, as `Step.attend` takes them."""
        config = self.config
        options = {
            "scale": config.attention_scale,
            "softcap": config.score_softcap,
            "window": config.window(index),
            "sinks": self.weights.layers[index].sinks,
        }
        return {name: value for name, value in options.items() if value is not None}


class _Blocks:
    """What norms and MLPs of one forward call write to, for R rows.

    Attributes:
        normed: [R, hidden], what the last of them wrote.
    """

    def __init__(self, config: ModelConfig, rows: Rows) -> None:
        self._config = config
        self._rows = rows
        self._norm = NORMS[config.norm]
        self.normed = rows.empty(config.hidden_size)
        has_mlp = config.layer_experts(0) is None
        self._mlp = _plain_mlp(config, rows) if has_mlp else None
        self._experts = ExpertLayer(config, rows) if config.experts else None
        self._mixed = rows.empty(config.hidden_size) if config.experts else None

    def norm(self, x: Any, weight: Any) -> None:
        """The normed rows of x [R, hidden]."""

        def norm(rows: slice) -> None:
            self._norm(self._rows.xp, x[rows], weight, self._config.norm_eps, self.normed[rows])

        self._rows.each(norm)

    def add(self, x: Any, post_norm: Any) -> None:
        """Adds `normed`, itself normed if there is a weight for it, to x."""
        if post_norm is not None:
            self.norm(self.normed, post_norm)
        x += self.normed

    def mlp(self, index: int, layer: LayerWeights) -> None:
        """The layer's MLP or experts of `normed`."""
        if self._config.layer_experts(index) is None:
            assert self._mlp is not None
            weights = (layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias)
            self._mlp.apply(self.normed, *weights, self.normed)
        else:
            assert self._experts is not None
            self._experts.apply(layer, self.normed, self._mixed)
            self.normed, self._mixed = self._mixed, self.normed


def _plain_mlp(config: ModelConfig, rows: Rows) -> Mlp:
    return Mlp(config.intermediate_size, config.activation, rows, is_gated=config.gated)


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
