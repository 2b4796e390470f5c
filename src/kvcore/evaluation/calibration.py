"""The constants of a model that a cache's spec may hold: a key bias, and scales per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import InvalidArgument, UnsupportedError
from kvcore.evaluation.texts import CALIBRATING, Text, packaged_texts

if TYPE_CHECKING:
    from kvcore.models import Model

_LEVELS = 127
_ARRAYS = ("key_bias", "key_scales", "value_scales")


@dataclass(frozen=True)
class Calibration:
    """Arguments of `CacheSpec`, each float32 [L, H, D].

    Attributes:
        key_bias: the mean key as it is cached, rotated by its position.
        key_scales, value_scales: the largest magnitude of a channel over the 127 levels of
            "int8_static".
        source: the model.
        num_tokens: tokens that it was computed from.
    """

    key_bias: NDArray[np.float32]
    key_scales: NDArray[np.float32]
    value_scales: NDArray[np.float32]
    source: str
    num_tokens: int

    def save(self, path: str) -> None:
        """Writes a NumPy .npz file of these names to `path`.

        Raises:
            InvalidArgument: it cannot be written.
        """
        try:
            with open(path, "wb") as file:
                np.savez(file, **vars(self))
        except OSError as error:
            raise InvalidArgument(
                f"calibration: expected a file that can be written at {path}: {error.strerror}"
            ) from None

    @classmethod
    def load(cls, path: str) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            InvalidArgument: there is no such file, or it holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: np.asarray(file[name], np.float32) for name in _ARRAYS}
                return cls(**arrays, source=str(file["source"]), num_tokens=int(file["num_tokens"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InvalidArgument(
                f"calibration: expected a file that `kvcore eval --calibrate` wrote at {path}: "
                f"{error}"
            ) from None


def calibrate(
    model: Model,
    texts: Sequence[Text] | None = None,
    *,
    length: int = 1024,
) -> Calibration:
    """Runs texts through a model and takes the statistics of what a float32 cache then holds.

    Args:
        texts: what to run; three excerpts that `evaluate` does not use when left out.
        length: tokens of each that count, at most.

    Raises:
        InvalidArgument: there is no text, or one has no token.
        UnsupportedError: the model's values are a part of its keys.
    """
    if model.config.latent is not None:
        raise UnsupportedError("model: latent attention has no formats that want a calibration")
    chosen = packaged_texts(CALIBRATING) if texts is None else texts
    if not chosen:
        raise InvalidArgument("texts: expected at least one, got none")
    most = min(length, model.config.max_context)
    total, statistics = 0, _Statistics()
    for text in chosen:
        tokens = np.asarray(model.tokenizer.encode(text.text)[:most], np.int32)
        if not len(tokens):
            raise InvalidArgument(f"texts: expected at least one token in {text.name}, got none")
        statistics.add(_run(model, tokens))
        total += len(tokens)
    return Calibration(
        key_bias=_round_to_bf16(statistics.key_sum / total),
        key_scales=_scales(statistics.key_largest),
        value_scales=_scales(statistics.value_largest),
        source=model.source,
        num_tokens=total,
    )


class _Statistics:
    """Sums and largest magnitudes over tokens, float64 [L, H, D]."""

    def __init__(self) -> None:
        self.key_sum: Any = 0.0
        self.key_largest: Any = 0.0
        self.value_largest: Any = 0.0

    def add(self, layers: list[tuple[Any, Any]]) -> None:
        self.key_sum = self.key_sum + np.stack([k.sum(0, dtype=np.float64) for k, _ in layers])
        largest = [
            np.stack([abs(rows).max(0) for rows in side]) for side in zip(*layers, strict=True)
        ]
        self.key_largest = np.maximum(self.key_largest, largest[0])
        self.value_largest = np.maximum(self.value_largest, largest[1])


def _run(model: Model, tokens: NDArray[np.int32]) -> list[tuple[Any, Any]]:
    """K and V of each layer, float32 [n, H, D], after `tokens`."""
    spec = model.cache_spec(k_format="fp32", v_format="fp32", slack=len(tokens))
    device, num_blocks = model.device, -(-len(tokens) // spec.groups[0].block_size)
    with device.active():
        cache = device.make_cache(spec, num_blocks=num_blocks)
        sequence = cache.sequence()
        with cache.step([(sequence, len(tokens))]) as step:
            model.decoder.forward(step, tokens, logits="none")
        pairs = [sequence.read(layer) for layer in range(spec.num_layers)]
        return [(device.get(k), device.get(v)) for k, v in pairs]


def _round_to_bf16(values: NDArray[np.float64]) -> NDArray[np.float32]:
    from ml_dtypes import bfloat16

    rounded: NDArray[np.float32] = values.astype(np.float32).astype(bfloat16).astype(np.float32)
    return rounded


def _scales(largest: NDArray[np.float64]) -> NDArray[np.float32]:
    # A channel that was always zero still needs a scale.
    return (np.where(largest > 0, largest, 1.0) / _LEVELS).astype(np.float32)
