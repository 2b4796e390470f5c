"""The C check program: natively, under sanitizers and for AArch64 where the tools are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("check_data_plane.sh")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["native", "asan", "tsan", "neon"])
def test_check_program(mode: str) -> None:
    needed = ["aarch64-linux-gnu-gcc", "qemu-aarch64"] if mode == "neon" else ["cc"]
    missing = [tool for tool in needed if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = subprocess.run([SCRIPT, mode], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")
