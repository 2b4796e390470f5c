"""What kvcore is measured beside. A peer prepares tasks for a case; see `Workload`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from bench.cases import Case, Data
from bench.measure import Task

#: More copies of a small append would take longer to fill than to measure.
MAX_APPEND_LAYERS = 64


@dataclass(frozen=True, eq=False)
class Workload:
    """What a peer gets.

    Attributes:
        num_threads: threads that the peer may use.
        cold_bytes: K and V that a peer walks through at least, so that they come from memory.
    """

    case: Case
    kv_format: str
    data: Data
    num_threads: int
    cold_bytes: int = 0

    @property
    def num_layers(self) -> int:
        """Copies of the cache to walk through."""
        layers = max(2, -(-self.cold_bytes // self.case.kv_bytes(self.kv_format)))
        return min(layers, MAX_APPEND_LAYERS) if self.case.kind == "append" else layers


@dataclass(frozen=True)
class Peer:
    """How a peer is measured.

    Attributes:
        prepare: workload -> {name: task}, without tasks for a case that the peer does not offer.
        pinned: its threads may be pinned. A peer that is not picks its threads anew for each call.

    `prepare` raises `PeerAbsent` when the peer cannot do the case here.
    """

    prepare: Callable[[Workload], dict[str, Task]]
    pinned: bool = True


NAMES = ("numpy", "torch", "torch-matmul", "torch-flex", "onnxruntime", "openvino")


class PeerAbsent(Exception):
    """The peer is not installed, not the version that is compared with, or cannot do a case."""


def load(name: str) -> Peer:
    """The peer of a name in NAMES.

    Raises:
        PeerAbsent: the message says what is missing.
    """
    try:
        peer: Peer = importlib.import_module(f"bench.peers.{name.replace('-', '_')}").PEER
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "bench", "kvcore"):
            raise
        raise PeerAbsent(f'{package} is not installed: pip install ".[bench-peers]"') from None
    return peer
