"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..backend import known_backends

Command = TypeVar("Command", bound=Callable[..., Any])


def device_options(command: Command) -> Command:
    """Adds --backend and --device to a command."""
    backend = click.option("--backend", default="cpu", show_default=True,
                           type=click.Choice(known_backends()), help="What computes.")  # fmt: skip
    device = click.option("--device", type=click.IntRange(0), metavar="NUMBER",
                          help="The CUDA device; the current one when left out.")  # fmt: skip
    return backend(device(command))
