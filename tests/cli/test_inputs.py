"""Prompts from arguments, stdin and files."""

from __future__ import annotations

import io

import pytest

from kvcore.cli.inputs import parse_prompts, read_prompts
from kvcore.errors import InvalidArgument


def test_arguments_stdin_and_file_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nstdin\n"))
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n")
    prompts = read_prompts(("first", "-"), str(file))
    assert prompts == ["first", "from\nstdin", "one", "  two "]


def test_lines_from_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    assert read_prompts((), "-") == ["a", "b"]


def test_json_lines():
    text = '{"prompt": "two\\nlines"}\n\n{"prompt": "b", "id": 7}\n'
    assert parse_prompts(text, "x") == ["two\nlines", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one prompt in x"),
        ("\n \n", "at least one prompt in x"),
        ('{"prompt": "a"}\nplain', "at x:2, got plain"),
        ('{"text": "a"}', "at x:1"),
        ('{"prompt": 5}', "at x:1"),
        ("{", "at x:1"),
        ('{"prompt": "a"}\n[1]', "at x:2"),
    ],
)
def test_bad_files_are_told_by_line(text, message):
    with pytest.raises(InvalidArgument, match=rf"^file: expected .*{message}"):
        parse_prompts(text, "x")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(InvalidArgument, match="nowhere: No such file"):
        read_prompts((), str(tmp_path / "nowhere"))
    latin = tmp_path / "latin"
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(InvalidArgument, match="latin: it is not UTF-8"):
        read_prompts((), str(latin))


def test_nothing_to_continue():
    with pytest.raises(InvalidArgument, match="got nothing"):
        read_prompts((), None)
