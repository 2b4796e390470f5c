"""What a case finds on a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvcore.parity.subject import Subject


@dataclass(frozen=True)
class Found:
    """What came of a case.

    Attributes:
        worst: the largest error as a share of what is allowed.
        same_bits: whether running again, and what else promises the same bits, gave them.
        same_bytes: whether what was stored has the reference's bytes; None where nothing is stored.
        message: what is wrong; empty where nothing is.
    """

    worst: float
    same_bits: bool
    same_bytes: bool | None
    message: str = ""

    @property
    def passed(self) -> bool:
        return not self.message


class Case(Protocol):
    """One case of the contract: a name, "topic/what", and how it is tried."""

    @property
    def name(self) -> str: ...

    def run(self, subject: Subject) -> Found: ...
