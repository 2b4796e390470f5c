"""Results as a table for people and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.control import Cost
from bench.roof import Limits
from bench.suite import Result, Row

HEADER = (
    f"  {'peer':<14}{'ms':>10}{'p10':>10}{'GB/s':>9}{'GFLOP/s':>9}{'Mrow/s':>9}{'floor ms':>10}"
    f"{'of limit':>10}{'x kvcore':>10}{'error':>10}  {'steps':>5}"
)


def machine_lines(hardware: Mapping[str, Any], limits: Iterable[Limits], threads: int) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in hardware["versions"].items())
    lines = [
        f"{hardware['cpu']}, {hardware['cpus']} CPUs, L3 {hardware['l3_bytes'] >> 20} MiB; "
        f"{hardware['isa']} kernels, {threads} threads",
        versions,
    ]
    lines += [
        f"limit of {x.num_threads} thread{'s' * (x.num_threads > 1)}: reads {x.read_gbs:.1f} GB/s "
        f"({x.l2_gbs:.0f} from L2), {x.fma_gflops:.0f} GFLOP/s of float32 fma"
        for x in limits
    ]
    return lines


def case_lines(case: Case, kv_format: str, result: Result, limits: Limits) -> list[str]:
    """A table of one case in one format.

    Args:
        limits: those of the threads that were measured.
    """
    what = "writes" if case.kind == "append" else "reads"
    head = f"{case.name}, {kv_format}: {case.description}; {what} {megabytes(case, kv_format)}"
    if case.kind == "prefill":
        head += f", {case.flops / 1e9:.3g} GFLOP"
    regime = result.rows[0].regime
    if regime:
        head += f" from {regime} memory"
    lines = [head, HEADER, *(_row_line(row) for row in result.rows)]
    lines += [f"  without {name}: {reason}" for name, reason in result.absent.items()]
    if case.shared:
        lines.append(_sharing_line(case, result.rows, limits))
    return lines


def megabytes(case: Case, kv_format: str) -> str:
    """What the call must read or write."""
    return f"{case.kv_bytes(kv_format) / 1e6:.3g} MB"


def _row_line(row: Row) -> str:
    gflops = "" if row.gflops is None else f"{row.gflops:.1f}"
    gbs = "" if gflops else f"{row.gbs:.1f}"
    mrows = "" if row.mrows is None else f"{row.mrows:.2f}"
    share = "" if row.peer == "roof" else f"{row.share:.1%}"
    times = "" if row.peer == "kvcore" else f"{row.times_kvcore:.2f}"
    error = "" if row.error is None else f"{row.error:.1e}"
    notes = "  contended" if row.contended else ""
    return (
        f"  {row.peer:<14}{row.ms:>10.4g}{row.ms_p10:>10.4g}{gbs:>9}{gflops:>9}{mrows:>9}"
        f"{row.floor_ms:>10.4g}{share:>10}{times:>10}{error:>10}  {row.steps:>5}{notes}"
    )


def _sharing_line(case: Case, rows: Iterable[Row], limits: Limits) -> str:
    """What is gained by reading shared tokens once.

    Beside it what loading them again for each sequence, but from a core's cache, could gain at
    most. A load that serves several sequences can gain more, up to their number.
    """
    by_peer = {row.peer: row for row in rows}
    gain, memory_gbs = by_peer["kvcore-private"].times_kvcore, by_peer["roof"].gbs
    bound = min(len(case.new), limits.l2_gbs / memory_gbs)
    return (
        f"  {len(case.new)} sequences that share gain {gain:.2f}x, {gain / bound:.0%} of the "
        f"{bound:.2f}x by which L2 ({limits.l2_gbs:.0f} GB/s) is faster than memory "
        f"({memory_gbs:.1f})"
    )


def best_peer_lines(rows: Iterable[Row]) -> list[str]:
    """For each case and format kvcore beside the fastest peer, and beside itself in bf16."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.case, row.kv_format), []).append(row)
    lines = []
    for group in cases.values():
        others = [row for row in group if row.peer != "roof" and not row.peer.startswith("kvcore")]
        best = min(others, key=lambda row: row.times_kvcore, default=None)
        bf16 = next((row for row in group if row.peer == "kvcore-bf16"), None)
        if best or bf16:
            lines.append(_best_peer_line(group[0], best, bf16))
    head = f"  {'case':<38}{'kvcore':>8}  {'best peer':<14}{'':>8}{'x kvcore':>10}{'bf16 x':>8}"
    return ["kvcore and the best peer, each of the limit:", head, *lines] if lines else []


def _best_peer_line(own: Row, best: Row | None, bf16: Row | None) -> str:
    peer = f"{best.peer:<14}{best.share:>8.1%}{best.times_kvcore:>10.2f}" if best else f"{'':>32}"
    speedup = f"{bf16.times_kvcore:>8.2f}" if bf16 else f"{'':>8}"
    contended = any(row.contended for row in (own, best, bf16) if row)
    return (
        f"  {own.case:<18}{own.kv_format:<14}{own.regime or '':<6}{own.share:>8.1%}  "
        f"{peer}{speedup}{'  contended' * contended}"
    ).rstrip()


def control_lines(costs: Iterable[Cost]) -> list[str]:
    lines = [f"  {cost.python_us:>9.1f}{cost.c_us:>9.1f}  {cost.name}" for cost in costs]
    head = f"  {'Python':>9}{'C alone':>9}"
    return ["What a call costs in us, one thread:", head, *lines] if lines else []


def write_json(
    path: Path,
    *,
    hardware: Mapping[str, Any],
    num_threads: int,
    quick: bool,
    limits: Iterable[Limits],
    rows: Iterable[Row],
    costs: Iterable[Cost],
    absent: Mapping[str, str],
) -> None:
    """Writes all of a run; what it holds is described in README.md."""
    content = {
        "hardware": dict(hardware),
        "num_threads": num_threads,
        "quick": quick,
        "limits": [vars(x) for x in limits],
        "rows": [row.as_dict() for row in rows],
        "control": [cost.as_dict() for cost in costs],
        "absent": dict(absent),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
