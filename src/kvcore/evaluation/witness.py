"""Attention over other caches, fed with the very q, k and v of a run over the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kvcore.step import Step


class OutputErrors:
    """Relative errors |o - o'| / |o'| of attention's outputs, of every head and token.

    Args:
        num_layers: L.
        to_host: makes NumPy's arrays of outputs.

    Attributes:
        largest: float64 [L], the largest of each layer.
    """

    def __init__(
        self, num_layers: int, to_host: Callable[[Any], NDArray[Any]] = np.asarray
    ) -> None:
        self._to_host = to_host
        self.largest = np.zeros(num_layers)
        self._sums = np.zeros(num_layers)
        self._counts = np.zeros(num_layers, np.int64)

    def add(self, layer: int, out: Any, reference: Any) -> None:
        """Takes the outputs [T, Hq, Dv] of one call."""
        out, reference = self._to_host(out), self._to_host(reference)
        size = np.einsum("...d,...d->...", reference, reference)
        difference = out - reference
        error = np.einsum("...d,...d->...", difference, difference)
        # An output of zeros, as of a token that sees nothing, is compared with itself alone.
        relative = np.sqrt(error / np.where(size > 0, size, np.where(error > 0, 0, 1)))
        self.largest[layer] = max(self.largest[layer], float(relative.max()))
        self._sums[layer] += float(relative.sum(dtype=np.float64))
        self._counts[layer] += relative.size

    @property
    def mean(self) -> Any:
        """float64 [L], the mean of each layer."""
        return self._sums / np.maximum(self._counts, 1)


class Witness:
    """A step for a decoder that appends to other steps too and compares what they give back.

    Args:
        step: the reference's open step.
        others: open steps of as many new tokens.
        errors: where the errors of each of them go.
    """

    def __init__(self, step: Step, others: Sequence[Step], errors: Sequence[OutputErrors]) -> None:
        self._step = step
        self.cache = step.cache
        self._others = list(zip(others, errors, strict=True))
        self.num_tokens = step.num_tokens
        self.query_starts = step.query_starts
        self.seq_lens = step.seq_lens

    def append(self, layer: int, k: Any, v: Any) -> None:
        """As `Step.append`, to all of them."""
        self._step.append(layer, k, v)
        for step, _ in self._others:
            step.append(layer, k, v)

    def attend(self, layer: int, q: Any, **options: Any) -> Any:
        """As `Step.attend` of the reference."""
        out = self._step.attend(layer, q, **options)
        for step, errors in self._others:
            errors.add(layer, step.attend(layer, q, **options), out)
        return out
