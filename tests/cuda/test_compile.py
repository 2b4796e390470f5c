"""What the kernels take of a multiprocessor, as NVRTC's assembler reports it: no spills, no stack,
and no more registers and shared memory than stated here. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from kvcore import formats
from kvcore.errors import BackendUnavailable
from kvcore_gpu import compiler, nvrtc

RECOMMENDED = [
    ("bf16", "bf16"), ("fp16", "fp16"), ("rot8", "rot8"), ("chan4", "rot4"), ("rot6", "rot4"),
    ("fp8_e4m3", "fp8_e4m3"),
]  # fmt: skip
HEAD_DIMS = (64, 128, 256)
OTHER_ARCHS = ("sm_80", "sm_100", "sm_120")
NUMBERS = {name: number for number, name in enumerate(formats.FORMATS)}
FOR_KEYS_ONLY = {name for name, format in formats.FORMATS.items() if format.kind == "channel"}
ALL_PAIRS = [(k, v) for k in NUMBERS for v in NUMBERS if v not in FOR_KEYS_ONLY]


@dataclass(frozen=True)
class Case:
    """A specialisation, and the most that a thread and a block of it may take."""

    source: str
    entry: str
    registers: int
    shared: int = 0
    defines: dict[str, int] = field(default_factory=dict)
    arch: str = "sm_90"

    def __str__(self) -> str:
        values = "-".join(str(value) for value in self.defines.values())
        return f"{self.entry}-{values}-{self.arch}" if values else f"{self.entry}-{self.arch}"


def sizes(format: str, head_dim: int) -> dict[str, int]:
    return {"BLOCK_FORMAT": NUMBERS[format], "HEAD_DIM": head_dim}


# ---- one function a kernel: its cases for a pair of formats and a head_dim


def copy_blocks(k_format: str, v_format: str, head_dim: int) -> Iterator[Case]:
    for format in sorted({k_format, v_format}):
        yield Case("copy_blocks.cu", "copy_blocks", 32, 0, sizes(format, head_dim))


PAIRED = [copy_blocks]
ALONE = [Case("merge_states.cu", "merge_states", 64)]

# ---- the matrix


def cases_of(pairs: list[tuple[str, str]], head_dims: tuple[int, ...]) -> list[Case]:
    cases = {
        str(case): case
        for k_format, v_format in pairs
        for head_dim in head_dims
        for kernel in PAIRED
        for case in kernel(k_format, v_format, head_dim)
    }
    return list(cases.values())


RECOMMENDED_CASES = ALONE + cases_of(RECOMMENDED, HEAD_DIMS)
SAMPLE = ALONE + cases_of([("bf16", "bf16"), ("chan4", "rot4")], (128,))
OTHER_CASES = [replace(case, arch=arch) for arch in OTHER_ARCHS for case in SAMPLE]
_KNOWN = {str(case) for case in RECOMMENDED_CASES}
REMAINING_CASES = [case for case in cases_of(ALL_PAIRS, (128,)) if str(case) not in _KNOWN]


def check(case: Case) -> None:
    try:
        nvrtc.load()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    cubin = compiler.compile_kernel(case.source, case.defines, case.arch)
    found = cubin.resources[case.entry]
    assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), found
    assert found.registers <= case.registers and found.shared <= case.shared, found


@pytest.mark.parametrize("case", RECOMMENDED_CASES, ids=str)
def test_recommended_pairs_fit(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", OTHER_CASES, ids=str)
def test_a_sample_fits_on_other_architectures(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", REMAINING_CASES, ids=str)
def test_every_pair_fits(case: Case) -> None:
    check(case)
