"""The runtime over CuPy, and what it asks of the driver: no device is needed."""

from __future__ import annotations

import ctypes
import importlib
import importlib.abc
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

import kvcore
from cuda_emulator.stand_in import DEVICE, STREAM, StandIn
from kvcore import backend
from kvcore_gpu import nvrtc, params
from kvcore_gpu.backend import CudaBackend
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.scratch import Scratch

cupy = pytest.importorskip("cupy")

from kvcore_gpu.cupy_runtime import CupyRuntime  # noqa: E402


@pytest.fixture
def stand_in(monkeypatch):
    return StandIn(monkeypatch)


@pytest.fixture
def runtime(stand_in):
    return CupyRuntime()


class Failing(importlib.abc.MetaPathFinder):
    """Imports of CuPy fail as asked."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "cupy":
            raise self.error
        return None


def without_cupy(monkeypatch, error):
    for name in [name for name in sys.modules if name.split(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(backend._loaded, "cuda", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Failing(error), *sys.meta_path])


class TestAvailability:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ModuleNotFoundError("No module named 'cupy'", name="cupy"), "CuPy is not installed"),
            (ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"), "fastrlock"),
            (ImportError("libcublas.so.13: cannot open shared object file"), "libcublas"),
            (OSError("libnvrtc is damaged"), "libnvrtc is damaged"),
            (RuntimeError("CuPy is broken"), "CuPy is broken"),
            (AttributeError("no attribute 'runtime'"), "no attribute"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_cupy_that_cannot_be_imported(self, monkeypatch, error, expected):
        without_cupy(monkeypatch, error)
        with pytest.raises(kvcore.BackendUnavailable, match=expected) as raised:
            kvcore.get_backend("cuda")
        assert 'pip install "kvcore[cuda]"' in str(raised.value)
        assert kvcore.available_backends() == ("cpu",)

    def test_no_driver(self, stand_in, monkeypatch):
        monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 0)
        with pytest.raises(kvcore.BackendUnavailable, match="no NVIDIA driver was found: install"):
            CupyRuntime()

    def test_no_device(self, stand_in, monkeypatch):
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
        with pytest.raises(kvcore.BackendUnavailable, match=r"no CUDA device: .*VISIBLE_DEVICES"):
            CupyRuntime()

    @pytest.mark.parametrize(
        ("code", "expected"), [(100, "no CUDA device"), (35, r"the driver, for CUDA 13\.0, does")]
    )
    def test_what_counting_devices_raises(self, stand_in, monkeypatch, code, expected):
        def fail():
            raise cupy.cuda.runtime.CUDARuntimeError(code)

        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fail)
        with pytest.raises(kvcore.BackendUnavailable, match=expected):
            CupyRuntime()

    def test_a_compiler_that_is_newer_than_the_driver(self, stand_in, monkeypatch):
        library = types.SimpleNamespace(version=(14, 2))
        monkeypatch.setattr(nvrtc, "load", lambda: library)
        with pytest.raises(kvcore.BackendUnavailable, match=r"13, loads no .* NVRTC 14\.2: up"):
            CupyRuntime()
        library.version = (13, 9)  # of any minor version
        CupyRuntime()

    def test_a_device_that_is_too_old(self, stand_in, monkeypatch):
        facts = {**stand_in._properties(0), "major": 7, "minor": 5}
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda number: facts)
        with pytest.raises(kvcore.BackendUnavailable, match=r"sm_75.*need sm_80"):
            CupyRuntime()

    def test_this_machine_says_what_it_lacks(self):
        """In a process of its own: whatever is true here, nothing but BackendUnavailable comes."""
        code = (
            "import kvcore\n"
            "names = kvcore.available_backends()\n"
            "try: print(kvcore.get_backend('cuda').describe(None))\n"
            "except kvcore.BackendUnavailable as error: assert 'cuda' not in names; print(error)\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "sm_" in result.stdout or 'backend "cuda": ' in result.stdout


class TestDevices:
    def test_facts(self, runtime):
        assert (runtime.name, runtime.arch, runtime.device) == ("Stand-in", "sm_90", DEVICE)
        assert runtime.shared_per_block == 232448
        assert runtime.xp is cupy

    def test_other_devices(self, runtime):
        assert runtime.on_device(None) is runtime.on_device(DEVICE) is runtime
        other = runtime.on_device(1)
        assert other.device == 1 and runtime.on_device(1) is other
        assert other.on_device(DEVICE) is runtime

    @pytest.mark.parametrize("number", [-1, DEVICE + 1, True, "0", 1.0])
    def test_a_device_that_is_none(self, runtime, number):
        with pytest.raises(kvcore.InvalidArgument, match=r"^device: expected 0 to 3, got"):
            runtime.on_device(number)

    def test_another_device_is_current(self, runtime, monkeypatch):
        runtime.check_active()
        monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
        with pytest.raises(kvcore.InvalidArgument, match=r"^device: .* 3 to be current.* got 0"):
            runtime.check_active()


class TestArrays:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_its_own_are_taken_as_they_are(self, runtime, stand_in, dtype):
        array = stand_in.array((4, 2, 8), dtype)
        assert runtime.as_array(array, "k") is array
        assert runtime.address(array) == array.data.ptr

    @pytest.mark.parametrize("value", [np.zeros(3), [1.0], None, "array", 3])
    def test_host_memory_is_refused(self, runtime, value):
        with pytest.raises(kvcore.InvalidType, match=r"^k: "):
            runtime.as_array(value, "k")

    @pytest.mark.parametrize("place", [(2, DEVICE), (13, 0)])
    def test_dlpack_of_a_device_is_read_in_place(self, runtime, stand_in, monkeypatch, place):
        array = stand_in.array((2, 8))
        exported = types.SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: place)
        monkeypatch.setattr(cupy, "from_dlpack", lambda value: array if value is exported else None)
        assert runtime.as_array(exported, "k") is array

    def test_an_array_interface_is_read_in_place(self, runtime, stand_in, monkeypatch):
        array = stand_in.array((2, 8))
        exported = types.SimpleNamespace(__cuda_array_interface__={})
        monkeypatch.setattr(cupy, "asarray", lambda value: array if value is exported else None)
        assert runtime.as_array(exported, "k") is array

    def test_what_cannot_be_imported(self, runtime, monkeypatch):
        def refuse(value):
            raise BufferError("requires grad")

        exported = types.SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (2, 0))
        monkeypatch.setattr(cupy, "from_dlpack", refuse)
        with pytest.raises(kvcore.InvalidType, match=r"^k: .*requires grad"):
            runtime.as_array(exported, "k")

    def test_dlpack_of_the_host_is_refused(self, runtime):
        torch = pytest.importorskip("torch")
        with pytest.raises(kvcore.InvalidType, match=r"^q: "):
            runtime.as_array(torch.zeros(3), "q")


@pytest.fixture
def kernel(runtime, stand_in):
    stand_in.params_size = ctypes.sizeof(params.MergeParams)
    return Launcher(runtime).kernel("merge.cu", "merge", params.MergeParams, A=1, B="x")


class TestLaunches:
    def test_what_the_driver_gets(self, kernel, stand_in):
        assert stand_in.compiled == [("merge.cu", {"A": 1, "B": "x"})]
        kernel.params.num_rows, kernel.params.head_dim = 7, 64
        kernel.launch((3, 2, 1), (128, 1, 1), 4096)
        [launch] = stand_in.launches
        assert (launch.name, launch.grid, launch.block) == ("merge", (3, 2, 1), (128, 1, 1))
        assert (launch.shared_bytes, launch.stream) == (4096, STREAM)
        assert launch.params == bytes(kernel.params)
        assert params.MergeParams.from_buffer_copy(launch.params).num_rows == 7

    def test_the_same_parameters_again(self, kernel, stand_in):
        for rows in (1, 2):
            kernel.params.num_rows = rows
            kernel.launch((rows, 1, 1), (32, 1, 1))
        sent = [params.MergeParams.from_buffer_copy(la.params) for la in stand_in.launches]
        assert [p.num_rows for p in sent] == [1, 2]

    def test_much_shared_memory_is_asked_for_once(self, kernel, stand_in):
        for nbytes in (48 * 1024, 100_000, 90_000, 100_000):
            kernel.launch((1, 1, 1), (32, 1, 1), nbytes)
            assert stand_in.opted_in.get("merge", 0) == (0 if nbytes < 50_000 else 100_000)
            stand_in.opted_in.pop("merge", None) if nbytes < 50_000 else None
        assert [launch.shared_bytes for launch in stand_in.launches[1:]] == [
            100_000, 90_000, 100_000,
        ]  # fmt: skip

    def test_a_specialisation_is_compiled_once(self, runtime, stand_in):
        launcher = Launcher(runtime)
        one = launcher.kernel("a.cu", "a", params.MergeParams, D=64, E=1)
        two = launcher.kernel("a.cu", "a", params.MergeParams, E=1, D=64)
        launcher.kernel("a.cu", "a", params.MergeParams, D=128, E=1)
        assert one.function is two.function and one.params is not two.params
        assert [defines["D"] for _, defines in stand_in.compiled] == [64, 128]

    def test_a_thread_that_launches_first_of_all(self, kernel, stand_in, monkeypatch):
        """The driver's calls have no context of their own, other than the runtime's."""
        calls = []

        def enter():
            calls.append(1)
            stand_in.error = None
            return 1, 2

        monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", enter)
        stand_in.error = cupy.cuda.runtime.CUDARuntimeError(201)
        kernel.launch((1, 1, 1), (32, 1, 1))
        assert len(stand_in.launches) == 1 and calls == [1]
        stand_in.error = cupy.cuda.runtime.CUDARuntimeError(201)
        with pytest.raises(kvcore.DeviceFault, match=r"^merge: "):
            kernel.launch((1, 1, 1), (32, 1, 1))

    def test_a_kernel_that_is_not_loaded(self, runtime, stand_in, monkeypatch):
        def refuse(path):
            raise cupy.cuda.runtime.CUDARuntimeError(209)

        monkeypatch.setattr(cupy, "RawModule", refuse)
        with pytest.raises(kvcore.DeviceFault, match=r"^merge: cannot be loaded: .*NoKernel"):
            Launcher(runtime).kernel("merge.cu", "merge", params.MergeParams)

    def test_an_error_that_memory_meets(self, runtime, stand_in, monkeypatch):
        def fail(*_):
            raise cupy.cuda.runtime.CUDARuntimeError(700)

        for name, call in (
            ("empty", lambda: runtime.empty((1,), np.float32)),
            ("zeros", lambda: runtime.zeros((1,), np.float32)),
            ("array", lambda: runtime.to_device(np.zeros(1))),
        ):
            monkeypatch.setattr(cupy, name, lambda *_, **__: fail())
            with pytest.raises(kvcore.DeviceFault, match="Illegal"):
                call()

    def test_an_error_of_the_driver(self, kernel, stand_in):
        stand_in.error = cupy.cuda.runtime.CUDARuntimeError(700)
        with pytest.raises(kvcore.DeviceFault, match=r"^merge: "):
            kernel.launch((1, 1, 1), (32, 1, 1))


class TestUploads:
    def test_what_is_staged_arrives(self, runtime, stand_in):
        target = stand_in.array((100,), np.int32)
        for count in (1, 5, 100):
            staged = runtime.stage(count)
            assert staged.shape == (count,) and staged.dtype == np.int32
            staged[:] = np.arange(count)
            runtime.upload(staged, target)
            address, data = stand_in.copies[-1]
            assert address == target.data.ptr
            assert np.frombuffer(data, np.int32).tolist() == list(range(count))

    def test_copies_under_way_are_not_written_over(self, runtime, stand_in):
        target = stand_in.array((10,), np.int32)
        kept = []
        for number in range(5):
            staged = runtime.stage(10)
            staged[:] = number
            runtime.upload(staged, target)
            kept.append(staged)
        assert [array[0] for array in kept] == list(range(5))

    def test_a_thread_that_ends_waits_for_its_copies(self, runtime, stand_in, monkeypatch):
        waits = []
        event = types.SimpleNamespace(
            record=lambda stream: None, synchronize=lambda: waits.append(1)
        )
        monkeypatch.setattr(cupy.cuda, "Event", lambda **_: event)
        target = stand_in.array((4,), np.int32)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: runtime.upload(runtime.stage(4), target)).result()
            assert not waits
        assert waits == [1]

    def test_a_capture_is_refused_what_it_cannot_hold(self, runtime, stand_in):
        launcher, scratch = Launcher(runtime), Scratch(runtime)
        floats = np.ones(4, np.float32)

        def use():
            scratch.get("a", 4, np.float32)
            launcher.constant(floats)
            launcher.function("a.cu", "a", D=1)

        use()
        stand_in.capturing = True
        use()  # all of it is there
        for new in (
            lambda: runtime.stage(4),
            lambda: scratch.get("a", 5, np.float32),
            lambda: launcher.constant(floats + 1),
            lambda: launcher.function("a.cu", "a", D=2),
        ):
            with pytest.raises(kvcore.StepError, match="begin the step before, run one like it"):
                new()


def steps_launches(stand_in, cache, sequences, k, v, size):
    stand_in.launches.clear()
    stand_in.params_size = size
    with cache.step([(s, 1) for s in sequences]) as step:
        step.append(0, k, v)
        key = step.graph_key
    return key, list(stand_in.launches)


def test_threads_stage_apart(runtime, stand_in):
    mine = runtime.stage(4)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(runtime.stage, 4).result()
    assert mine.ctypes.data != theirs.ctypes.data
    mine[:] = 1
    theirs[:] = 2
    runtime.upload(mine, stand_in.array((4,), np.int32))
    assert np.frombuffer(stand_in.copies[-1][1], np.int32).tolist() == [1] * 4


class TestSteps:
    """A cache whose device is the stand-in."""

    @pytest.fixture
    def cache(self, runtime, monkeypatch):
        monkeypatch.setitem(backend._loaded, "cuda", CudaBackend(runtime))
        spec = kvcore.CacheSpec(1, 2, 64, k_format="bf16", v_format="bf16", block_size=16)
        return kvcore.KVCache(spec, 64, backend="cuda")

    def test_the_plan_goes_over_once_a_step(self, cache, stand_in):
        k = stand_in.array((3, 2, 64), ml_dtypes.bfloat16)
        sequences = [cache.sequence() for _ in range(3)]
        stand_in.copies.clear()
        with cache.step([(s, 1) for s in sequences]) as step:
            plan = step.plan()
            step.append(0, k, k)
        [(address, data)] = stand_in.copies
        sent = np.frombuffer(data, np.int32)
        at = (plan.device.tables - address) // 4
        assert plan.device.query_starts == address
        width = plan.device.table_width
        assert sent[at : at + 3 * width].reshape(3, width)[:, 0].tolist() == [0, 1, 2]
        assert (sent[at : at + 3 * width].reshape(3, width)[:, 1:] == -1).all()

    def test_equal_steps_launch_the_same(self, cache, stand_in):
        """All that a graph would replay: addresses, sizes and grids, while sequences grow."""
        k = stand_in.array((2, 2, 64), ml_dtypes.bfloat16)
        sequences = [cache.sequence(), cache.sequence()]
        size = ctypes.sizeof(params.AppendParams)
        first = steps_launches(stand_in, cache, sequences, k, k, size)
        allocations = stand_in.allocations
        for _ in range(40):
            assert steps_launches(stand_in, cache, sequences, k, k, size) == first
        assert stand_in.allocations == allocations  # nothing allocates after the first step

    def test_steps_that_are_open_at_once_have_their_own_addresses(self, cache, stand_in):
        k = stand_in.array((1, 2, 64), ml_dtypes.bfloat16)
        a, b = cache.sequence(), cache.sequence()
        with cache.step([(a, 1)]) as one, cache.step([(b, 1)]) as two:
            assert one.graph_key != two.graph_key
            assert one.plan().device.slots != two.plan().device.slots
            one.append(0, k, k)
            two.append(0, k, k)
        with cache.step([(a, 1)]) as again:
            assert again.graph_key == one.graph_key
            again.append(0, k, k)

    def test_an_abandoned_step_gives_its_memory_back(self, cache, stand_in):
        a = cache.sequence()
        step = cache.step([(a, 1)])
        key = step.graph_key
        step.rollback()
        step = cache.step([(a, 1)])
        assert step.graph_key == key
        del step
        assert cache.step([(a, 1)]).graph_key == key

    @pytest.mark.parametrize("call", ["step", "append", "read"])
    def test_a_fault_ends_the_use_of_the_cache(self, cache, stand_in, call):
        k = stand_in.array((1, 2, 64), ml_dtypes.bfloat16)
        a = cache.sequence()
        stand_in.error = cupy.cuda.runtime.CUDARuntimeError(700)
        with pytest.raises(kvcore.DeviceFault), cache.step([(a, 1)]) as step:
            step.append(0, k, k)
        assert len(a) == 0
        stand_in.error = None
        expected = r"^the cache cannot be used after a fault of its device: append: .*Illegal"
        with pytest.raises(kvcore.DeviceFault, match=expected):
            if call == "read":
                a.read(0)
            with cache.step([(a, 1)]) as step:
                step.append(0, k, k)

    def test_rows_that_are_not_aligned_are_copied(self, cache, stand_in):
        wide = stand_in.array((1, 2, 72), np.float32)
        assert isinstance(cupy.ndarray, type) and isinstance(wide, cupy.ndarray)
        from kvcore_gpu.arrays import is_readable

        runtime = cache.backend.runtime
        assert is_readable(runtime, wide[..., :64])
        assert is_readable(runtime, wide[..., 4:68])
        assert not is_readable(runtime, wide[..., 1:65])
        assert not is_readable(runtime, stand_in.array((1, 2, 66))[..., :64])
        assert not is_readable(runtime, wide[..., ::2])
        assert is_readable(runtime, wide[:1, :1, :64])


def test_modules_stay_importable_without_cupy():
    """Only making the backend needs CuPy, so that the class can be looked at anywhere."""
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "import kvcore_gpu.backend, kvcore_gpu.cupy_runtime\n"
        "assert kvcore_gpu.backend.CudaBackend.name == 'cuda'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert isinstance(importlib.import_module("kvcore_gpu.backend"), types.ModuleType)
