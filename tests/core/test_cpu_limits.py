"""The quota of the process's cgroups, from files as the system has them."""

from __future__ import annotations

import ctypes as ct
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "src" / "kvcore" / "core"
UNLIMITED = 2**31 - 1

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")


@pytest.fixture(scope="module")
def cgroup_cpus(tmp_path_factory):
    """kv_cgroup_cpus, which the library does not export."""
    target = tmp_path_factory.mktemp("limits") / "limits.so"
    subprocess.run(
        [
            *shlex.split(sysconfig.get_config_var("CC") or "cc"), "-std=c11", "-O1", "-shared",
            "-fPIC", str(CORE / "cpu_limits.c"), "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    library = ct.CDLL(str(target))
    return lambda root: library.kv_cgroup_cpus(str(root).encode())


@pytest.fixture
def system(tmp_path):
    """Writes files below a root, given by their paths; returns the root."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


UNIFIED = {"proc/self/cgroup": "0::/a/b\n"}
LEGACY = {"proc/self/cgroup": "12:memory:/a\n4:cpu,cpuacct:/a/b\n"}
TOP, LEGACY_TOP = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, UNLIMITED),
        (UNIFIED, UNLIMITED),
        (UNIFIED | {f"{TOP}/a/b/cpu.max": "max 100000\n"}, UNLIMITED),
        (UNIFIED | {f"{TOP}/a/b/cpu.max": "300000 100000\n"}, 3),
        (UNIFIED | {f"{TOP}/a/b/cpu.max": "250000 100000\n"}, 3),
        (UNIFIED | {f"{TOP}/a/b/cpu.max": "1000 100000\n"}, 1),
        # The tightest of a group and those above it.
        (
            UNIFIED
            | {
                f"{TOP}/a/b/cpu.max": "800000 100000\n",
                f"{TOP}/a/cpu.max": "200000 100000\n",
                f"{TOP}/cpu.max": "max 100000\n",
            },
            2,
        ),
        # In a container the path may be the host's, and the mount point the container's own group.
        (UNIFIED | {f"{TOP}/cpu.max": "500000 100000\n"}, 5),
        (UNIFIED | {f"{TOP}/a/b/cpu.max": "nonsense\n"}, UNLIMITED),
        (
            LEGACY
            | {
                f"{LEGACY_TOP}/a/b/cpu.cfs_quota_us": "150000\n",
                f"{LEGACY_TOP}/a/b/cpu.cfs_period_us": "50000\n",
            },
            3,
        ),
        (
            LEGACY
            | {
                f"{LEGACY_TOP}/a/b/cpu.cfs_quota_us": "-1\n",
                f"{LEGACY_TOP}/a/b/cpu.cfs_period_us": "50000\n",
            },
            UNLIMITED,
        ),
        # Another controller's path means nothing.
        (
            {"proc/self/cgroup": "3:cpuset:/a\n"}
            | {
                f"{LEGACY_TOP}/a/cpu.cfs_quota_us": "100000\n",
                f"{LEGACY_TOP}/a/cpu.cfs_period_us": "100000\n",
            },
            UNLIMITED,
        ),
    ],
)
def test_quota(cgroup_cpus, system, files, expected):
    assert cgroup_cpus(system(files)) == expected


def test_a_root_that_is_too_long_is_no_quota(cgroup_cpus):
    assert cgroup_cpus("/" + "x" * 5000) == UNLIMITED


def test_this_process_has_as_many_threads_as_it_may_use(cgroup_cpus):
    code = "from core.library import lib; print(lib.kv_get_num_threads())"
    environment = {k: v for k, v in os.environ.items() if k != "KVCORE_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == min(len(os.sched_getaffinity(0)), cgroup_cpus(""), 256)
