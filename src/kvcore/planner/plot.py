"""Pictures of a plan: growth, roofline and strategies."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path
from typing import Any

from kvcore.errors import InvalidArgument, MissingExtra
from kvcore.planner.answers import Plan
from kvcore.planner.cost import Cost, decode_attention
from kvcore.planner.device import GIB

_COLORS = ("#1b6ca8", "#d1672c", "#3a8f5c", "#8a5aa8")
#: Formats whose decode attention is drawn on the roofline.
_ROOFLINE_FORMATS = ("bf16", "rot8", "rot4")


def draw(plan: Plan, path: str) -> None:
    """Writes the three panels into one picture.

    Raises:
        MissingExtra: matplotlib is not installed.
        InvalidArgument: `path` lies in no folder, or names no kind of picture.
    """
    check(path)
    figure = _figure_class()(figsize=(9, 15), layout="constrained")
    for i, panel in enumerate((growth, roofline, strategies)):
        panel(figure.add_subplot(3, 1, i + 1), plan)
    figure.savefig(path, dpi=110)


def check(path: str) -> None:
    """Raises what `draw` would, before there is anything to draw."""
    kinds = _figure_class()().canvas.get_supported_filetypes()
    file = Path(path)
    if file.suffix[1:] not in kinds or not file.parent.is_dir():
        raise InvalidArgument(
            f"plot: expected a picture's file (.png, .svg, .pdf) in an existing folder, got {path}"
        )


def svg(plan: Plan, title: str) -> str:
    """A panel of PANELS as SVG for a page: text stays text, readable on a phone."""
    figure_class = _figure_class()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvcore"}):
        # Little wider than a phone, so that text shrinks little there.
        figure = figure_class(figsize=(4.6, _HEIGHTS[title]), layout="constrained")
        PANELS[title](figure.add_subplot(), plan)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def growth(axes: Any, plan: Plan) -> None:
    """Bytes of the cache over the context, and what the device has room for."""
    table = plan.growth
    for batch, row, color in zip(table.batches, table.nbytes, _COLORS, strict=False):
        sizes = [nbytes / GIB for nbytes in row]
        axes.plot(table.lengths, sizes, "o-", color=color, label=_sequences(batch))
    if plan.room:
        axes.axhline(plan.room / GIB, color="0.3", linestyle="--", label="room beside the weights")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="tokens of a sequence", ylabel="GiB of KV cache")
    axes.set_title(f"{plan.model.name} on {plan.device.name}: growth")
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend()


def roofline(axes: Any, plan: Plan) -> None:
    """Flops a second that the device allows at an intensity, and where the parts of steps lie."""
    device = plan.device
    points = _points(plan)
    least = min(0.25, *(cost.intensity for _, cost in points)) / 2
    most = max(4 * device.ridge, *(2 * cost.intensity for _, cost in points))
    ridge = [least, device.ridge, most]
    rates = [min(x * device.bandwidth, device.fp16_flops) for x in ridge]
    axes.plot(ridge, rates, "-", color="0.3", label=f"{device.name}, ridge {device.ridge:.0f}")
    for (name, cost), (color, marker) in zip(points, product(_COLORS, "os"), strict=False):
        rate = min(cost.intensity * device.bandwidth, device.fp16_flops)
        axes.plot([cost.intensity], [rate], marker, color=color, label=name, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="flops a second")
    axes.set_title("Roofline")
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(fontsize=8)


def strategies(axes: Any, plan: Plan) -> None:
    """Bytes of the same texts by other means."""
    rows = sorted(plan.strategies, key=lambda row: -row.nbytes)
    kinds = list(dict.fromkeys(row.kind for row in plan.strategies))
    colors = dict(zip(kinds, (*_COLORS, "#777777", "#b8a030"), strict=False))
    for kind in kinds:
        chosen = [(i, row) for i, row in enumerate(rows) if row.kind == kind]
        axes.barh(
            [i for i, _ in chosen],
            [row.nbytes / GIB for _, row in chosen],
            color=colors[kind],
            label=kind,
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes.set(xscale="log", xlabel=f"GiB of KV cache, {plan.batch} x {plan.context} tokens")
    axes.set_title("Other means")
    axes.grid(True, axis="x", which="major", linewidth=0.3)
    axes.legend(fontsize=8)


PANELS = {"Growth": growth, "Roofline": roofline, "Strategies": strategies}
_HEIGHTS = {"Growth": 3.6, "Roofline": 4.2, "Strategies": 7.0}


def _points(plan: Plan) -> list[tuple[str, Cost]]:
    model = plan.model
    points = [
        ("decode, weights", plan.decode.weights),
        ("decode, attention", plan.decode.attention),
        ("prefill, weights", plan.prefill.weights),
        ("prefill, attention", plan.prefill.attention),
    ]
    for name in _ROOFLINE_FORMATS:
        try:
            spec = model.cache_spec(name)
        except InvalidArgument:
            continue  # the format does not take this head_dim
        cost = decode_attention(model, spec, plan.context, plan.batch)
        points.append((f"decode, attention in {name}", cost))
    return points


def _sequences(count: int) -> str:
    return "1 sequence" if count == 1 else f"{count:,} sequences"


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra(
            'plot: expected matplotlib to be installed; run: pip install "kvcore[plan]"'
        ) from None
    return Figure
