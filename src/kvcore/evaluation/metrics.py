"""How far the distributions of one run of a model lie from those of another, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.models.parallel import cut, for_each

# Rows that are worked on together: their logits stay in a core's cache.
_ROWS = 8

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """One run at n positions, beside the reference.

    Attributes:
        nll: float64 [n], the negative logarithm of the target's probability, in nats.
        kl: float64 [n], the Kullback-Leibler divergence from the reference, in nats.
        agrees: bool [n], whether the likeliest token is the reference's.
        hits: bool [n], whether it is the target.
    """

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    hits: NDArray[np.bool_]


def join(parts: Iterable[Comparison]) -> Comparison:
    """The positions of all parts, in order."""
    columns = [vars(part) for part in parts]
    names = [field.name for field in fields(Comparison)]
    return Comparison(*(np.concatenate([part[name] for part in columns]) for name in names))


class Reference:
    """The reference's distributions at n positions, with which other runs are compared.

    Args:
        logits: float32 [n, vocab], kept.
        targets: the tokens that follow, int [n].
    """

    def __init__(self, logits: Floats, targets: NDArray[Any]) -> None:
        self._logits = logits
        self._targets = targets
        self._weights = np.empty_like(logits)
        self._top = logits.argmax(-1)
        self._log_sum = np.empty(len(logits))
        self._sum = np.empty(len(logits))

        def exponentiate(rows: slice) -> None:
            self._log_sum[rows], self._sum[rows] = _exponentiate(logits[rows], self._weights[rows])

        _each(exponentiate, len(logits))

    def compare(self, logits: Floats) -> Comparison:
        """Compares other logits [n, vocab] with the reference's.

        The divergence is E(z - z') + log sum exp z' - log sum exp z over the reference's
        distribution, so that what is small is a difference of logits and not of probabilities.
        """
        n = len(logits)
        log_sum, kl = np.empty(n), np.empty(n)

        def compare(rows: slice) -> None:
            scratch = np.empty_like(logits[rows])
            log_sum[rows], _ = _exponentiate(logits[rows], scratch)
            np.subtract(self._logits[rows], logits[rows], out=scratch)
            scratch *= self._weights[rows]
            shift = scratch.sum(-1, dtype=np.float64) / self._sum[rows]
            kl[rows] = shift + log_sum[rows] - self._log_sum[rows]

        _each(compare, n)
        top = logits.argmax(-1)
        nll = log_sum - logits[np.arange(n), self._targets]
        return Comparison(nll, kl, top == self._top, top == self._targets)


def _exponentiate(logits: Floats, out: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Writes exp(logits - maximum) to `out`; log sum exp of each row, and the sum of its `out`."""
    maximum = logits.max(-1)
    np.subtract(logits, maximum[:, None], out=out)
    np.exp(out, out=out)
    total = out.sum(-1, dtype=np.float64)
    return maximum + np.log(total), total


def _each(work: Callable[[slice], None], count: int) -> None:
    def part(rows: slice) -> None:
        for start in range(rows.start, rows.stop, _ROWS):
            work(slice(start, min(start + _ROWS, rows.stop)))

    for_each(part, cut(count, _ROWS))


def perplexity(nll: NDArray[np.float64]) -> float:
    """exp of the mean."""
    return float(np.exp(nll.mean()))


def relative_change(
    nll: NDArray[np.float64], reference: NDArray[np.float64]
) -> tuple[float, float]:
    """By how much the perplexity grew, in percent, and the standard error of that."""
    paired = nll - reference
    error = float(paired.std(ddof=1) / np.sqrt(len(paired))) if len(paired) > 1 else float("nan")
    return 100 * float(np.expm1(paired.mean())), 100 * error
