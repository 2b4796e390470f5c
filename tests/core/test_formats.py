"""Encoding writes the same bytes on every ISA: those of NumPy and ml_dtypes."""

from __future__ import annotations

import ctypes as ct

import ml_dtypes
import numpy as np
import pytest

from core.library import (
    DTYPES,
    FORMATS,
    ISAS,
    NOT_FINITE,
    NULL,
    OK,
    VALUE,
    address,
    lib,
    machine,
)

HALVES = np.arange(1 << 16, dtype=np.uint16)


def convert(function, array: np.ndarray, source: int, target: int, dtype) -> np.ndarray:
    """Runs kv_quantize or kv_dequantize over rows of 8."""
    out = np.empty(array.shape, dtype)
    if function is lib.kv_quantize:
        status = function(
            array.ctypes.data, source, target, array.size // 8, 8, None, out.ctypes.data
        )
    else:
        status = function(
            array.ctypes.data, source, array.size // 8, 8, None, target, out.ctypes.data
        )
    assert status == OK
    return out


def encode(array: np.ndarray, fmt: str) -> np.ndarray:
    dtype = DTYPES[fmt]
    source = next(FORMATS[n] for n, d in DTYPES.items() if d == array.dtype)
    return convert(lib.kv_quantize, array, source, FORMATS[fmt], dtype)


def hard_floats() -> np.ndarray:
    """Every half and its neighbours in float32, midpoints between halves, and random bits."""
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)]
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = HALVES.view(dtype).astype(np.float32)
        bits = values.view(np.uint32)
        parts += [values, (bits + 1).view(np.float32), (bits - 1).view(np.float32)]
        step = np.uint32(1 << 12 if dtype is np.float16 else 1 << 15)
        parts += [(bits + step + d).view(np.float32) for d in (np.uint32(0), np.uint32(1))]
        parts += [(bits + step - np.uint32(1)).view(np.float32)]
    tiny = (np.arange(1 << 12, dtype=np.float32) / 8 * 2.0**-25).astype(np.float32)
    return np.concatenate([*parts, tiny, -tiny])


def same_but_nan(a: np.ndarray, b: np.ndarray) -> None:
    nan = np.isnan(a.astype(np.float32))
    assert (nan == np.isnan(b.astype(np.float32))).all()
    assert a[~nan].tobytes() == b[~nan].tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_encodes_to_nearest_even(isa: str, fmt: str) -> None:
    x = hard_floats()
    with machine(isa), np.errstate(all="ignore"):
        same_but_nan(encode(x, fmt), x.astype(DTYPES[fmt]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_decodes_exactly(isa: str, fmt: str) -> None:
    codes = HALVES.view(DTYPES[fmt])
    with machine(isa), np.errstate(all="ignore"):
        out = convert(lib.kv_dequantize, codes, FORMATS[fmt], 0, np.float32)
        same_but_nan(out, codes.astype(np.float32))


@pytest.mark.parametrize("source", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("target", ["fp32", "fp16", "bf16"])
def test_isas_write_the_same_bytes(source: str, target: str) -> None:
    x = hard_floats() if source == "fp32" else HALVES.view(DTYPES[source])
    results = []
    for isa in ISAS:
        with machine(isa):
            results.append(encode(x, target).tobytes())
    assert len(set(results)) == 1
    if source == target:
        assert results[0] == x.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_is_quiet_and_keeps_its_upper_bits(isa: str) -> None:
    x = np.array([0x7F800001, 0xFFA12345, 0x7FC00000, 0xFF802000] * 2, np.uint32).view(np.float32)
    with machine(isa):
        assert encode(x, "fp16").view(np.uint16)[:4].tolist() == [0x7E00, 0xFF09, 0x7E00, 0xFE01]
        assert encode(x, "bf16").view(np.uint16)[:4].tolist() == [0x7FC0, 0xFFE1, 0x7FC0, 0xFFC0]


class Channels(ct.Structure):
    _fields_ = (("bias", ct.c_void_p), ("scales", ct.c_void_p))


def test_rejects_channels_that_a_format_does_not_have() -> None:
    x, good = np.ones((32, 64), np.float32), np.ones(64, np.float32)
    data, bad = np.zeros(32 * 64 * 5, np.uint8), good.copy()
    int8, static, rot3, chan4 = 3, 6, 10, 12
    bad[63] = np.nan

    def status(fmt: int, bias: np.ndarray | None, scales: np.ndarray | None, rows: int = 32) -> int:
        given = ct.byref(Channels(address(bias), address(scales)))
        found = lib.kv_quantize(x.ctypes.data, 0, fmt, rows, 64, given, data.ctypes.data)
        back = np.empty_like(x)
        also = lib.kv_dequantize(data.ctypes.data, fmt, rows, 64, given, 0, back.ctypes.data)
        assert found == also
        return found

    assert status(int8, good, None) == status(static, good, good) == status(chan4, None, None) == OK
    assert status(int8, bad, None) == status(static, None, bad) == VALUE
    assert status(static, None, 0 * good) == status(static, None, -good) == VALUE
    assert status(int8, None, good) == status(0, good, None) == VALUE
    assert status(chan4, None, None, rows=33) == VALUE
    assert status(static, None, None) == NULL
    for fmt in sorted(set(range(3, 14)) - {static}):
        assert status(fmt, None, None) == OK
        written = data.tobytes()
        assert lib.kv_quantize(x.ctypes.data, 0, fmt, 32, 64, None, data.ctypes.data) == OK
        assert data.tobytes() == written
    assert lib.kv_quantize(x.ctypes.data, 0, rot3, 20, 96, None, data.ctypes.data) == VALUE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_writes_nothing_when_a_row_is_not_finite(isa: str, dtype: str) -> None:
    for place in (0, 1000, 32 * 64 - 1):
        x = np.ones(32 * 64, DTYPES[dtype])
        data = np.full(32 * 64 * 5, 7, np.uint8)
        for value in (np.inf, -np.inf, np.nan):
            x[place] = value
            with machine(isa):
                given = (FORMATS[dtype], 3, 32, 64, None, data.ctypes.data)
                assert lib.kv_quantize(x.ctypes.data, *given) == NOT_FINITE
            assert (data == 7).all()


def test_rejects_bad_arguments() -> None:
    x = np.zeros(16, np.float32)
    p = x.ctypes.data
    for dtype, fmt, rows, dim in [
        (3, 0, 1, 8),
        (-1, 0, 1, 8),
        (0, 14, 1, 8),
        (0, 0, -1, 8),
        (0, 0, 1, 7),
        (0, 0, 1, 0),
        (0, 0, 1, 1032),
    ]:
        assert lib.kv_quantize(p, dtype, fmt, rows, dim, None, p) == VALUE
        assert lib.kv_dequantize(p, fmt, rows, dim, None, dtype, p) == VALUE
