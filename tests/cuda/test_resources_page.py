"""The table of docs/gpu_mapping.md is what the compile logs say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvcore.errors import BackendUnavailable
from kvcore.formats import get_format
from kvcore_gpu import decode, nvrtc

TOOL = Path(__file__).parents[2] / "tools" / "gpu_resources.py"


@pytest.fixture(scope="module")
def tool():
    try:
        nvrtc.load()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("gpu_resources", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("registers", "shared", "threads", "blocks"), [
    (255, 97 << 10, 128, 2),  # by registers and by shared memory
    (168, 10 << 10, 128, 3),  # by registers
    (32, 100 << 10, 128, 2),  # by shared memory
    (32, 0, 128, 16),  # by threads
    (16, 0, 32, 32),  # by blocks
])  # fmt: skip
def test_blocks_of_a_multiprocessor(tool, registers, shared, threads, blocks):
    assert tool.blocks_per_multiprocessor(registers, shared, threads) == blocks


def test_a_row_is_current(tool):
    bf16 = get_format("bf16")
    kernel = decode.fit(decode.Decode(bf16, bf16, 128, 128, False, 1, False), tool.SHARED_PER_BLOCK)
    ahead = decode.WARPS * (kernel.stages - 1) * kernel.tile * 2 * bf16.row_nbytes(128)
    assert tool.row(kernel, ahead) in tool.PAGE.read_text().splitlines()


@pytest.mark.slow
def test_the_page_is_current(tool):
    assert tool.PAGE.read_text() == tool.table(), "run tools/gpu_resources.py"
