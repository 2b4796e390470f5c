"""Types of command line arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from itertools import chain


def names(*known: Collection[str]) -> Callable[[str], list[str]]:
    """Comma-separated names, each of one of these collections."""

    def parse(text: str) -> list[str]:
        every = list(chain(*known))
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in every]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"one or more of {', '.join(every)} expected, got {', '.join(unknown)}"
            )
        return names

    return parse


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 expected, got {value}")
    return value
