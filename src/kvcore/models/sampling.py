"""Choosing the next token from a row of logits.

The steps and their order are those of transformers: repetition penalty, temperature, top-k, top-p,
min-p, then one draw. Temperature 0 stops after the penalty and takes the largest logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import InvalidArgument, InvalidType

Floats = NDArray[np.floating[Any]]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The default is greedy.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores what follows
            but the repetition penalty.
        top_k: keep the k largest logits, and what ties with the last of them; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this (nucleus
            sampling, Holtzman et al., 2020); 1 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one (Nguyen et al.,
            2024); 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of every token that the
            prompt or the text so far holds (Keskar et al., 2019); 1 changes nothing.
        seed: seeds the request's own generator, which draws once a token, so the same seed gives
            the same text alone and in any batch; None takes fresh entropy.

    Raises:
        InvalidArgument: a value is outside its range.
        InvalidType: a value is not a number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, "a finite number >= 0", lambda x: x >= 0)
        checks.integer(self.top_k, "top_k", 0)
        _check_real("top_p", self.top_p, "a number in (0, 1]", lambda x: 0 < x <= 1)
        _check_real("min_p", self.min_p, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        _check_real(
            "repetition_penalty", self.repetition_penalty, "a finite number > 0", lambda x: x > 0
        )
        if self.seed is not None:
            checks.integer(self.seed, "seed", 0)

    @property
    def greedy(self) -> bool:
        """Whether the next token is the largest logit as it came."""
        return self.temperature == 0 and self.repetition_penalty == 1


def _check_real(name: str, value: object, expected: str, valid: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InvalidType(f"{name}: expected {expected}, got {value!r}")
    if not (math.isfinite(value) and valid(value)):
        raise InvalidArgument(f"{name}: expected {expected}, got {value!r}")


def penalize(logits: Floats, seen: Ids, penalty: float) -> Floats:
    """A copy of `logits` [vocab] with the repetition penalty on the token ids in `seen`."""
    logits = logits.copy()
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def candidates(logits: Floats, params: SamplingParams) -> tuple[Ids, NDArray[np.float64]]:
    """The tokens that may come next and their probabilities.

    Args:
        logits: [vocab], after the repetition penalty.
        params: with a temperature above 0.

    Returns:
        Token ids [n] and probabilities [n] float64 that sum to 1. With top_p below 1 they run from
        the most likely to the least, equals by id; otherwise by id.
    """
    if params.temperature <= 0:
        raise InvalidArgument(f"temperature: expected a number > 0, got {params.temperature!r}")
    ids = _top_k(logits, params.top_k)
    # Shifted before the division, so that a tiny temperature cannot overflow.
    scores = logits[ids].astype(np.float64)
    scores = (scores - scores.max()) / params.temperature
    weights = np.exp(scores)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    if params.min_p > 0:
        likely = weights >= params.min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    return ids, weights / weights.sum()


def _top_k(logits: Floats, k: int) -> Ids:
    if not 0 < k < logits.size:
        return np.arange(logits.size)
    threshold = np.partition(logits, logits.size - k)[logits.size - k]
    return np.flatnonzero(logits >= threshold)


def _nucleus(weights: NDArray[np.float64], top_p: float) -> Ids:
    """Indices of the fewest largest weights that hold `top_p` of their sum, largest first."""
    # A nucleus is small beside a vocabulary: sort only the largest weights, and more of them until
    # they hold it.
    mass = top_p * weights.sum()
    count = 256
    while True:
        largest = _top_k(weights, count)
        order = largest[np.argsort(-weights[largest], kind="stable")]
        cumulative = np.cumsum(weights[order])
        if cumulative[-1] >= mass or order.size == weights.size:
            return order[: int(np.searchsorted(cumulative, mass)) + 1]
        count *= 8


class Sampler:
    """Draws the tokens of one request; it remembers what the penalty and the seed need."""

    def __init__(self, params: SamplingParams, prompt: Iterable[int] = ()) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._penalizes = params.repetition_penalty != 1
        self._seen = set(prompt) if self._penalizes else set()

    def sample(self, logits: Floats) -> int:
        """The next token, from logits [vocab]."""
        params = self.params
        if self._penalizes:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            logits = penalize(logits, seen, params.repetition_penalty)
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            raise InvalidArgument(f"logits: expected finite numbers, got {logits[best]}")
        if params.temperature == 0:
            token = best
        else:
            ids, probabilities = candidates(logits, params)
            cumulative = np.cumsum(probabilities)
            draw = self._random.random() * cumulative[-1]
            token = int(ids[np.searchsorted(cumulative, draw, side="right")])
        if self._penalizes:
            self._seen.add(token)
        return token


def sample_batch(
    logits: Any, samplers: Sequence[Sampler], to_host: Callable[[Any], Any] = np.asarray
) -> list[int]:
    """The next token of every request.

    Args:
        logits: [len(samplers), vocab], of any array module.
        to_host: makes NumPy's arrays of this module's. Where all are greedy, only what was chosen
            goes through it.
    """
    if all(sampler.params.greedy for sampler in samplers):
        best, largest = logits.argmax(axis=1), logits.max(axis=1)
        if not np.isfinite(to_host(largest)).all():
            raise InvalidArgument("logits: expected finite numbers, got NaN or infinity")
        return [int(token) for token in to_host(best)]
    rows = to_host(logits)
    return [sampler.sample(row) for row, sampler in zip(rows, samplers, strict=True)]
