"""Who may know whom, read from the imports and includes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
CORE = SRC / "kvcore" / "core"
INCLUDE = SRC / "kvcore" / "include" / "kvcore"

CONTROL_PLANE = [
    "block_pool", "cache", "check", "prefix_index", "sequence_ops", "sequences", "step",
    "step_plan", "step_slots",
]  # fmt: skip
# What kvcore_gpu may know of kvcore.
SHARED_WITH_GPU = tuple(
    f"kvcore.{name}" for name in (
        "arrays", "attend_options", "backend", "checks", "contiguous", "errors", "formats",
        "quantize", "spec", "user_blocks",
    )
)  # fmt: skip
CLIENTS = (
    "kvcore.cli", "kvcore.evaluation", "kvcore.models", "kvcore.parity", "kvcore.planner",
)  # fmt: skip

# ---- the C core


def without_comments(path: Path) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(), flags=re.DOTALL)


def files_of(stem: str) -> list[Path]:
    files = [
        CORE / f"{stem}{suffix}" for suffix in (".c", ".h") if (CORE / f"{stem}{suffix}").exists()
    ]
    assert files, f"core/{stem} is gone: mend CONTROL_PLANE"
    return files


def control_plane_files() -> list[Path]:
    return [path for stem in CONTROL_PLANE for path in files_of(stem)]


def data_plane_files() -> list[Path]:
    control = set(control_plane_files())
    return [path for path in sorted(CORE.rglob("*.[ch]")) if path not in control]


def included_files(path: Path) -> Iterator[Path]:
    """What a file includes by name in quotes, where the compiler would find it."""
    for name in re.findall(r'#include "([^"]+)"', without_comments(path)):
        places = [path.parent / name, INCLUDE / name, CORE / name]
        found = [place.resolve() for place in places if place.exists()]
        assert found, f"{path}: {name} is not in the tree"
        yield found[0]


def include_closure(path: Path) -> set[Path]:
    seen: set[Path] = set()
    pending = [path.resolve()]
    while pending:
        for included in included_files(pending.pop()):
            if included not in seen:
                seen.add(included)
                pending.append(included)
    return seen


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.[ch]")), ids=lambda path: path.name)
def test_core_includes_neither_python_nor_cuda(path: Path) -> None:
    includes = re.findall(r'#include\s*[<"]([^>"]+)[>"]', without_comments(path))
    foreign = re.compile(r"python|numpy|cython|cuda|nvrtc|cublas", re.IGNORECASE)
    assert not [name for name in includes if foreign.search(name)]


@pytest.mark.parametrize("path", control_plane_files(), ids=lambda path: path.name)
def test_control_plane_includes_itself_and_the_door(path: Path) -> None:
    allowed = {*control_plane_files(), INCLUDE / "kvcore.h", INCLUDE / "formats.h"}
    assert include_closure(path) <= {file.resolve() for file in allowed}


@pytest.mark.parametrize("path", control_plane_files(), ids=lambda path: path.name)
def test_control_plane_knows_no_dtype_and_no_storage(path: Path) -> None:
    words = r"\b(?:kv_dtype|KV_DTYPE|kv_format|KV_FORMAT|kv_blocks|kv_rows|float|double)\w*"
    assert re.findall(words, without_comments(path)) == []


@pytest.mark.parametrize("path", data_plane_files(), ids=lambda path: path.name)
def test_data_plane_knows_no_sequence(path: Path) -> None:
    # A plan is data and may be read; what made it may not.
    words = r"\bkv_(?:sequence|cache|step)(?:_\w+)?\b"
    assert re.findall(words, without_comments(path)) == []


def test_kernels_know_no_plan() -> None:
    files = sorted((CORE / "kernels").glob("*.[ch]"))
    assert files
    assert [path.name for path in files if "kv_plan" in without_comments(path)] == []


# ---- Python


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all that a module imports, anywhere in it."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            source = ".".join([*base, node.module or ""] if node.level else [node.module or ""])
            source = source.strip(".")
            # `from kvcore import models` imports a module too.
            modules |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return modules


def inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def python_files(package: str) -> list[Path]:
    files = sorted((SRC / package).rglob("*.py"))
    assert files
    return files


CLIENT_FILES = [path for path in python_files("kvcore") if inside(module_name(path), CLIENTS)]
# `python -m kvcore` is the command line.
NO_LIBRARY = {*CLIENT_FILES, SRC / "kvcore" / "__main__.py"}
LIBRARY_FILES = [path for path in python_files("kvcore") if path not in NO_LIBRARY]


def relative(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=relative)
def test_library_imports_no_client(path: Path) -> None:
    assert not [module for module in imported_modules(path) if inside(module, CLIENTS)]


@pytest.mark.parametrize("path", CLIENT_FILES, ids=relative)
def test_clients_use_the_public_interface(path: Path) -> None:
    private = ("kvcore._native", "kvcore.cpu_backend", "kvcore_gpu")
    assert not [module for module in imported_modules(path) if inside(module, private)]


def test_models_do_not_import_the_command_line() -> None:
    modules = {
        module for path in python_files("kvcore/models") for module in imported_modules(path)
    }
    assert not [module for module in modules if inside(module, ("kvcore.cli",))]


def test_only_the_registry_names_the_gpu_package() -> None:
    sources = [path for path in (SRC / "kvcore").rglob("*.py*") if path.suffix in {".py", ".pyx"}]
    assert [relative(path) for path in sources if "kvcore_gpu" in path.read_text()] == [
        "kvcore/backend.py"
    ]


@pytest.mark.parametrize("path", python_files("kvcore_gpu"), ids=relative)
def test_gpu_package_imports_what_both_backends_share(path: Path) -> None:
    modules = {module for module in imported_modules(path) if inside(module, ("kvcore",))}
    assert not {m for m in modules - {"kvcore"} if not inside(m, SHARED_WITH_GPU)}


@pytest.mark.parametrize("path", sorted((SRC / "kvcore" / "_native").glob("*.pyx")), ids=relative)
def test_native_layer_does_no_arithmetic(path: Path) -> None:
    assert not re.search(r"libc\.math|\bprange\b|\bcdef (?:float|double) \w+ *=", path.read_text())


IMPORT_PROBE = """
import sys
before = set(sys.modules)
import kvcore
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(roots - set(sys.stdlib_module_names)))
"""


def test_import_brings_in_numpy_only() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, check=True
    )
    # Cython's extensions share types through modules of this kind that exist in memory only.
    roots = {root for root in result.stdout.split() if not re.match(r"_?cython_", root)}
    assert roots == {"kvcore", "numpy"}
