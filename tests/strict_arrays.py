"""A stand-in for CuPy's arrays: NumPy's, behind a wall that lets nothing through unasked.

Arrays refuse to become NumPy's, to meet them in an operation or an index, and to become Python's
numbers, which would wait for the device. The module has nothing that CuPy lacks, and makes arrays
only while their device is the current one.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

import kvcore
from kvcore.backend import AttendOptions

#: What both modules have, of what is offered here: functions over arrays, methods, attributes.
FUNCTIONS = (
    "argsort", "clip", "cos", "divide", "exp", "matmul", "mean", "minimum", "multiply", "negative",
    "put_along_axis", "repeat", "sin", "sort", "sqrt", "square", "stack", "subtract",
    "take_along_axis", "tanh", "where",
)  # fmt: skip
METHODS = ("argmax", "astype", "max", "reshape", "sum", "transpose")
ATTRIBUTES = ("dtype", "nbytes", "ndim", "shape", "size")
NUMBERS = (int, float, np.generic)
DEVICE = 1


class Leak(TypeError):
    """A host array where one of the device belongs, or the other way round."""


class StrictModule:
    """The array module."""

    float16, float32, float64, inf = np.float16, np.float32, np.float64, np.inf

    def __init__(self) -> None:
        self.current: int | None = 0
        self.ndarray = StrictArray

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            raise AttributeError(f"{name} is not among what is known to be CuPy's as well")
        return lambda *args, **options: self._call(getattr(np, name), args, options)

    def asarray(self, value: Any) -> StrictArray:
        if not isinstance(value, np.ndarray):
            raise Leak(f"asarray: expected NumPy's array, got {type(value).__name__}")
        return self.wrap(value.copy())

    def asnumpy(self, value: StrictArray) -> np.ndarray:
        return value.host.copy()

    def empty(self, shape: Any, dtype: Any) -> StrictArray:
        values = np.empty(shape, dtype)
        values.view(np.uint8).fill(0xFF)  # NaN
        return self.wrap(values)

    def ones(self, shape: Any, dtype: Any) -> StrictArray:
        return self.wrap(np.ones(shape, dtype))

    def zeros(self, shape: Any, dtype: Any) -> StrictArray:
        return self.wrap(np.zeros(shape, dtype))

    def wrap(self, value: Any) -> Any:
        """NumPy's array as this module's."""
        if self.current == 0:
            raise Leak("an array for another device than 0, the current one")
        return StrictArray(self, np.asarray(value))

    @contextmanager
    def device(self, number: int | None) -> Iterator[None]:
        before = self.current
        self.current = before if number is None else number
        try:
            yield
        finally:
            self.current = before

    def _call(self, function: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
        out = options.get("out")
        if function is np.matmul:
            dtypes = {array.dtype for array in args if isinstance(array, StrictArray)}
            assert dtypes == {np.dtype(np.float32)}
        plain = {name: opened(value) for name, value in options.items()}
        result = function(*map(opened, args), **plain)
        return result if result is None else self.wrap(result) if out is None else out


class StrictArray:
    """An array of the module."""

    __array_ufunc__ = None  # NumPy's operators leave theirs to this class

    def __init__(self, module: StrictModule, host: np.ndarray) -> None:
        self.module = module
        self.host = host

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise Leak("an array of the device became NumPy's unasked")

    def __array_function__(self, *_: Any, **__: Any) -> Any:
        raise Leak("a function of NumPy's was called with an array of the device")

    def __bool__(self) -> bool:
        raise Leak("an array's truth waits for the device")

    def __len__(self) -> int:
        return len(self.host)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return self.module.wrap(self.host[_index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[_index(index)] = opened(value)

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return getattr(self.host, name)
        if name not in METHODS:
            raise AttributeError(f"{name} is not among what is known to be CuPy's as well")
        method = getattr(self.host, name)
        return lambda *args, **options: self.module.wrap(method(*args, **options))

    @property
    def T(self) -> Any:  # noqa: N802
        return self.module.wrap(self.host.T)

    def __neg__(self) -> Any:
        return self.module.wrap(-self.host)


def _operator(name: str) -> Callable[[StrictArray, Any], Any]:
    function = getattr(operator, name)

    def apply(self: StrictArray, other: Any) -> Any:
        result = function(self.host, opened(other))
        return self if name.startswith("i") else self.module.wrap(result)

    return apply


def _reflected(name: str) -> Callable[[StrictArray, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.module.wrap(function(opened(other), self.host))


for _name in ("add", "sub", "mul", "truediv"):
    setattr(StrictArray, f"__{_name}__", _operator(_name))
    setattr(StrictArray, f"__r{_name}__", _reflected(_name))
    setattr(StrictArray, f"__i{_name}__", _operator(f"i{_name}"))


def opened(value: Any) -> Any:
    """What NumPy computes with in a strict array's place: an operand, or a list of such."""
    if isinstance(value, StrictArray):
        return value.host
    if isinstance(value, (tuple, list)):
        return [opened(item) for item in value]
    if value is None or isinstance(value, (*NUMBERS, str, type)):
        return value
    raise Leak(f"expected an array of the device or a number, got {type(value).__name__}")


def _index(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    plain = (slice, int, np.integer, type(None), type(Ellipsis))
    return tuple(part if isinstance(part, plain) else opened_array(part) for part in parts)


def opened_array(value: Any) -> np.ndarray:
    """NumPy's array of a strict one, which it must be."""
    if not isinstance(value, StrictArray):
        raise Leak(f"expected an array of the device, got {type(value).__name__}")
    return value.host


class StrictBackend:
    """The CPU's operations behind strict arrays."""

    name = "cuda"

    def __init__(self) -> None:
        self.xp = StrictModule()
        self._cpu = kvcore.get_backend("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)

    def on_device(self, device: int | None) -> AbstractContextManager[None]:
        return self.xp.device(device)

    def describe(self, device: int | None) -> str:
        return f"device {device}"

    def allocate(self, spec: Any, num_blocks: Any, device: int | None) -> Any:
        return self._cpu.allocate(spec, num_blocks, None)

    def read(self, *args: Any) -> tuple[Any, Any]:
        k, v = self._cpu.read(*args)
        return self.xp.wrap(k), self.xp.wrap(v)

    def available_memory(self, device: int | None) -> int:
        return 2**22

    def begin_step(self, storage: Any, plans: Any) -> Any:
        if self.xp.current == 0:
            raise Leak("a step on another device than the current one")
        return self._cpu.begin_step(storage, plans)

    def append(self, storage: Any, layer: int, plan: Any, k: Any, v: Any, layout: str) -> None:
        values = None if v is None else opened_array(v)
        self._cpu.append(storage, layer, plan, opened_array(k), values, layout)

    def attend(
        self,
        storage: Any,
        layer: int,
        plan: Any,
        q: Any,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
        out: Any,
    ) -> Any:
        assert not return_lse and out is None
        if options.sinks is not None:
            options = dataclasses.replace(options, sinks=opened_array(options.sinks))
        queries = opened_array(q)
        found = self._cpu.attend(storage, layer, plan, queries, layout, options, False, None)
        return self.xp.wrap(found)
