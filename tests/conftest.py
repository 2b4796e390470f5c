"""What all tests share: hypothesis profiles, CPU features that a hypervisor hides, emulated CUDA.

Markers and warnings are set in pyproject.toml.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys

# Tests run beside each other, as many as there are cores: BLAS's threads would spin for one that is
# not there. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# Shared machines stall: a test that takes long is not thereby wrong.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}

settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("quick", max_examples=20, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Runs a dot product of bf16 pairs, of which some CPUs are capable though CPUID does not say so; on
# others the process dies.
_CLAIM = {"KVCORE_CPU_FEATURES": "+avx512_bf16"}
_PROBE = """
import numpy as np, kvcore
kvcore.set_isa("avx512_bf16")
cache = kvcore.KVCache(kvcore.CacheSpec(1, 1, 8, k_format="bf16", v_format="bf16"), num_blocks=1)
with cache.step([(cache.sequence(), 64)]) as step:
    x = np.ones((64, 1, 8), np.float32)
    step.append(0, x, x)
    assert np.array_equal(step.attend(0, x), x)
"""


def _survives(code: str, environment: dict[str, str]) -> bool:
    environment = {**os.environ, **environment}
    return (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True
        ).returncode
        == 0
    )


# Before any test imports kvcore, which asks for features once.
if "KVCORE_CPU_FEATURES" not in os.environ and _survives(_PROBE, _CLAIM):
    os.environ.update(_CLAIM)


@pytest.fixture(autouse=True, scope="module")
def _collections_are_short():
    """Many tests ask for a full collection, which need not look at what other modules have left."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a GPU is skipped where there is none, and says why."""
    if item.get_closest_marker("gpu") is not None:
        import kvcore

        try:
            kvcore.get_backend("cuda")
        except kvcore.BackendUnavailable as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def emulated_backend():
    """The CUDA backend on the emulator, whose arrays are NumPy's."""
    from cuda_emulator import build
    from cuda_emulator.runtime import EmulatedRuntime
    from kvcore_gpu.backend import CudaBackend

    if build.compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    return CudaBackend(EmulatedRuntime())


@pytest.fixture
def cuda_emulated(monkeypatch, emulated_backend):
    """Lets backend="cuda" be the emulated one."""
    from kvcore import backend

    monkeypatch.setitem(backend._loaded, "cuda", emulated_backend)
    return emulated_backend
