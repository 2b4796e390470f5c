"""Decoding asks the system for no memory once it has run."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

import kvcore


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts by glibc's own names")
@pytest.mark.skipif("KVCORE_TEST_LIBRARY" in os.environ, reason="sanitizers allocate on their own")
def test_append_and_attend_allocate_in_their_first_steps_only(tmp_path: Path) -> None:
    program, library = tmp_path / "count", kvcore.get_library_dir()
    subprocess.run(
        [
            *shlex.split(sysconfig.get_config_var("CC") or "cc"), "-std=c11", "-O1", "-Wall",
            "-Wextra", "-Werror", str(Path(__file__).with_name("count_allocations.c")),
            f"-I{kvcore.get_include()}/kvcore", f"-L{library}", f"-Wl,-rpath,{library}",
            "-lkvcore", "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    first, later, with_books = map(int, done.stdout.split())
    assert first > 0, "nothing is counted"
    assert later == 0
    assert with_books <= 10, "begin and commit allocate when a list grows, not with each step"
