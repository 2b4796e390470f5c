"""kernels/formats.cuh: codes to pairs of 16-bit floats, against docs/formats.md in NumPy."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import formats_reference as reference
from cuda_emulator.runtime import EmulatedRuntime
from kvcore.formats import FORMATS
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.params import Params
from support import BFLOAT16

SOURCE = Path(__file__).parent / "kernels" / "levels.cu"
NUM_ROWS = 3
POINTERS = ("rows", "other_rows", "f16", "bf16", "of_both")
# 192 has whole units and the half of one; 64 only the half. From sm_89 on fp8_e4m3 has instructions
# of its own.
CASES = [
    *((name, 192, {}) for name in reference.FORMATS),
    ("rot3", 64, {}),
    ("fp8_e4m3", 192, {"KV_EMULATE_SM_80": 1}),
]


class LevelsParams(Params):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("num_rows", ctypes.c_int32),
    ]


def encoded(rng: np.random.Generator, name: str, head_dim: int) -> np.ndarray:
    tokens = 32 if name in reference.CHANNEL_FORMATS else 1
    size = tokens * FORMATS[name].code_nbytes(head_dim)
    codes = rng.integers(0, 256, (NUM_ROWS, size), dtype=np.uint8)
    if name == "fp8_e4m3":
        codes[codes & 0x7F == 0x7F] ^= 1  # NaN, which is never stored
    return codes


def levels(name: str, codes: np.ndarray, head_dim: int) -> np.ndarray:
    tokens = 32 if name in reference.CHANNEL_FORMATS else 1
    metadata = np.zeros((NUM_ROWS, tokens * FORMATS[name].metadata_nbytes(head_dim)), np.uint8)
    return reference.levels(name, np.concatenate([codes, metadata], axis=1), head_dim)


@pytest.mark.parametrize(("name", "head_dim", "macros"), CASES)
def test_levels_are_exact(name: str, head_dim: int, macros: dict[str, int]) -> None:
    rng = np.random.default_rng(head_dim)
    runtime = EmulatedRuntime(changed={"levels.cu": SOURCE.read_text()})
    rows, other = (encoded(rng, name, head_dim) for _ in range(2))
    tokens = 32 if name in reference.CHANNEL_FORMATS else 1
    f16, bf16 = (runtime.empty((NUM_ROWS * tokens, head_dim), np.uint16) for _ in range(2))
    both = runtime.empty((NUM_ROWS, head_dim, 2), np.uint16)
    macros = {"K_FORMAT": FORMATS[name].index, "HEAD_DIM": head_dim, **macros}
    kernel = Launcher(runtime).kernel("levels.cu", "decode_levels", LevelsParams, **macros)
    for field, array in zip(POINTERS, (rows, other, f16, bf16, both), strict=True):
        setattr(kernel.params, field, runtime.address(runtime.as_array(array, field)))
    kernel.params.num_rows = NUM_ROWS
    kernel.launch((NUM_ROWS, 1, 1), (128, 1, 1))

    expected = levels(name, rows, head_dim)
    np.testing.assert_array_equal(f16.view(np.float16).astype(float), expected)
    np.testing.assert_array_equal(bf16.view(BFLOAT16).astype(float), expected)
    if tokens == 1:
        pairs = both.view(BFLOAT16).astype(float)
        np.testing.assert_array_equal(pairs[..., 0], expected)
        np.testing.assert_array_equal(pairs[..., 1], levels(name, other, head_dim))
