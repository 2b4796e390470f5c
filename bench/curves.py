"""python -m bench curves: how the time of a decode step and of a prefill grows with the context."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvcore
from bench.arguments import names, positive
from bench.cases import Case, decode
from bench.formats import FLOATS, parse
from bench.machine import affinity, describe
from bench.roof import Roof
from bench.suite import Row, Settings, run_case

DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "images"
#: Tokens in the cache at a decode step; new tokens of a prefill.
SIZES = {
    "decode": [1024 * n for n in (1, 2, 4, 8, 16, 32, 64, 96, 128)],
    "prefill": [512 * n for n in (1, 2, 4, 8, 12, 16, 24, 32)],
}
#: The power of the number of tokens that the time grows with.
DEGREES = {"decode": 1, "prefill": 2}
#: A prefill of 16k tokens by 32 heads takes seven seconds and more; fewer show the same shape.
HEADS = {"decode": (32, 8), "prefill": (4, 1)}


@dataclass(frozen=True)
class Point:
    """One number of tokens.

    Attributes:
        floor_ms: reading the cache, or doing the flops, at the curve's median limit.
        ms: the step's time over what the limit took in the same rounds, times floor_ms: the time
            at a limit that does not drift.
    """

    tokens: int
    ms: float
    floor_ms: float
    contended: bool


@dataclass(frozen=True)
class Curve:
    """A kind in a format.

    Attributes:
        coefficients: of the fitted polynomial, from the constant up, in ms.
        r_squared: what part of the variance of `ms` the polynomial explains.
        limit: the median limit of the points, GB/s for a decode and GFLOP/s for a prefill.
    """

    kind: str
    kv_format: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    points: list[Point]
    coefficients: list[float]
    r_squared: float
    limit: float

    @property
    def unit(self) -> str:
        """Of `limit`."""
        return "GB/s" if self.kind == "decode" else "GFLOP/s"

    def fitted(self, tokens: np.ndarray) -> np.ndarray:
        """ms of the polynomial."""
        values: np.ndarray = np.polynomial.Polynomial(self.coefficients)(tokens)
        return values


def fit(tokens: Sequence[int], ms: Sequence[float], degree: int) -> tuple[list[float], float]:
    """Coefficients of a polynomial, from the constant up, and R squared.

    Least squares in which a residual's variance may grow with the time, or the largest sizes alone
    would decide; R squared is that of ms as they are.
    """
    x, y = np.asarray(tokens, float), np.asarray(ms)
    polynomial = np.polynomial.Polynomial.fit(x, y, degree, w=1.0 / np.sqrt(y))
    unexplained = np.square(y - polynomial(x)).sum() / np.square(y - y.mean()).sum()
    return polynomial.convert().coef.tolist(), float(1.0 - unexplained)


def measure_curve(
    kind: str, kv_format: str, sizes: Sequence[int], roof: Roof, settings: Settings
) -> Curve:
    """Measures kvcore alone at each size, beside the machine's limit."""
    cases = [_case(kind, size) for size in sizes]
    rows = [run_case(case, kv_format, {}, roof, settings).rows[0] for case in cases]
    work = [case.kv_bytes(kv_format) if kind == "decode" else case.flops for case in cases]
    limit = float(np.median([w / row.floor_ms for w, row in zip(work, rows, strict=True)])) / 1e6
    points = [
        _point(size, row, w / limit / 1e6) for size, row, w in zip(sizes, rows, work, strict=True)
    ]
    coefficients, r_squared = fit(sizes, [point.ms for point in points], DEGREES[kind])
    num_heads, num_kv_heads = HEADS[kind]
    return Curve(
        kind,
        kv_format,
        num_heads,
        num_kv_heads,
        cases[0].head_dim,
        points,
        coefficients,
        r_squared,
        limit,
    )


def _case(kind: str, size: int) -> Case:
    num_heads, num_kv_heads = HEADS[kind]
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    if kind == "decode":
        return decode(f"decode-{size}", [size], **heads)
    return Case(f"prefill-{size}", "prefill", (0,), (size,), **heads)


def _point(tokens: int, row: Row, floor_ms: float) -> Point:
    return Point(tokens, floor_ms / row.share, floor_ms, row.contended)


def lines(curve: Curve) -> list[str]:
    """A table for people."""
    head = (
        f"{curve.kind}, {curve.kv_format}: R^2 {curve.r_squared:.5f} of a polynomial of degree "
        f"{DEGREES[curve.kind]}; times at {curve.limit:.4g} {curve.unit}"
    )
    return [head, f"  {'tokens':>8}{'ms':>10}{'floor ms':>10}{'of limit':>10}"] + [
        f"  {p.tokens:>8}{p.ms:>10.4g}{p.floor_ms:>10.4g}{p.floor_ms / p.ms:>10.1%}"
        + ("  contended" if p.contended else "")
        for p in curve.points
    ]


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    drawing = _drawing()
    affinity()  # looks once, before any thread is pinned
    num_threads = arguments.threads or kvcore.get_num_threads()
    settings = Settings.full(num_threads, arguments.seconds)
    roof, hardware = Roof(num_threads), describe()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for kind in arguments.kinds:
        sizes = [size for size in SIZES[kind] if size <= arguments.longest]
        curves = []
        for kv_format in arguments.formats:
            curves.append(measure_curve(kind, kv_format, sizes, roof, settings))
            print("\n".join(lines(curves[-1])), end="\n\n", flush=True)
        content = {"hardware": hardware, "num_threads": num_threads}
        content["curves"] = [asdict(curve) for curve in curves]
        path = arguments.out / f"{kind}_time.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        picture = drawing.draw(curves, hardware, num_threads, path.with_suffix(".png"))
        print(f"written: {path}, {picture}")
    return 0


def _drawing() -> Any:
    try:
        from bench import drawing
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error.name} is not installed: pip install ".[bench]"') from None
    return drawing


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench curves", description=__doc__)
    parser.add_argument("--kinds", type=names(SIZES), default=list(SIZES))
    parser.add_argument("--formats", type=parse, default=list(FLOATS))
    parser.add_argument("--longest", type=positive, default=1 << 30, metavar="TOKENS")
    parser.add_argument("--threads", type=positive, help="default: what kvcore would use")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each point (1)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="a folder (docs/images)")
    return parser.parse_args(argv)
