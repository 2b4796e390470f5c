"""Results as a table for people and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.control import Cost
from bench.roof import Limits
from bench.suite import Row

HEADER = (
    f"  {'peer':<10}{'ms':>10}{'p10':>10}{'GB/s':>9}{'GFLOP/s':>9}{'floor ms':>10}{'of limit':>10}"
    f"{'x kvcore':>10}  {'steps':>5}"
)


def machine_lines(hardware: Mapping[str, Any], limits: Iterable[Limits], threads: int) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in hardware["versions"].items())
    lines = [
        f"{hardware['cpu']}, {hardware['cpus']} CPUs, L3 {hardware['l3_bytes'] >> 20} MiB; "
        f"{hardware['isa']} kernels, {threads} threads",
        versions,
    ]
    lines += [
        f"limit of {x.num_threads} thread{'s' * (x.num_threads > 1)}: reads {x.read_gbs:.1f} GB/s, "
        f"{x.fma_gflops:.0f} GFLOP/s of float32 fma"
        for x in limits
    ]
    return lines


def case_lines(case: Case, kv_format: str, rows: list[Row]) -> list[str]:
    what = "writes" if case.kind == "append" else "reads"
    lines = [
        f"{case.name}, {kv_format}: {case.description}; "
        f"{what} {case.kv_bytes(kv_format) / 1e6:.3g} MB"
        + (f", {case.flops / 1e9:.3g} GFLOP" if case.kind == "prefill" else ""),
        HEADER,
    ]
    return lines + [_row_line(row) for row in rows]


def _row_line(row: Row) -> str:
    gflops = "" if row.gflops is None else f"{row.gflops:.1f}"
    gbs = "" if gflops else f"{row.gbs:.1f}"
    share = "" if row.peer == "roof" else f"{row.share:.1%}"
    times = "" if row.peer == "kvcore" else f"{row.times_kvcore:.2f}"
    notes = "  contended" if row.contended else ""
    return (
        f"  {row.peer:<10}{row.ms:>10.4g}{row.ms_p10:>10.4g}{gbs:>9}{gflops:>9}"
        f"{row.floor_ms:>10.4g}{share:>10}{times:>10}  {row.steps:>5}{notes}"
    )


def control_lines(costs: Iterable[Cost]) -> list[str]:
    return ["What a call costs, Python included, one thread:"] + [
        f"  {cost.us:>9.1f} us  {cost.name}" for cost in costs
    ]


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
