"""Looking things up by name, with a hint where a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from kvcore.errors import InvalidArgument, InvalidType

T = TypeVar("T")


def find(table: Mapping[str, T], name: str, argument: str) -> T:
    """The entry called `name`, in either case.

    Raises:
        InvalidArgument: there is none; the message names the nearest ones, or all.
    """
    if not isinstance(name, str):
        raise InvalidType(f"{argument}: expected a name, got {type(name).__name__}")
    found = table.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), table, n=4, cutoff=0.5)
    hint = f"near it are {', '.join(near)}" if near else f"there are {', '.join(table)}"
    raise InvalidArgument(f"{argument}: {name!r} is unknown; {hint}")
