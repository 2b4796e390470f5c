"""Compiles the bench's own C."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import kvcore
from bench.machine import out_dir


def compile_probe(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of one C file, compiled when it, kvcore's headers or the flags have changed.

    Raises:
        RuntimeError: there is no working C compiler ($CC, else cc).
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    head, tail = [*compiler, "-O3", "-fPIC", "-shared", str(source)], list(flags)
    texts = [
        path.read_bytes() for path in (source, *sorted(Path(kvcore.get_include()).rglob("*.h")))
    ]
    key = hashlib.sha256(b"".join(texts) + repr((compiler, tail)).encode()).hexdigest()[:12]
    target = out_dir() / f"{source.stem}-{key}.so"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [*head, "-o", str(unfinished), *tail]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(f"the bench needs a C compiler: {error}") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{shlex.join(error.cmd)} failed:\n{error.stderr}") from None
        unfinished.replace(target)
    return ctypes.CDLL(str(target))
