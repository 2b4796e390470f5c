"""Greedy texts of one model on two devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcore.models import Model


@dataclass(frozen=True)
class Tie:
    """A token that the other device would have chosen otherwise.

    Attributes:
        position: of the token, from the first one chosen.
        chosen, other: the two tokens.
        margin: how much larger the first device's logit of `chosen` was than its logit of `other`.
    """

    position: int
    chosen: int
    other: int
    margin: float


@dataclass(frozen=True)
class Agreement:
    """How two devices agree on a greedy text.

    Attributes:
        tokens: the text, as the first device chose it.
        largest: the largest difference of any two logits.
        ties: where the other would have gone on otherwise. A margin is at most twice the largest
            difference, so that only near ties are among them while that is small.
    """

    tokens: list[int]
    largest: float
    ties: list[Tie]


def follow(
    model: Model, other: Model, prompt: Sequence[int], count: int, **formats: Any
) -> Agreement:
    """Continues a prompt on one device and shows the very tokens to the other.

    Args:
        model: chooses the tokens.
        other: the same model on another device.
        count: tokens to choose.
        formats: further arguments of `Model.cache_spec`.
    """
    runs = [_Run(each, len(prompt) + count, formats) for each in (model, other)]
    text: list[int] = []
    largest, ties = 0.0, []
    tokens = np.asarray(prompt)
    for position in range(count):
        mine, others = (run.logits(tokens) for run in runs)
        largest = max(largest, float(np.abs(mine - others).max()))
        chosen, different = int(mine.argmax()), int(others.argmax())
        if different != chosen:
            margin = float(mine[chosen] - mine[different])
            ties.append(Tie(position, chosen, different, margin))
        text.append(chosen)
        tokens = np.asarray([chosen])
    return Agreement(text, largest, ties)


class _Run:
    """A text of a model in a cache of its own."""

    def __init__(self, model: Model, length: int, formats: dict[str, Any]) -> None:
        spec = model.cache_spec(**formats)
        counts = [pool.blocks_for(length, length) for pool in spec.pools]
        groups = len(spec.groups)
        self._model = model
        self._cache = model.device.make_cache(spec, counts[:groups], counts[groups:] or None)
        self._sequence = self._cache.sequence()

    def logits(self, tokens: Any) -> Any:
        """Those of the text's next token, float32 [vocab], after these tokens."""
        device = self._model.device
        with device.active(), self._cache.step([(self._sequence, len(tokens))]) as step:
            return device.get(self._model.decoder.forward(step, tokens))[0]
