"""Offload: fetching a cached prefix from the host against computing it again."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.planner.cost import prefill
from kvcore.planner.device import Device
from kvcore.planner.model import Model
from kvcore.planner.sizes import blocks_for
from kvcore.spec import CacheSpec


@dataclass(frozen=True)
class Offload:
    """A prefix of `length` tokens that left the device.

    Attributes:
        length: tokens.
        nbytes: bytes of its blocks.
        fetch_seconds: the least time to copy them back from the host's memory.
        recompute_seconds: the least time to prefill it again.
    """

    length: int
    nbytes: int
    fetch_seconds: float
    recompute_seconds: float

    @property
    def gain(self) -> float:
        """Time to recompute over time to fetch: above 1, fetching is the faster."""
        return self.recompute_seconds / self.fetch_seconds


def offload(model: Model, device: Device, spec: CacheSpec, length: int) -> Offload:
    """What it takes to have a prefix of `length` tokens back."""
    nbytes = blocks_for(spec, length).nbytes
    seconds = prefill(model, spec, length).seconds(device)
    return Offload(length, nbytes, nbytes / device.host_bandwidth, seconds)
