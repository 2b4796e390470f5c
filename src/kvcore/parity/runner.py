"""Runs the contract on a backend; the first failure is not the last to be found."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvcore.errors import InvalidArgument
from kvcore.parity.cases import CASES
from kvcore.parity.found import Case
from kvcore.parity.subject import Subject


@dataclass(frozen=True)
class Result:
    """What came of a case on a backend.

    Attributes:
        case: its name.
        backend: "cpu" or "cuda".
        device: the instruction set, or what the kernels ran on.
        worst: the largest error as a share of what is allowed.
        same_bits: whether running again, and what else promises the same bits, gave them.
        same_bytes: whether stored bytes equal the CPU's; None where nothing is stored.
        passed: whether everything is as it must be.
        message: what is wrong.
        seconds: how long it took.
    """

    case: str
    backend: str
    device: str
    worst: float
    same_bits: bool
    same_bytes: bool | None
    passed: bool
    message: str
    seconds: float


def select_cases(select: Iterable[str] | None = None) -> list[Case]:
    """The cases whose names match one of the patterns, such as "decode/*" or "rot4".

    Raises:
        InvalidArgument: a pattern matches none.
    """
    if select is None:
        return list(CASES)
    chosen: set[str] = set()
    for pattern in select:
        wide = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
        found = fnmatch.filter([case.name for case in CASES], wide)
        if not found:
            raise InvalidArgument(f"select: expected a part of a case's name, got {pattern!r}")
        chosen.update(found)
    return [case for case in CASES if case.name in chosen]


def run(
    backend: str = "cpu",
    isa: str | None = None,
    select: Iterable[str] | None = None,
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Runs the contract's cases, all of them even where some fail.

    Args:
        backend: "cpu" or "cuda".
        isa: the CPU's instruction set; the one in use when left out.
        select: patterns of cases' names, see `select_cases`.
        progress: called with each result as it comes.

    Raises:
        BackendUnavailable: the backend cannot be used here.
        InvalidArgument: naming the argument.
    """
    if isa is not None and backend != "cpu":
        raise InvalidArgument(f"isa: expected None for backend {backend!r}, got {isa!r}")
    subject = Subject(backend, isa)
    cases = select_cases(select)
    with subject.active():
        device = subject.device
    results = []
    for case in cases:
        results.append(try_case(case, subject, device))
        progress(results[-1])
    return results


def try_case(case: Case, subject: Subject, device: str) -> Result:
    """A case's result, be it an exception's."""
    begin = time.perf_counter()
    try:
        found = case.run(subject)
        worst, bits, same_bytes = found.worst, found.same_bits, found.same_bytes
        message = found.message
    except Exception as error:  # whatever it is, it is a failure of this case alone
        worst, bits, same_bytes = float("inf"), False, None
        message = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - begin
    return Result(case.name, subject.backend, device, worst, bits, same_bytes, not message,
                  message, seconds)  # fmt: skip
