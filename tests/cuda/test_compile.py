"""What the kernels take of a multiprocessor, as NVRTC's assembler reports it: no spills, no stack,
and no more registers and shared memory than stated here. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from kvcore import formats
from kvcore.errors import BackendUnavailable
from kvcore_gpu import compiler, nvrtc
from kvcore_gpu import decode as attend_few
from kvcore_gpu import prefill as attend_many
from kvcore_gpu import simt as attend_alone

RECOMMENDED = [
    ("bf16", "bf16"), ("fp16", "fp16"), ("rot8", "rot8"), ("chan4", "rot4"), ("rot6", "rot4"),
    ("fp8_e4m3", "fp8_e4m3"),
]  # fmt: skip
SHARED_PER_BLOCK = 227 * 1024  # of sm_90
NUMBERS = {name: number for number, name in enumerate(formats.FORMATS)}
FOR_KEYS_ONLY = {name for name, format in formats.FORMATS.items() if format.kind == "channel"}


@dataclass(frozen=True)
class Case:
    """A specialisation of a source.

    Attributes:
        ceilings: of each of its kernels, the most registers that a thread may take, and bytes of
            static shared memory that a block may.
    """

    source: str
    ceilings: dict[str, tuple[int, int]]
    defines: dict[str, int] = field(default_factory=dict)
    arch: str = "sm_90"

    def __str__(self) -> str:
        values = (f"{name}={value}" for name, value in self.defines.items())
        return "-".join([self.source, *values, self.arch])


# ---- one function a source: its cases for a pair of formats and a head_dim


def copy_blocks(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    for format in {k_format: 0, v_format: 0}:
        defines = {"BLOCK_FORMAT": NUMBERS[format], "HEAD_DIM": head_dim}
        yield Case("copy_blocks.cu", {"copy_blocks": (32, 0)}, defines)


def append(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    defines = {
        "K_FORMAT": NUMBERS[k_format], "V_FORMAT": NUMBERS[v_format],
        "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim,
    }  # fmt: skip
    # A lane has a channel's 32 tokens; of chan2 two channels' codes besides.
    ceilings = {"append": (row_registers(head_dim), stage_bytes(head_dim)), "seal": (208, 0)}
    yield Case("append.cu", ceilings, defines)


def read(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    for format in {k_format: 0, v_format: 0}:
        defines = {"K_FORMAT": NUMBERS[format], "HEAD_DIM": head_dim}
        ceiling = (96, stage_bytes(head_dim))
        yield Case("read.cu", {"read": ceiling, "restore_raw": ceiling}, defines)


def quantize(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    for format in {k_format: 0, v_format: 0}:
        defines = {"K_FORMAT": NUMBERS[format], "HEAD_DIM": head_dim}
        shared = stage_bytes(head_dim)
        channels = formats.FORMATS[format].kind == "channel"
        registers = 208 if channels else row_registers(head_dim)
        ceilings = {"quantize": (registers, shared), "dequantize": (72, shared)}
        yield Case("quantize.cu", ceilings, defines)


def row_registers(head_dim: int) -> int:
    """A lane of sixteen has head_dim / 16 elements of a row."""
    return 64 if head_dim <= 128 else 80


def stage_bytes(head_dim: int) -> int:
    """Of rows.cuh, for the eight rows of a block."""
    return 8 * (4 * head_dim + 64)


def decode(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    yield from _decode(k_format, v_format, head_dim, 1, False)


def decode_with_options(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    yield from _decode(k_format, v_format, head_dim, 2, True)


def _decode(
    k_format: str, v_format: str, head_dim: int, query_parts: int, options: bool
) -> Iterator[Case]:
    pair = formats.FORMATS[k_format], formats.FORMATS[v_format]
    if not attend_few.serves(*pair):
        return
    wanted = attend_few.Decode(*pair, head_dim, head_dim, False, query_parts, options)
    kernel = attend_few.fit(wanted, SHARED_PER_BLOCK)
    assert kernel is not None
    # A multiprocessor has 65,536 registers: for two blocks of 128 threads, or for three.
    assert head_dim > 128 or 2 * (kernel.shared_bytes + 1024) <= SHARED_PER_BLOCK + 1024
    ceiling = 168 if kernel.blocks == 3 else 255, attend_few.STATIC_BYTES
    yield Case(kernel.source, {kernel.entry: ceiling}, kernel.defines())


def simt(format: str, head_dim: int, group: int) -> Case:
    pair = formats.FORMATS[format], formats.FORMATS[format]
    rows = attend_alone.rows_for(group, head_dim, head_dim)
    kernel = attend_alone.Simt(*pair, head_dim, head_dim, rows, True)
    return Case(kernel.source, {kernel.entry: (168 if rows == 1 else 208, 128)}, kernel.defines())


def prefill(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    yield from _prefill(k_format, v_format, head_dim, 1, False)


def prefill_with_options(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    yield from _prefill(k_format, v_format, head_dim, 2, True)


def _prefill(
    k_format: str, v_format: str, head_dim: int, query_parts: int, options: bool
) -> Iterator[Case]:
    pair = formats.FORMATS[k_format], formats.FORMATS[v_format]
    if not attend_many.serves(*pair, head_dim, head_dim):
        return
    kernel = attend_many.Prefill(*pair, head_dim, head_dim, query_parts, options)
    assert kernel.shared_bytes <= SHARED_PER_BLOCK
    # As with decoding: two blocks of 128 threads share a multiprocessor.
    assert kernel.row_tiles == 1 or 2 * (kernel.shared_bytes + 1024) <= SHARED_PER_BLOCK + 1024
    ceiling = 232 if head_dim <= 64 else 255
    yield Case(kernel.source, {kernel.entry: (ceiling, 0)}, kernel.defines())


# All is compiled for every pair of formats at a head_dim of 128; what runs in every step, for the
# recommended pairs also at 64 and 256.
EVERY_STEP = [append, decode, prefill]
NOW_AND_THEN = [copy_blocks, quantize, read]
ALONE = [
    Case("merge_states.cu", {"merge_states": (64, 0)}),
    simt("fp32", 128, 4),
    simt("bf16", 128, 1),
]

# ---- the matrix

Kernels = list[Callable[[str, str, int], Iterator[Case]]]


def cases_of(
    kernels: Kernels, pairs: list[tuple[str, str]], head_dims: tuple[int, ...]
) -> dict[str, Case]:
    return {
        str(case): case
        for kernel in kernels
        for k_format, v_format in pairs
        for head_dim in head_dims
        for case in kernel(k_format, v_format, head_dim)
    }


ALL_PAIRS = [(k, v) for k in NUMBERS for v in NUMBERS if v not in FOR_KEYS_ONLY]
CASES = {
    **{str(case): case for case in ALONE},
    **cases_of(EVERY_STEP, RECOMMENDED, (64, 256)),
    **cases_of(EVERY_STEP + NOW_AND_THEN, ALL_PAIRS, (128,)),
}
SAMPLES = {
    "sm_80": [("bf16", "bf16"), ("chan4", "rot4")],
    "sm_100": [("bf16", "bf16")],
    "sm_120": [("bf16", "bf16")],
}
OTHERS = [
    replace(case, arch=arch)
    for arch, pairs in SAMPLES.items()
    for case in cases_of(EVERY_STEP, pairs, (128,)).values()
]
WITH_OPTIONS: Kernels = [decode_with_options, prefill_with_options]
REMAINING = {
    **cases_of(EVERY_STEP + NOW_AND_THEN, ALL_PAIRS, (64, 256)),
    **cases_of(WITH_OPTIONS, ALL_PAIRS, (128,)),
    **cases_of(WITH_OPTIONS, RECOMMENDED, (64, 256)),
}
REMAINING_OTHERS = [
    replace(case, arch=arch)
    for arch in SAMPLES
    for case in [
        *ALONE,
        *cases_of(EVERY_STEP + NOW_AND_THEN, RECOMMENDED, (64, 128, 256)).values(),
        *cases_of(WITH_OPTIONS, RECOMMENDED, (128,)).values(),
    ]
]


def check(case: Case) -> None:
    try:
        nvrtc.load()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    cubin = compiler.compile_kernel(case.source, case.defines, case.arch)
    assert set(cubin.resources) == set(case.ceilings)
    for entry, (registers, shared) in case.ceilings.items():
        found = cubin.resources[entry]
        assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), (entry, found)
        assert found.registers <= registers and found.shared <= shared, (entry, found)


@pytest.mark.parametrize("case", list(CASES.values()), ids=str)
def test_every_pair_fits(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_a_sample_fits_on_other_architectures(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [*(case for name, case in REMAINING.items() if name not in CASES), *REMAINING_OTHERS],
    ids=str,
)
def test_the_rest_of_the_matrix_fits(case: Case) -> None:
    check(case)
