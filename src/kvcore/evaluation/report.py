"""The table that people read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcore.evaluation.results import Evaluation, Result

# The first columns hold names; the others numbers.
_NAMES = 2


def table(evaluation: Evaluation) -> list[str]:
    """A Markdown table, aligned: the float32 cache, then each case."""
    columns = _columns(evaluation)
    rows = [[name for name, _ in columns]]
    for result in (evaluation.reference, *evaluation.results):
        rows.append([render(result) for _, render in columns])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in rows]
    rules = [
        "-" * width if i < _NAMES else "-" * (width - 1) + ":" for i, width in enumerate(widths)
    ]
    return [lines[0], "| " + " | ".join(rules) + " |", *lines[1:]]


def summary(evaluation: Evaluation) -> list[str]:
    """What was measured, and what the columns are."""
    e = evaluation
    texts = ", ".join(f"{name} {text.perplexity:.2f}" for name, text in e.reference.texts.items())
    lines = [
        f"{e.model}: {len(e.reference.texts)} texts of {e.length:,} tokens in steps of {e.chunk}, "
        f"{e.device}.",
        f"float32 perplexity: {texts}.",
        "bits: of an element; at a length: with the blocks of raw rows. < bf16 from: tokens.",
        "ppl, KL (nats), top-1: against the float32 cache. error: relative, of attention's output "
        "with the same q, k, v:",
        "mean, mean of the worst layer, largest of any head and token. tok/s: decoding one text.",
    ]
    if e.reference.recall is not None:
        lines.append(
            f"recall: extra nats and top-1 on the second copy of {e.recall_length} tokens in "
            f"random order (float32: {e.reference.recall.nll:.2f} nats)."
        )
    return lines


def _columns(evaluation: Evaluation) -> list[tuple[str, Callable[[Result], str]]]:
    columns: list[tuple[str, Callable[[Result], str]]] = [
        ("K/V", lambda r: r.case.name),
        ("raw", lambda r: f"{r.case.raw_first}+{r.case.raw_last}" if r.case.has_raw_rows else "-"),
        ("bits", lambda r: f"{r.sizes.bits_per_element:.2f}"),
        (f"at {_short(evaluation.length)}", lambda r: f"{r.sizes.bits_at_length:.2f}"),
        ("at 32k", lambda r: f"{r.sizes.bits_at_32k:.2f}"),
        ("B/token", lambda r: f"{r.sizes.bytes_per_token}"),
        ("< bf16 from", lambda r: _or_dash(r.sizes.break_even_length)),
        ("ppl", lambda r: f"{r.perplexity:.2f}"),
        ("change %", lambda r: f"{r.perplexity_change:+.2f} ± {r.perplexity_change_error:.2f}"),
        ("KL", lambda r: f"{r.kl:.6f}"),
        ("top-1 %", lambda r: f"{r.agreement:.1f}"),
    ]
    if evaluation.recall_length:
        columns.append(("recall", _recall))
    return [
        *columns,
        ("error", lambda r: f"{sum(r.error_mean) / len(r.error_mean):.4f}"),
        ("layer", lambda r: f"{max(r.error_mean):.4f}"),
        ("largest", lambda r: f"{max(r.error_largest):.2f}"),
        ("tok/s", lambda r: f"{r.tokens_per_second:.1f}"),
    ]


def _recall(result: Result) -> str:
    assert result.recall is not None
    return f"{result.recall.extra:+.3f} / {result.recall.hits:.0f}%"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = zip(row, widths, strict=True)
    return [
        cell.ljust(width) if i < _NAMES else cell.rjust(width)
        for i, (cell, width) in enumerate(cells)
    ]
