"""Pictures of the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.curves import DEGREES, Curve

COLORS = {"fp32": "#1b6ca8", "fp16": "#d1672c", "bf16": "#3d8b4f"}
MORE_COLORS = ("#8e4585", "#b8860b", "#5f6a6a", "#c0392b", "#2e86ab")
X_LABELS = {"decode": "tokens in the cache", "prefill": "new tokens"}
TITLES = {
    "decode": "A decode step beside reading its K and V from memory",
    "prefill": "A prefill beside its multiply-adds in float32",
}


def draw(
    curves: Sequence[Curve], hardware: Mapping[str, Any], num_threads: int, path: Path
) -> Path:
    """Writes one picture of curves of one kind, each beside its floor; returns `path`."""
    kind = curves[0].kind
    figure, axes = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    floors = set()
    spare = cycle(MORE_COLORS)
    for curve in curves:
        color = COLORS.get(curve.kv_format) or next(spare)
        tokens = np.array([point.tokens for point in curve.points])
        axes.plot(
            tokens,
            [point.ms for point in curve.points],
            "o",
            color=color,
            label=f"{curve.kv_format}, R² {curve.r_squared:.4f}",
        )
        along = np.geomspace(tokens[0], tokens[-1], 200)
        axes.plot(along, curve.fitted(along), "-", color=color, linewidth=1)
        floor = tuple(point.floor_ms for point in curve.points)
        if kind == "decode" or not floors:  # a prefill's flops are the same in every format
            axes.plot(tokens, floor, "--", color=color if kind == "decode" else "0.4", linewidth=1)
        floors.add(floor)
    axes.set(yscale="log", xlabel=X_LABELS[kind], ylabel="ms", title=TITLES[kind])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(title=f"dots: measured; lines: degree {DEGREES[kind]}; dashed: the floor")
    figure.supxlabel(_caption(curves, hardware, num_threads), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _caption(curves: Sequence[Curve], hardware: Mapping[str, Any], num_threads: int) -> str:
    first = curves[0]
    limits = ", ".join(f"{curve.limit:.4g}" for curve in curves)
    return (
        f"One sequence, {first.num_heads} query and {first.num_kv_heads} KV heads of "
        f"{first.head_dim}; {hardware['cpu']}, {hardware['isa']}, {num_threads} threads.\n"
        "Times are ratios to the limit measured in the same rounds, at its median: "
        f"{limits} {first.unit}."
    )
