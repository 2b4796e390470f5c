"""Every backend keeps the contract: the cases of kvcore.parity on the CPU, emulated and on a GPU.

`pytest -m gpu` runs those of a real device alone.
"""

from __future__ import annotations

import pytest

import kvcore
from cuda_emulator import build
from cuda_emulator.runtime import EmulatedRuntime
from kvcore import backend as registry
from kvcore import parity
from kvcore_gpu.backend import CudaBackend


def assert_passes(case, subject):
    result = parity.try_case(case, subject, subject.device)
    assert result.passed, result.message


def on_every_case(test):
    return pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)(test)


@pytest.mark.parametrize("isa", kvcore.available_isas())
@on_every_case
def test_on_the_cpu(case, isa):
    assert_passes(case, parity.Subject("cpu", isa))


@pytest.fixture(scope="module")
def emulated():
    """The CUDA backend over the emulator, whose threads run in another order at each launch."""
    return CudaBackend(EmulatedRuntime(order="random"))


@pytest.mark.skipif(build.compiler() is None, reason="the emulator needs a C++ compiler")
@on_every_case
def test_on_an_emulated_gpu(case, emulated, monkeypatch):
    monkeypatch.setitem(registry._loaded, "cuda", emulated)
    emulated.runtime.launches = 0  # so that a case's orders are its own
    assert_passes(case, parity.Subject("cuda"))


@pytest.mark.gpu
@on_every_case
def test_on_a_gpu(case):
    assert_passes(case, parity.Subject("cuda"))


def test_names_are_topics_and_differ():
    names = [case.name for case in parity.CASES]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 1 for name in names)
