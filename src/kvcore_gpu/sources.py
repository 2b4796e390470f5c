"""The kernels' sources, which are data of this package, with the headers that they include."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

__all__ = ["collect", "digest", "read"]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


@cache
def read(name: str) -> str | None:
    """The text of a source as an #include names it; None: it is not ours.

    "decode.cu" is a file of kernels/, "kvcore/formats.h" one of the C core's headers.
    """
    package, folder = (
        ("kvcore", "include") if name.startswith("kvcore/") else (__package__, "kernels")
    )
    file = files(package).joinpath(folder, *name.split("/"))
    return file.read_text(encoding="utf-8") if file.is_file() else None


def collect(name: str, changed: Mapping[str, str] | None = None) -> dict[str, str]:
    """A source and all that it includes, directly or not, by name; itself first.

    Args:
        name: a file of kernels/.
        changed: texts that stand for those of the package.

    Raises:
        FileNotFoundError: there is no such source. Includes that are not ours are left out: the
            compiler knows them, or says that it does not.
    """
    texts: dict[str, str] = {}
    pending = [name]
    while pending:
        included = pending.pop(0)
        text = (changed or {}).get(included) or read(included)
        if text is None or included in texts:
            continue
        texts[included] = text
        pending += _INCLUDE.findall(text)
    if name not in texts:
        raise FileNotFoundError(f"kernels/{name}: no such source")
    return texts


def digest(texts: Mapping[str, str], *others: str) -> str:
    """A name for what these texts and anything else that matters compile to."""
    sha = hashlib.sha256()
    for part in [text for item in sorted(texts.items()) for text in item] + list(others):
        data = part.encode()
        sha.update(f"{len(data)}:".encode() + data)
    return sha.hexdigest()[:32]
