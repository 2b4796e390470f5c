"""What fits: the longest context, the most sequences, and what preallocation wastes."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore import checks
from kvcore.errors import InvalidArgument
from kvcore.planner.device import Device
from kvcore.planner.model import Model
from kvcore.planner.sizes import blocks_for
from kvcore.spec import CacheSpec

#: The part of a device's memory that is left for activations, kernels, and fragmentation.
RESERVE = 0.1
MOST_TOKENS = 1 << 30


@dataclass(frozen=True)
class Waste:
    """Slots that hold no token, contiguous and paged.

    Attributes:
        tokens: tokens that are held.
        contiguous_slots: slots where every sequence has room for the longest from the start.
        paged_slots: slots of whole blocks.
    """

    tokens: int
    contiguous_slots: int
    paged_slots: int

    @property
    def contiguous_waste(self) -> float:
        """The part of the slots that holds nothing, 0 to 1."""
        return 1 - self.tokens / self.contiguous_slots

    @property
    def paged_waste(self) -> float:
        """The part of the slots that holds nothing, 0 to 1."""
        return 1 - self.tokens / self.paged_slots


def kv_room(model: Model, device: Device, reserve: float = RESERVE, num_devices: int = 1) -> int:
    """Bytes that are left for the cache beside the weights; 0 where these do not fit.

    Args:
        model: the model.
        device: the device.
        reserve: the part of the memory that is left for everything else, 0 to 1.
        num_devices: devices whose memory is taken together.
    """
    if not 0 <= reserve < 1:
        raise InvalidArgument(f"reserve: expected at least 0 and below 1, got {reserve}")
    checks.integer(num_devices, "num_devices", 1)
    return max(0, int(device.memory * num_devices * (1 - reserve)) - model.weight_nbytes)


def longest_context(
    model: Model,
    device: Device,
    spec: CacheSpec,
    batch: int = 1,
    reserve: float = RESERVE,
    num_devices: int = 1,
) -> int | None:
    """The most tokens that each of `batch` sequences can grow to; 0: none fits, None: no limit.

    Whole blocks are counted. It may be beyond the model's max_context. There is no limit where
    every layer has a window and what they see fits.
    """
    room = kv_room(model, device, reserve, num_devices)

    def fits(length: int) -> bool:
        return blocks_for(spec, length, batch).nbytes <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= MOST_TOKENS and fits(high):
        low, high = high, 2 * high
    if high > MOST_TOKENS:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def most_sequences(
    model: Model,
    device: Device,
    spec: CacheSpec,
    length: int,
    reserve: float = RESERVE,
    num_devices: int = 1,
) -> int:
    """The most sequences of `length` tokens that fit at once, in whole blocks."""
    room = kv_room(model, device, reserve, num_devices)
    return room // blocks_for(spec, length).nbytes


def waste(lengths: tuple[int, ...], max_length: int, block_size: int = 64) -> Waste:
    """Slots for sequences of these lengths, preallocated to `max_length` and paged."""
    for length in lengths:
        checks.integer(length, "lengths", 1, max_length)
    paged = sum(-(-length // block_size) * block_size for length in lengths)
    return Waste(sum(lengths), max_length * len(lengths), paged)
