"""The compiler's cache: kept by content, whole or not at all, found again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import BackendUnavailable
from kvcore_gpu import compiler, nvrtc, sources

ARCH = "sm_90"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("KVCORE_CACHE_DIR", str(tmp_path))
    compiler.cache_folder.cache_clear()
    yield tmp_path / "cubin"
    compiler.cache_folder.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that went to NVRTC, which is stood in for."""
    names: list[str] = []

    def compile(self: nvrtc.Nvrtc, name: str, texts: object, options: object) -> tuple[bytes, str]:
        names.append(name)
        return f"cubin {len(names)}".encode(), LOG

    library = object.__new__(nvrtc.Nvrtc)
    library.version = (13, 0)
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", compile)
    monkeypatch.setattr(nvrtc, "load", lambda: library)
    return names


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 7.8 ms
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_resources_are_read_from_the_log(folder: Path, compiled: list[str]) -> None:
    assert compiler.compile_kernel("merge_states.cu", {}, ARCH).resources == {
        "first": compiler.Resources(40, 512, 16, 8, 4),
        "second": compiler.Resources(12, 0, 0, 0, 0),
    }


def test_a_cubin_is_compiled_once(folder: Path, compiled: list[str]) -> None:
    first = compiler.compile_kernel("merge_states.cu", {"A": 1, "B": 2}, ARCH)
    assert compiler.compile_kernel("merge_states.cu", {"B": 2, "A": 1}, ARCH) == first
    assert first.path.parent == folder and first.path.read_bytes() == b"cubin 1"
    assert compiled == ["merge_states.cu"]


def test_those_who_need_it_at_once_wait_for_one(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = nvrtc.Nvrtc.compile

    def slowly(*arguments: Any) -> tuple[bytes, str]:
        time.sleep(0.05)
        return compile(*arguments)

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: compiler.compile_kernel("merge_states.cu", {}, ARCH), range(4))
        )
    assert found == found[:1] * 4 and compiled == ["merge_states.cu"]


def test_whatever_matters_makes_another(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def path() -> Path:
        return compiler.compile_kernel("merge_states.cu", {}, ARCH).path

    paths = {
        path(),
        compiler.compile_kernel("merge_states.cu", {"A": 1}, ARCH).path,
        compiler.compile_kernel("merge_states.cu", {}, "sm_80").path,
        compiler.compile_kernel("copy_blocks.cu", {}, ARCH).path,
    }
    nvrtc.load().version = (13, 1)
    paths.add(path())
    # A header that is included by a header.
    read = sources.read
    monkeypatch.setattr(
        sources, "read", lambda name: (read(name) or "") + ("//" if name == "device.cuh" else "")
    )
    paths.add(path())
    assert len(paths) == len(compiled) == 6


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_damaged_file_is_made_again(
    folder: Path, compiled: list[str], suffix: str, damage: str
) -> None:
    path = compiler.compile_kernel("merge_states.cu", {}, ARCH).path.with_suffix(suffix)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    again = compiler.compile_kernel("merge_states.cu", {}, ARCH)
    assert again.path.read_bytes() == b"cubin 2"
    assert compiler.compile_kernel("merge_states.cu", {}, ARCH) == again and len(compiled) == 2


def test_many_at_once_leave_whole_files(folder: Path) -> None:
    _need_nvrtc()
    with ThreadPoolExecutor(4) as pool:
        cubins = list(
            pool.map(lambda _: compiler.compile_kernel("merge_states.cu", {}, ARCH), range(8))
        )
    assert len({cubin.path for cubin in cubins}) == 1
    assert cubins[0].path.read_bytes()[:4] == b"\x7fELF"
    assert sorted(path.suffix for path in folder.iterdir()) == [".cubin", ".json", ".lock"]


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVCORE_CACHE_DIR", str(tmp_path / "file"))
    compiler.cache_folder.cache_clear()
    try:
        path = compiler.compile_kernel("merge_states.cu", {}, ARCH).path
    finally:
        compiler.cache_folder.cache_clear()
    assert tmp_path not in path.parents and path.read_bytes() == b"cubin 1"


def test_errors_show_the_log() -> None:
    _need_nvrtc()
    text = {"bad.cu": "__device__ int f() { return nonsense; }"}
    with pytest.raises(nvrtc.CompileError, match=r'bad\.cu.*\n.*"nonsense" is undefined'):
        nvrtc.load().compile("bad.cu", text, ["-arch=sm_90"])
    with pytest.raises(nvrtc.CompileError, match="sm_1"):
        compiler.compile_source("merge_states.cu", {}, "sm_1")


def test_without_nvrtc_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter([Path("/nowhere/libnvrtc.so.13")]))
    nvrtc.load.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match=r'pip install "kvcore\[cuda\]"') as info:
            nvrtc.load()
    finally:
        nvrtc.load.cache_clear()
    assert "/nowhere/libnvrtc.so.13" in str(info.value)


def test_a_source_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"kernels/nothing\.cu"):
        sources.collect("nothing.cu")


def test_collects_what_headers_include() -> None:
    texts = sources.collect("copy_blocks.cu")
    assert next(iter(texts)) == "copy_blocks.cu"
    assert {"device.cuh", "params.cuh", "formats.cuh", "kvcore/formats.h"} <= set(texts)


def _need_nvrtc() -> None:
    try:
        nvrtc.load()
    except BackendUnavailable as error:
        pytest.skip(str(error))
