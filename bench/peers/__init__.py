"""What kvcore is measured beside. A peer prepares tasks for a case; see `Workload`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from bench.cases import Case, Data
from bench.measure import Task


@dataclass(frozen=True)
class Workload:
    """What a peer gets.

    Attributes:
        num_layers: copies of the cache to walk through.
        num_threads: threads that the peer may use.
    """

    case: Case
    kv_format: str
    data: Data
    num_layers: int
    num_threads: int


Prepare = Callable[[Workload], dict[str, Task]]

NAMES = ("numpy", "torch")


class PeerAbsent(Exception):
    """The peer is not installed, or not the version that results are compared with."""


def load(name: str) -> Prepare:
    """The `prepare` function of a peer: workload -> {name: task}.

    Raises:
        PeerAbsent: the message says what is missing.
    """
    prepare: Prepare = importlib.import_module(f"bench.peers.{name}").prepare
    return prepare
