"""The machine: what it is, which CPUs the process may use, and who waited for one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kvcore

DEFAULT_L2_BYTES, DEFAULT_L3_BYTES = 1 << 20, 32 << 20
PACKAGES = ("kvcore", "numpy", "ml_dtypes", "torch", "onnxruntime", "openvino")

#: Environment variables that hold libraries back to older instructions; see the Makefile.
ISA_VARIABLES = (
    "KVCORE_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_CORETYPE",
)


@cache
def affinity() -> tuple[int, ...]:
    """The CPUs that the process could use when this was first called."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def out_dir() -> Path:
    """Where results and compiled probes go; not under version control."""
    path = Path(__file__).with_name("out")
    path.mkdir(exist_ok=True)
    return path


@cache
def l2_bytes() -> int:
    """Bytes of a core's second level cache."""
    return _cache_bytes(2) or DEFAULT_L2_BYTES


@cache
def l3_bytes() -> int:
    """Bytes of the last level cache."""
    return _cache_bytes(3) or _cache_bytes(2) or DEFAULT_L3_BYTES


def _cache_bytes(index: int) -> int | None:
    file = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size")
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text().strip().removesuffix("K")) << 10
    return None


def describe() -> dict[str, Any]:
    """Hardware, system and versions, for the record."""
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cpus": len(affinity()),
        "l3_bytes": l3_bytes(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_features": list(kvcore.cpu_features()),
        "isa": kvcore.get_isa(),
        "isa_variables": {name: os.environ[name] for name in ISA_VARIABLES if name in os.environ},
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


class Pinning:
    """Keeps the calling thread on the first CPU and every peer's workers on the others.

    Left alone, the system now and then stacks a worker on its caller's CPU until the next tick.
    Where threads cannot be pinned this does nothing.
    """

    def __init__(self, num_threads: int) -> None:
        self._cpus = affinity()[:num_threads]
        self._known = _tasks()
        self._possible = len(self._cpus) == num_threads > 1 and bool(self._known)

    def __enter__(self) -> Pinning:
        if self._possible:
            os.sched_setaffinity(0, self._cpus[:1])
        return self

    def __exit__(self, *exception: object) -> None:
        if self._possible:
            os.sched_setaffinity(0, affinity())

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, the caller may run anywhere, and threads that come are left to the system."""
        if not self._possible:
            yield
            return
        self.place_new_threads()
        os.sched_setaffinity(0, affinity())
        try:
            yield
        finally:
            self._known = _tasks()
            os.sched_setaffinity(0, self._cpus[:1])

    def place_new_threads(self) -> None:
        """Call it after a peer's first run: spreads the threads that have come since the last."""
        if not self._possible:
            return
        tasks = _tasks()
        for place, task in enumerate(sorted(tasks - self._known)):
            with contextlib.suppress(OSError):  # the thread has ended
                os.sched_setaffinity(task, {self._cpus[1 + place % (len(self._cpus) - 1)]})
        self._known = tasks


class Waits:
    """How long this process's threads were ready to run and had no CPU: other programs' load."""

    def __init__(self) -> None:
        self._files = []
        for task in _tasks():
            with contextlib.suppress(OSError):
                self._files.append(os.open(f"/proc/self/task/{task}/schedstat", os.O_RDONLY))

    def __enter__(self) -> Waits:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files:
            os.close(file)

    def seconds(self) -> float:
        """Seconds so far, over all threads; 0 where the system does not tell."""
        return sum(_waited(self._files)) * 1e-9


def _waited(files: Iterable[int]) -> Iterable[int]:
    for file in files:
        with contextlib.suppress(OSError, IndexError):  # the thread has ended
            yield int(os.pread(file, 96, 0).split()[1])


def _tasks() -> set[int]:
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return set()


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
