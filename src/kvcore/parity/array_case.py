"""Cases of operations on plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from kvcore.parity.expected import same_bits
from kvcore.parity.found import Found
from kvcore.parity.subject import Subject

Arrays = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class ArrayCase:
    """An operation on plain arrays.

    Attributes:
        name: "topic/what".
        attempt: tries it on a backend that is active.
    """

    name: str
    attempt: Callable[[Subject], Found]

    def run(self, subject: Subject) -> Found:
        with subject.active():
            return self.attempt(subject)


def judge(
    first: Arrays,
    again: Arrays,
    *,
    worst: float = 0.0,
    stored: tuple[Arrays, Arrays] | None = None,
) -> Found:
    """What a case found.

    Args:
        first, again: what the operation gave, twice.
        worst: the largest error as a share of what is allowed.
        stored: what was encoded or stored, and what the reference makes of it.
    """
    messages = [] if worst <= 1 else [f"error {worst:.3g} times what is allowed"]
    bits = all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    if not bits:
        messages.append("other bits the second time")
    same_bytes = None
    if stored is not None:
        same_bytes = all(same_bits(a, b) for a, b in zip(*stored, strict=True))
        if not same_bytes:
            messages.append("other bytes than the CPU's")
    return Found(worst, bits, same_bytes, "; ".join(messages))
