"""Prompts from the command line, from stdin and from files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..errors import InvalidArgument


def read_prompts(arguments: tuple[str, ...], file: str | None) -> list[str]:
    """All prompts, in order: the arguments ("-" is the whole of stdin), then the file's.

    Raises:
        InvalidArgument: there is no prompt, or the file cannot be read as described.
    """
    prompts = [_stdin().rstrip("\n") if text == "-" else text for text in arguments]
    if file is not None:
        prompts += parse_prompts(_stdin() if file == "-" else _read(file), file)
    if not prompts:
        raise InvalidArgument('prompt: expected a text, "-" for stdin, or --file, got nothing')
    return prompts


def parse_prompts(text: str, name: str) -> list[str]:
    """One prompt a line. If the first begins with "{", each line is JSON: {"prompt": "..."}.

    Empty lines are skipped.

    Raises:
        InvalidArgument: a line is not such an object, or there is none.
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InvalidArgument(f"file: expected at least one prompt in {name}, got none")
    if not lines[0][1].lstrip().startswith("{"):
        return [line for _, line in lines]
    return [_prompt_of(line, f"{name}:{number}") for number, line in lines]


def _prompt_of(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
        if isinstance(prompt, str):
            return prompt
    except (ValueError, KeyError, TypeError):
        pass
    raise InvalidArgument(f'file: expected {{"prompt": "..."}} at {place}, got {line.strip()[:60]}')


def _stdin() -> str:
    return sys.stdin.read()


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidArgument(f"file: expected a readable text file at {file}: {reason}") from None
