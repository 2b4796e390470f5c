"""kernels/quantize.cu: the bytes and rows of the CPU, for every format, to the bit."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

import formats_reference as reference
import kvcore_gpu
from cuda_emulator.runtime import EmulatedRuntime
from kvcore import ops
from kvcore.formats import FORMATS, Format
from kvcore_gpu import compiler, sources
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.params import QuantizeParams
from support import BFLOAT16
from test_formats import channels, hard_rows, head_dims

ROWS_OF_A_BLOCK = 8
DTYPES = (np.float32, np.float16, BFLOAT16)
QUANTIZED = [name for name, format in FORMATS.items() if format.is_quantized]
FLOATS = [name for name, format in FORMATS.items() if not format.is_quantized]


# Every format at an odd multiple of what it asks for; small, other and large sizes of some.
COMMON = 192
CASES = [(name, COMMON) for name in QUANTIZED] + [
    ("int8", 16), ("int4", 32), ("fp8_e4m3", 48), ("int8_static", 80), ("rot8", 80),
    ("rot8", 1024), ("rot6", 64), ("rot4", 576), ("rot3", 64), ("rot2", 64), ("chan4", 576),
    ("chan2", 32),
]  # fmt: skip


def unit_rows(format: Format) -> int:
    return 32 if format.kind == "channel" else 1


def run(
    runtime: EmulatedRuntime,
    entry: str,
    name: str,
    head_dim: int,
    rows: np.ndarray,
    codes: np.ndarray,
    given: dict[str, np.ndarray],
) -> int:
    """Launches `entry` over dense rows and codes; what became of the flag."""
    format = FORMATS[name]
    kernel = Launcher(runtime).kernel(
        "quantize.cu", entry, QuantizeParams, K_FORMAT=format.index, HEAD_DIM=head_dim
    )
    params, flag = kernel.params, runtime.zeros((1,), np.int32)
    arrays = {"rows": rows, "codes": codes, "not_finite": flag, **given}
    for field, array in arrays.items():
        setattr(params, field, runtime.address(runtime.as_array(array, field)))
    params.num_rows = len(rows)
    params.dtype = [np.dtype(d) for d in DTYPES].index(rows.dtype)
    grouped = entry == "quantize" and format.kind == "channel"
    grid = len(rows) // 32 if grouped else -(-len(rows) // ROWS_OF_A_BLOCK)
    kernel.launch((grid, 1, 1), (128, 1, 1))
    return int(flag[0])


def quantized(
    runtime: EmulatedRuntime, name: str, rows: np.ndarray, given: dict[str, np.ndarray]
) -> tuple[np.ndarray, int]:
    format, head_dim = FORMATS[name], rows.shape[1]
    count, nbytes = len(rows) // unit_rows(format), unit_rows(format) * format.row_nbytes(head_dim)
    codes = runtime.empty((count, nbytes), np.uint8)
    return codes, run(runtime, "quantize", name, head_dim, rows, codes, given)


def dequantized(
    runtime: EmulatedRuntime,
    name: str,
    codes: np.ndarray,
    head_dim: int,
    dtype: object,
    given: dict[str, np.ndarray],
) -> np.ndarray:
    rows = runtime.empty((len(codes) * unit_rows(FORMATS[name]), head_dim), dtype)
    run(runtime, "dequantize", name, head_dim, rows, codes, given)
    return rows


def check(runtime: EmulatedRuntime, name: str, head_dim: int, with_bias: bool) -> None:
    rng = np.random.default_rng([head_dim, with_bias])
    given = channels(rng, name, head_dim, with_bias)
    if with_bias:
        given["bias"][::3] = 0
    count = 64 if FORMATS[name].kind == "channel" else 21
    rows = hard_rows(rng, count, head_dim)
    codes, flag = quantized(runtime, name, rows, given)
    np.testing.assert_array_equal(codes, ops.quantize(rows, name, **given))
    assert flag == 0
    plain = dequantized(runtime, name, codes, head_dim, np.float32, given)
    expected = ops.dequantize(codes, name, **given)
    np.testing.assert_array_equal(plain.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_bytes_and_rows_are_the_cpu_s(runtime: EmulatedRuntime, name: str, head_dim: int) -> None:
    check(runtime, name, head_dim, with_bias=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head_dim"), [(n, d) for n in QUANTIZED for d in head_dims(n)])
def test_every_head_dim(runtime: EmulatedRuntime, name: str, head_dim: int) -> None:
    check(runtime, name, head_dim, with_bias=False)


@pytest.mark.parametrize("name", QUANTIZED)
def test_with_a_bias_too(runtime: EmulatedRuntime, name: str) -> None:
    check(runtime, name, COMMON, with_bias=True)


def test_sums_are_in_the_order_that_the_page_says(runtime: EmulatedRuntime) -> None:
    """On rows, found by search, whose stored scale another order of the 16 lanes would change."""
    rows = np.stack(
        [np.random.default_rng(s).standard_normal(64, np.float32) for s in (24941, 63482, 125378)]
    )
    y = reference.times_power(rows, -reference.exponents(np.abs(rows).max(-1))[:, None])
    y = reference.walsh_hadamard(y * reference.signs(64))
    number, scale = reference._choose(y, 2)
    level = np.where((number == 1) | (number == 2), 38, 127).astype(np.float32)
    neighbours_first = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15]
    other = (np.abs(y) * level).reshape(-1, 4, 16)[..., neighbours_first].reshape(y.shape)
    other_scale = reference.sum16(other) / reference.sum16(level * level)
    assert (scale.astype(BFLOAT16) != other_scale.astype(BFLOAT16)).all()
    codes, _ = quantized(runtime, "rot2", rows, {})
    np.testing.assert_array_equal(codes, ops.quantize(rows, "rot2"))


@pytest.mark.parametrize("name", ["int8", "rot6", "chan4"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rows_of_16_bits(runtime: EmulatedRuntime, name: str, dtype: object) -> None:
    rng = np.random.default_rng(7)
    rows = np.clip(hard_rows(rng, 32, COMMON), -60000, 60000).astype(dtype)
    codes, flag = quantized(runtime, name, rows, {})
    np.testing.assert_array_equal(codes, ops.quantize(rows, name))
    assert flag == 0
    plain = dequantized(runtime, name, codes, COMMON, dtype, {})
    with np.errstate(over="ignore"):
        expected = ops.dequantize(codes, name).astype(dtype)
    np.testing.assert_array_equal(plain.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("name", ["fp8_e4m3", "rot4", "chan2"])
def test_what_is_not_finite_saturates_and_is_flagged(runtime: EmulatedRuntime, name: str) -> None:
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((32, COMMON)).astype(np.float32)
    tame = rows.copy()
    for at, value, instead in [(3, np.nan, 0), (9, np.inf, 65504), (40, -np.inf, -65504)]:
        rows[5, at], tame[5, at] = value, instead
    codes, flag = quantized(runtime, name, rows, {})
    np.testing.assert_array_equal(codes, ops.quantize(tame, name))
    assert flag == 1


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("head_dim", [8, 136])
def test_floats_are_converted_as_on_the_cpu(
    runtime: EmulatedRuntime, name: str, head_dim: int
) -> None:
    """All 16-bit patterns, NaN of every payload among them, and their neighbours in float32."""
    bits = np.arange(0, 2**32, 0xABCD1, dtype=np.uint32)
    singles = bits[: len(bits) // head_dim * head_dim].view(np.float32).reshape(-1, head_dim)
    for dtype in DTYPES:
        rows = singles[:11]
        if dtype is not np.float32:
            halves = np.arange(0, 2**16, 7, dtype=np.uint16)
            rows = halves[: 11 * head_dim].view(dtype).reshape(11, head_dim)
        rows = np.concatenate([rows, rows[:2]])
        codes = runtime.empty(rows.shape, FORMATS[name].storage_dtype)
        run(runtime, "quantize", name, head_dim, rows, codes, {})
        expected = ops.quantize(rows, name)
        assert codes.tobytes() == expected.tobytes()
        plain = runtime.empty(rows.shape, np.float32)
        run(runtime, "dequantize", name, head_dim, plain, codes, {})
        assert plain.tobytes() == ops.dequantize(codes, name).tobytes()


@pytest.mark.parametrize("name", ["int4", "rot3", "chan2"])
def test_no_races_in_any_order(checked: EmulatedRuntime, name: str) -> None:
    check(checked, name, 64, with_bias=False)


def test_nothing_is_fused_where_bytes_are_compared() -> None:
    kernels = files(kvcore_gpu).joinpath("kernels")
    names = [file.name for file in kernels.iterdir() if file.name.endswith(".cu")]
    exact = {
        name for name in names if {"metadata.cuh", "dequantize_row.cuh"} & {*sources.collect(name)}
    }
    assert exact == compiler.UNFUSED
    for name in exact:
        assert "--fmad=false" in compiler._options(name, {}, "sm_90")
