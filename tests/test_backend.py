"""The registry of backends and the protocol that each follows."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest

import kvcore
from kvcore import backend
from kvcore.backend import AttendOptions, Backend
from kvcore.cpu_backend import CpuBackend
from kvcore_gpu.backend import CudaBackend


def operations():
    return [
        name
        for name, member in vars(Backend).items()
        if inspect.isfunction(member) and not name.startswith("_")
    ]


def test_the_cpu_is_always_there():
    assert "cpu" in kvcore.available_backends()
    assert kvcore.get_backend("cpu").name == "cpu"
    assert kvcore.get_backend("cpu") is kvcore.get_backend("cpu")


@pytest.mark.parametrize("name", backend.known_backends())
def test_a_backend_works_or_says_why_not(name):
    if name in kvcore.available_backends():
        assert kvcore.get_backend(name).name == name
    else:
        with pytest.raises(kvcore.BackendUnavailable, match=name):
            kvcore.get_backend(name)
        with pytest.raises(kvcore.BackendUnavailable, match=name):
            kvcore.KVCache(kvcore.CacheSpec(1, 1, 8), num_blocks=1, backend=name)


@pytest.mark.parametrize("name", ["", "CPU", "gpu", None, 0, []])
def test_a_name_that_is_none(name):
    with pytest.raises(kvcore.InvalidArgument, match=r"^backend: expected one of cpu, cuda"):
        kvcore.get_backend(name)


def test_a_backend_is_loaded_when_it_is_asked_for():
    code = (
        "import sys, kvcore; assert 'kvcore.cpu_backend' not in sys.modules; "
        "kvcore.get_backend('cpu'); assert 'kvcore.cpu_backend' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The classes are there wherever their devices are not.
CLASSES = [CpuBackend, CudaBackend]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("operation", operations())
def test_signatures_are_the_protocols(kind, operation):
    wanted = inspect.signature(getattr(Backend, operation))
    actual = inspect.signature(getattr(kind, operation))
    assert list(actual.parameters) == list(wanted.parameters)
    for parameter in wanted.parameters:
        assert actual.parameters[parameter].kind == wanted.parameters[parameter].kind
        assert actual.parameters[parameter].default == wanted.parameters[parameter].default


@pytest.mark.parametrize("kind", CLASSES)
def test_a_backend_offers_nothing_beyond_the_protocol(kind):
    public = {n for n in vars(kind) if not n.startswith("_")}
    assert public - {"name", "xp"} == set(operations())


@pytest.mark.parametrize("name", kvcore.available_backends())
def test_arrays_of_a_backend_are_what_its_operations_take_and_give(name):
    chosen = kvcore.get_backend(name)
    with chosen.on_device(None):
        code = chosen.quantize(chosen.xp.ones((2, 8), "float32"), "fp16", None, None)
    assert isinstance(code, chosen.xp.ndarray)
    assert code.dtype == chosen.xp.float16


@pytest.mark.parametrize("method", ["on_device", "describe", "available_memory"])
def test_the_cpu_has_no_numbered_devices(method):
    with pytest.raises(kvcore.InvalidArgument, match=r"^device: expected None .* got 0"):
        getattr(kvcore.get_backend("cpu"), method)(0)


def test_the_cpu_describes_itself():
    words = kvcore.get_backend("cpu").describe(None)
    assert words == f"{kvcore.get_num_threads()} threads, {kvcore.get_isa()} kernels"


def test_every_operation_on_arrays_is_in_ops():
    data_plane = {
        "append_kv", "attention", "paged_attention", "merge_states", "quantize", "dequantize",
    }  # fmt: skip
    assert data_plane <= set(operations())
    assert data_plane | {"linear"} == set(kvcore.ops.__all__)


def test_an_error_inside_a_backend_is_not_hidden(monkeypatch):
    """A module that is there but broken is not reported as missing."""
    monkeypatch.setitem(backend._MODULES, "broken", "a_module_that_needs_something")
    with pytest.raises(ModuleNotFoundError):
        kvcore.get_backend("broken")


class TestAttendOptions:
    @pytest.mark.parametrize("head_dim", [8, 64, 256])
    def test_the_default_scale(self, head_dim):
        assert AttendOptions().scale_for(head_dim) == pytest.approx(head_dim**-0.5, rel=1e-15)

    @pytest.mark.parametrize("scale", [0, 1, -2, 0.5, np.float32(0.25), np.float64(3)])
    def test_a_given_scale(self, scale):
        assert AttendOptions(scale).scale_for(64) == float(scale)

    @pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 1e39, -1e39])
    def test_a_scale_that_is_no_float32(self, scale):
        with pytest.raises(kvcore.InvalidArgument, match=r"^scale: expected"):
            AttendOptions(scale)

    @pytest.mark.parametrize("scale", ["1", True, 1j, [1.0]])
    def test_a_scale_that_is_no_number(self, scale):
        with pytest.raises(kvcore.InvalidType, match=r"^scale: expected"):
            AttendOptions(scale)
