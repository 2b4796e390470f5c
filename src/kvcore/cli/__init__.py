"""The command line: `kvcore generate`, `info`, `demo`, `eval` and `parity`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line of this process and exits."""
    try:
        import click  # noqa: F401
    except ImportError:
        sys.exit('error: the command line needs click; run: pip install "kvcore[cli]"')
    from .app import app

    app()
