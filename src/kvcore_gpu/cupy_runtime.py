"""CupyRuntime: the runtime of a real device, through CuPy."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.backend import lies_on_device
from kvcore.errors import BackendUnavailable, DeviceFault, InvalidArgument, InvalidType, StepError
from kvcore_gpu import compiler, nvrtc
from kvcore_gpu.params import Params
from kvcore_gpu.staging import Staging

_OLDEST_ARCH = (8, 0)
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_WITHOUT_ASKING = 48 * 1024  # bytes of shared memory that every kernel may have


@dataclass(slots=True)
class CupyFunction:
    """A kernel of a loaded cubin."""

    name: str
    address: int
    kernel: Any  # CuPy's, which keeps the module loaded
    shared_bytes: int = _WITHOUT_ASKING


class CupyRuntime:
    """Implements kvcore_gpu.runtime.Runtime on the current device.

    Raises:
        BackendUnavailable: CuPy, NVRTC, a driver or a device is missing; which, and what to do.
    """

    def __init__(self, device: int | None = None) -> None:
        self.xp: Any = _import_cupy()
        self.array_type: type = self.xp.ndarray
        cuda = self.xp.cuda
        _check_devices(cuda)
        _check_compiler(cuda)
        number = cuda.runtime.getDevice() if device is None else device
        properties = cuda.runtime.getDeviceProperties(number)
        self.device: int = number
        self.name: str = properties["name"].decode()
        self.shared_per_block: int = properties["sharedMemPerBlockOptin"]
        self.arch = f"sm_{properties['major']}{properties['minor']}"
        if (properties["major"], properties["minor"]) < _OLDEST_ARCH:
            raise BackendUnavailable(
                f'backend "cuda": device {number} ({self.name}) is {self.arch}; the kernels need '
                "sm_80 or later"
            )
        self._errors = (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError)
        self._launch = cuda.driver.launchKernel
        self._stream = cuda.get_current_stream
        self._own = _OfThread(cuda)
        self._functions: dict[tuple[object, ...], CupyFunction] = {}
        self._others: dict[int, CupyRuntime] = {number: self}

    # ---- devices

    def on_device(self, device: int | None) -> CupyRuntime:
        cuda = self.xp.cuda
        number = cuda.runtime.getDevice() if device is None else device
        if number not in self._others:
            count = cuda.runtime.getDeviceCount()
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
                raise InvalidArgument(f"device: expected 0 to {count - 1}, got {number!r}")
            with cuda.Device(number):
                other = CupyRuntime(number)
            other._others = self._others
            self._others[number] = other
        return self._others[number]

    def active(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.xp.cuda.Device(self.device)
        return context

    def check_not_capturing(self) -> None:
        if self._stream().is_capturing():
            raise StepError(
                "a CUDA graph cannot be captured from what is new or comes from the host: begin "
                "the step before, run one like it once, and give slopes, sinks and positions as "
                "arrays of the device"
            )

    def available_memory(self) -> int:
        with self.active():
            free: int = self.xp.cuda.runtime.memGetInfo()[0]
            kept: int = self.xp.get_default_memory_pool().free_bytes()
            return free + kept

    def check_active(self) -> None:
        current = self.xp.cuda.runtime.getDevice()
        if current != self.device:
            raise InvalidArgument(
                f"device: expected the cache's device {self.device} to be current "
                f"(with cupy.cuda.Device({self.device}): ...), got {current}"
            )

    # ---- memory

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        try:
            return self.xp.empty(shape, dtype)
        except self._errors as error:  # of an earlier kernel, which this call meets
            raise DeviceFault(f"memory: {error}") from error

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        try:
            return self.xp.zeros(shape, dtype)
        except self._errors as error:
            raise DeviceFault(f"memory: {error}") from error

    def copy(self, array: Any) -> Any:
        fresh = self.xp.empty(array.shape, array.dtype)
        _bits(fresh)[...] = _bits(array)
        return fresh

    def clear(self, array: Any) -> None:
        try:
            if array.flags.c_contiguous:
                array.data.memset_async(0, array.nbytes)
            else:
                _bits(array)[...] = 0
        except self._errors as error:
            raise DeviceFault(f"memory: {error}") from error

    def to_device(self, array: NDArray[Any]) -> Any:
        try:
            return self.xp.array(array, order="C")
        except self._errors as error:
            raise DeviceFault(f"copy to the device: {error}") from error

    def as_array(self, value: Any, argument: str) -> Any:
        if isinstance(value, self.xp.ndarray):
            return value
        if not lies_on_device(value):
            raise InvalidType(
                f"{argument}: expected an array on a CUDA device (CuPy's, or one with DLPack or "
                f"__cuda_array_interface__), got {type(value).__name__}"
            )
        try:
            # Before the array interface, which has no bfloat16.
            if hasattr(value, "__dlpack__"):
                return self.xp.from_dlpack(value)
            return self.xp.asarray(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InvalidType(f"{argument}: its memory cannot be used: {error}") from None

    def address(self, array: Any) -> int:
        address: int = array.data.ptr
        return address

    def to_host(self, array: Any) -> NDArray[Any]:
        self.check_not_capturing()
        try:
            copy: NDArray[Any] = self.xp.asnumpy(array)
        except self._errors as error:
            raise DeviceFault(f"copy to the host: {error}") from error
        return copy

    def stage(self, count: int) -> NDArray[np.int32]:
        self.check_not_capturing()
        return self._own.staging.take(count)

    def upload(self, staged: NDArray[np.int32], target: Any) -> None:
        try:
            self._own.staging.send(staged, target.data.ptr)
        except self._errors as error:
            raise DeviceFault(f"copy to the device: {error}") from error

    # ---- kernels

    def function(self, source: str, entry: str, defines: Mapping[str, int | str]) -> CupyFunction:
        key = (source, entry, *sorted(defines.items()))
        found = self._functions.get(key)
        if found is None:
            self.check_not_capturing()
            cubin = compiler.compile_kernel(source, defines, self.arch)
            try:
                with self.active():
                    kernel = self.xp.RawModule(path=str(cubin.path)).get_function(entry)
                    found = CupyFunction(entry, kernel.kernel.ptr, kernel)
            except self._errors as error:
                raise DeviceFault(f"{entry}: cannot be loaded: {error}") from error
            self._functions[key] = found
        return found

    def launch(
        self,
        function: CupyFunction,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        params: Params,
    ) -> None:
        try:
            if shared_bytes > function.shared_bytes:
                function.kernel.max_dynamic_shared_size_bytes = shared_bytes
                function.shared_bytes = shared_bytes
            self._launch(
                function.address,
                *grid,
                *block,
                shared_bytes,
                self._stream().ptr,
                params.arguments,
                0,
            )
        except self._errors as error:
            if error.status == _NO_CONTEXT and self._has_entered():
                self.launch(function, grid, block, shared_bytes, params)
            else:
                raise DeviceFault(f"{function.name}: {error}") from error

    def _has_entered(self) -> bool:
        """Lets this thread launch where it has called nothing but the driver yet; False: it could.

        Allocations and copies do the same on their way.
        """
        if self._own.has_entered:
            return False
        self._own.has_entered = True
        self.xp.cuda.runtime.memGetInfo()
        return True

    def synchronize(self) -> None:
        try:
            self._stream().synchronize()
        except self._errors as error:
            raise DeviceFault(str(error)) from error


def _bits(array: Any) -> Any:
    """An array as unsigned integers: what CuPy compiles to move these is little and serves all."""
    return array.view(f"u{array.itemsize}")


class _OfThread(threading.local):
    """What each thread fills alone."""

    def __init__(self, cuda: Any) -> None:
        self.staging = Staging(cuda)
        self.has_entered = False


def _import_cupy() -> Any:
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise _unavailable(f"CuPy cannot be imported: {error}", _REINSTALL) from error
        raise _unavailable("CuPy is not installed", 'pip install "kvcore[cuda]"') from None
    except Exception as error:  # CuPy turns what its libraries lack into exceptions of many kinds
        raise _unavailable(f"CuPy cannot be imported: {error}", _REINSTALL) from error
    return cupy


def _check_devices(cuda: Any) -> None:
    """Raises unless there are a driver that CuPy can use and a device."""
    version = cuda.runtime.driverGetVersion()
    if version == 0:
        raise _unavailable(
            "no NVIDIA driver was found",
            "install one (nvidia-smi then shows the devices), or start the container with its GPUs",
        )
    try:
        count = cuda.runtime.getDeviceCount()
    except cuda.runtime.CUDARuntimeError as error:
        if "NoDevice" not in str(error):
            came = f"{version // 1000}.{version % 1000 // 10}"
            raise _unavailable(
                f"the driver, for CUDA {came}, does not serve CuPy: {error}",
                "update it, or install the CuPy package for its version",
            ) from None
        count = 0
    if count == 0:
        raise _unavailable(
            "there is a driver but no CUDA device",
            "nvidia-smi shows what the driver sees; CUDA_VISIBLE_DEVICES may hide devices",
        )


def _check_compiler(cuda: Any) -> None:
    """Raises unless there is an NVRTC whose kernels the driver loads: of its major version at most.

    What is compiled for a device runs on drivers of older minor versions too.
    """
    compiles, serves = nvrtc.load().version, cuda.runtime.driverGetVersion() // 1000
    if compiles[0] > serves:
        raise _unavailable(
            f"the driver, for CUDA {serves}, loads no kernels of NVRTC {compiles[0]}.{compiles[1]}",
            f"update it, or remove that NVRTC and install the one of CUDA {serves}",
        )


_REINSTALL = 'install a CuPy that fits this machine, as with pip install "kvcore[cuda]"'


def _unavailable(what: str, remedy: str) -> BackendUnavailable:
    return BackendUnavailable(f'backend "cuda": {what}: {remedy}')
