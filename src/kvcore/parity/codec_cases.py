"""Cases of `quantize` and `dequantize`: bytes and bits are the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.formats import get_format
from kvcore.parity.array_case import ArrayCase, judge
from kvcore.parity.found import Found
from kvcore.parity.subject import REFERENCE, Subject

Channels = NDArray[np.float32] | None


def codec_case(format: str, head_dim: int) -> ArrayCase:
    """Rows of all magnitudes, encoded and decoded."""

    def attempt(subject: Subject) -> Found:
        rows = _rows(head_dim)
        channels = _channels(format, head_dim)
        first, again = (_through(subject, rows, format, channels) for _ in range(2))
        with REFERENCE.active():
            expected = _through(REFERENCE, rows, format, channels)
        return judge(first, again, stored=(first, expected))

    return ArrayCase(f"quantize/{format}-{head_dim}", attempt)


def _rows(head_dim: int) -> NDArray[np.float32]:
    """[2, 96, D]: zeros, an outlier, denormals, huge ones, ties, and channels of another mean."""
    rng = np.random.default_rng(head_dim)
    rows = rng.standard_normal((2, 96, head_dim), np.float32)
    rows[0, 0] = 0
    rows[0, 1, 5] = 1000
    rows[0, 32:40] *= np.float32(1e-42)
    rows[0, 40:48] *= np.float32(1e30)
    rows[1, 32:64] = np.round(rows[1, 32:64] * 4) / 4
    rows[1, 64:, : head_dim // 2] += 5
    return rows


def _channels(format: str, head_dim: int) -> tuple[Channels, Channels]:
    """Scales for int8_static, and for rows of 128 a bias, where the format takes one."""
    rng = np.random.default_rng(0)
    scales = bias = None
    if format == "int8_static":
        scales = rng.uniform(0.01, 0.05, head_dim).astype(np.float32)
    if get_format(format).is_quantized and head_dim == 128:
        bias = rng.standard_normal(head_dim, np.float32)
    return scales, bias


def _through(
    subject: Subject, rows: NDArray[Any], format: str, channels: tuple[Channels, Channels]
) -> list[NDArray[Any]]:
    """The code of `rows`, and what it decodes to."""
    code = subject.operations.quantize(subject.array(rows), format, *channels)
    decoded = subject.operations.dequantize(code, format, *channels)
    return [subject.host(code), subject.host(decoded)]
