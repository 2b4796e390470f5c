"""Sizes of memory as people write them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from kvcore.errors import InvalidArgument, InvalidType

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")

#: What memory="auto" takes of the memory that is available.
AUTO_SHARE = 0.5


def parse_bytes(
    size: int | str, argument: str = "memory", available: Callable[[], int] | None = None
) -> int:
    """Bytes of "2GiB", "512 MB", "1.5GiB", "auto" or a plain number.

    Args:
        size: as above; "auto" is AUTO_SHARE of what is available.
        argument: named in messages.
        available: gives the bytes that are; `available_memory` when left out.

    Raises:
        InvalidArgument: the text is no size, or the size is not positive.
        InvalidType: neither an int nor a str.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise InvalidType(
            f'{argument}: expected bytes or a text like "2GiB", got {type(size).__name__}'
        )
    if size == "auto":
        return int((available or available_memory)() * AUTO_SHARE)
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise InvalidArgument(
                f'{argument}: expected a size like "2GiB", "512MB" or "auto", got {size!r}'
            )
        size = int(float(match[1]) * unit)
    if size <= 0:
        raise InvalidArgument(f"{argument}: expected more than 0 bytes, got {size}")
    return size


def format_bytes(nbytes: int) -> str:
    """2147483648 -> "2 GiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def available_memory() -> int:
    """Bytes that the process can still take: the least of what the system and the cgroup have."""
    limits = [
        _system_available(),
        _cgroup_left("memory.max", "memory.current"),
        _cgroup_left("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ]
    return min(limit for limit in limits if limit is not None)


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_left(limit: str, usage: str) -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        return max(int((root / limit).read_text()) - int((root / usage).read_text()), 0)
    except (OSError, ValueError):
        return None  # no such file, or "max"
