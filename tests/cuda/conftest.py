"""Runtimes that the kernels' tests run on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cuda_emulator import build
from cuda_emulator.runtime import EmulatedRuntime

# Cubins of tests are kept with what else is built, not with the user's.
os.environ.setdefault("KVCORE_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if build.compiler() is not None:
        return
    skip = pytest.mark.skip(reason="the emulator needs a C++ compiler")
    for item in items:
        if {"runtime", "checked"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(skip)


@pytest.fixture
def runtime() -> EmulatedRuntime:
    """The emulator, as KVCORE_EMULATOR wishes it."""
    return EmulatedRuntime()


@pytest.fixture(params=["ascending", "descending", "random"])
def checked(request: pytest.FixtureRequest) -> EmulatedRuntime:
    """The emulator in check mode, with each order of threads."""
    return EmulatedRuntime(check=True, order=request.param)
