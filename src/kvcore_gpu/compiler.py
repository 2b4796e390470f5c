"""Kernels' sources into cubins, which are kept in a folder of the user's under what they came from.

Environment: KVCORE_CACHE_DIR is that folder; else it is kvcore/ in XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from kvcore_gpu import nvrtc, sources

__all__ = ["Cubin", "Resources", "compile_kernel", "compile_source"]

# Sources whose arithmetic is compared with the CPU's in bits: no product and sum are fused there.
UNFUSED = frozenset({"append.cu", "quantize.cu", "read.cu"})


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a multiprocessor.

    Attributes:
        registers: of each thread.
        shared: bytes of static shared memory of each block.
        stack, spill_stores, spill_loads: bytes of each thread that did not fit into registers.
    """

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Cubin:
    """A compiled source on disk.

    Attributes:
        path: a file that the driver loads.
        resources: of each of its kernels, by name.
    """

    path: Path
    resources: dict[str, Resources]


def compile_kernel(source: str, defines: Mapping[str, int | str], arch: str) -> Cubin:
    """The cubin of kernels/`source`, compiled unless an earlier process has done it.

    Args:
        source: such as "decode.cu".
        defines: the macros of the specialisation.
        arch: such as "sm_90".

    Raises:
        BackendUnavailable: NVRTC is not installed.
        CompileError: NVRTC does not know the architecture, or refuses the source.
    """
    texts = sources.collect(source)
    options = _options(source, defines, arch)
    version = ".".join(map(str, nvrtc.load().version))
    key = sources.digest(texts, source, *options, f"nvrtc {version}")
    path = cache_folder() / f"{Path(source).stem}-{arch}-{key}.cubin"
    found = _find(path)
    if found is not None:
        return found
    with _alone_with(path):
        found = _find(path)  # another process may have been at it
        if found is None:
            found = _keep(path, *_compile(source, texts, options))
    return found


def compile_source(
    source: str, defines: Mapping[str, int | str], arch: str
) -> tuple[bytes, dict[str, Resources]]:
    """The cubin's bytes and its kernels' resources; nothing is looked up or kept."""
    return _compile(source, sources.collect(source), _options(source, defines, arch))


def _options(source: str, defines: Mapping[str, int | str], arch: str) -> list[str]:
    options = [f"-arch={arch}", "-std=c++17", "-default-device", "-lineinfo"]
    options += ["--ptxas-options=-v"]
    options += ["--fmad=false"] if source in UNFUSED else []
    return options + [f"-D{name}={value}" for name, value in sorted(defines.items())]


def _compile(
    source: str, texts: Mapping[str, str], options: list[str]
) -> tuple[bytes, dict[str, Resources]]:
    code, log = nvrtc.load().compile(source, texts, options)
    return code, _parse_resources(log)


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def _parse_resources(log: str) -> dict[str, Resources]:
    found = {}
    for match in _ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = ("registers", "stack", "spill_stores", "spill_loads")
        found[match["name"]] = Resources(
            shared=int(shared[1]) if shared else 0, **{name: int(match[name]) for name in numbers}
        )
    return found


# ---- the folder


@cache
def cache_folder() -> Path:
    """Where cubins are kept; a folder of this process alone where that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("KVCORE_CACHE_DIR") or Path(base, "kvcore"), "cubin")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return Path(_own_folder().name)
    return folder


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvcore-")


@contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """Holds off others who would compile the same, as the processes of a parallel run do at once.

    Where files cannot be locked, as on some network file systems, each compiles for itself.
    """
    with path.with_suffix(".lock").open("ab") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find(path: Path) -> Cubin | None:
    """What is kept there; None: nothing, or not what was written."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        if record["sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
            return None
        resources = {name: Resources(**numbers) for name, numbers in record["resources"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Cubin(path, resources)


def _keep(path: Path, code: bytes, resources: dict[str, Resources]) -> Cubin:
    """Writes both files, each whole or not at all: others may read and write the same now."""
    record = {
        "sha256": hashlib.sha256(code).hexdigest(),
        "resources": {name: asdict(numbers) for name, numbers in resources.items()},
    }
    _write(path, code)
    _write(path.with_suffix(".json"), json.dumps(record).encode())
    return Cubin(path, resources)


def _write(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
