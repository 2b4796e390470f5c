"""Results as lines for people, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from kvcore.parity.runner import Result

#: What the columns are.
LEGEND = (
    "error: of attention against float64, as a share of what is allowed. bits: the same again, and "
    "in any\nbatch, sharing or chunking that promises it. bytes: in the blocks, the CPU's."
)


def header(width: int) -> str:
    """The names of the columns; cases' names take `width`."""
    return f"{'case':<{width}}  {'error':>7}  {'bits':<5}  {'bytes':<5}  {'s':>7}"


def line(result: Result, width: int) -> str:
    """One result; what is wrong with it on lines of its own."""
    text = (
        f"{result.case:<{width}}  {_number(result.worst):>7}  {_same(result.same_bits):<5}  "
        f"{_same(result.same_bytes):<5}  {result.seconds:>7.3f}"
    )
    return text if result.passed else f"{text}\n    FAILED: {result.message}"


def summary(results: Sequence[Result]) -> str:
    """How many passed, and the largest error of those."""
    passed = [result for result in results if result.passed]
    seconds = sum(result.seconds for result in results)
    text = (
        f"{results[0].backend}, {results[0].device}: {len(passed)} of {len(results)} cases passed "
        f"in {seconds:.1f} s"
    )
    if not passed:
        return text + "."
    worst = max(passed, key=lambda result: result.worst)
    return f"{text}; largest error {worst.worst:.2f} of what is allowed ({worst.case})."


def to_json(results: Iterable[Result]) -> str:
    """A list of objects; an error that is not finite is null."""
    return json.dumps([_record(result) for result in results], indent=2)


def _record(result: Result) -> dict[str, Any]:
    record = asdict(result)
    if not math.isfinite(result.worst):
        record["worst"] = None
    return record


def _number(worst: float) -> str:
    return "-" if worst == 0 else f"{worst:.3f}" if worst < 1000 else f"{worst:.0e}"


def _same(value: bool | None) -> str:
    return "-" if value is None else "same" if value else "OTHER"
