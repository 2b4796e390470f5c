"""A picture of what the bits buy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcore.errors import InvalidArgument, MissingExtra
from kvcore.evaluation.results import Evaluation, Result

_COLORS = ("#1b6ca8", "#d1672c")


def draw(evaluation: Evaluation, path: str) -> None:
    """Writes a picture: divergence, and lost recall where it was tested, against bits.

    A line joins the cases that no other beats in both. Bits are those of a text of 32,768 tokens,
    raw rows included.

    Raises:
        MissingExtra, InvalidArgument: as `check`.
    """
    check(path)
    panels: list[tuple[str, Callable[[Result], float]]] = [("KL to the fp32 cache, nats", _kl)]
    if evaluation.recall_length:
        panels.append(("recall: extra nats on the second copy", _extra))
    figure = _figure_class()(figsize=(7.5 * len(panels), 6), layout="constrained")
    for i, (label, value) in enumerate(panels):
        _panel(figure.add_subplot(1, len(panels), i + 1), evaluation, label, value)
    figure.suptitle(
        f"{evaluation.model}, {len(evaluation.reference.texts)} texts of {evaluation.length} tokens"
    )
    figure.savefig(path, dpi=110)


def check(path: str) -> None:
    """Raises what `draw` would, before there is anything to draw.

    Raises:
        MissingExtra: matplotlib is not installed.
        InvalidArgument: `path` lies in no folder, or names no kind of picture.
    """
    kinds = _figure_class()().canvas.get_supported_filetypes()
    file = Path(path)
    if file.suffix[1:] not in kinds or not file.parent.is_dir():
        raise InvalidArgument(
            f"plot: expected a picture's file (.png, .svg, .pdf) in an existing folder, got {path}"
        )


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that none beats in both coordinates, least first coordinate first."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _panel(axes: Any, evaluation: Evaluation, label: str, value: Callable[[Result], float]) -> None:
    results = evaluation.results
    for has_raw, color in zip((False, True), _COLORS, strict=True):
        chosen = [r for r in results if r.case.has_raw_rows == has_raw]
        name = "with raw rows" if has_raw else "without raw rows"
        axes.plot(
            [_bits(r) for r in chosen], [value(r) for r in chosen], "o", color=color, label=name
        )
        for r in chosen:
            axes.annotate(
                r.case.name, (_bits(r), value(r)), (4, 4), textcoords="offset points", fontsize=7
            )
    front = pareto_front([(_bits(r), value(r)) for r in results])
    axes.plot(*zip(*front, strict=True), "-", color="0.5", linewidth=1, label="Pareto front")
    axes.set(yscale="log", xlabel="bits an element, in 32,768 tokens", ylabel=label)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend()


def _bits(result: Result) -> float:
    return result.sizes.bits_at_32k


def _kl(result: Result) -> float:
    return max(result.kl, _FLOOR["kl"])


def _extra(result: Result) -> float:
    assert result.recall is not None
    return max(result.recall.extra, _FLOOR["recall"])


# What is drawn for values at or below: a logarithmic axis has no zero, and less is noise.
_FLOOR = {"kl": 1e-7, "recall": 1e-3}


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra(
            'plot: expected matplotlib to be installed; run: pip install "kvcore[eval]"'
        ) from None
    return Figure
