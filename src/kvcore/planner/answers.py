"""Plan: one model on one device, with every answer of the planner."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvcore import checks
from kvcore.planner import capacity, cost, parallel, sizes, strategies
from kvcore.planner.cost import StepCost
from kvcore.planner.device import Device, get_device
from kvcore.planner.model import Model
from kvcore.planner.models import get_model
from kvcore.planner.offloading import Offload, offload
from kvcore.planner.parallel import Split
from kvcore.planner.savings import Recompute, recompute
from kvcore.planner.sizes import Growth, LayerBytes, Memory, ScoreMemory
from kvcore.planner.strategies import Strategy
from kvcore.spec import CacheSpec

GENERATED = 100


@dataclass(frozen=True)
class Plan:
    """What `plan` answers.

    Attributes:
        model, device, spec: what was asked about.
        batch, context: sequences, and tokens of each.
        chunk: new tokens of the largest step.
        reserve: the part of the device's memory that is left for everything else.
        layer_bytes: bytes of a token in each layer.
        memory: weights, activations and cache at this batch and context.
        room: bytes for the cache beside weights and reserve.
        longest_context: tokens that each of `batch` sequences can grow to; None: no limit.
        most_sequences: sequences of `context` tokens that fit.
        waste: slots without a token, contiguous and paged.
        growth: bytes over lengths, for one sequence and for `batch`.
        decode, prefill: what a step costs.
        scores: memory of a prefill's scores.
        recompute: the same text with a cache and without.
        strategies: bytes by other means.
        splits: over `num_devices` devices; empty for one.
        offload: fetching a sequence against computing it again.
    """

    model: Model
    device: Device
    spec: CacheSpec
    batch: int
    context: int
    chunk: int
    reserve: float
    layer_bytes: tuple[LayerBytes, ...]
    memory: Memory
    room: int
    longest_context: int | None
    most_sequences: int
    waste: capacity.Waste
    growth: Growth
    decode: StepCost
    prefill: StepCost
    scores: ScoreMemory
    recompute: Recompute
    strategies: tuple[Strategy, ...]
    splits: tuple[Split, ...]
    offload: Offload

    @property
    def fits(self) -> bool:
        """Whether this batch at this context fits beside weights and reserve."""
        return self.memory.kv <= self.room


def plan(
    model: Model | str,
    device: Device | str,
    batch: int = 1,
    context: int | None = None,
    k_format: str = "bf16",
    v_format: str | None = None,
    *,
    block_size: int = 64,
    chunk: int = 2048,
    reserve: float = capacity.RESERVE,
    num_devices: int = 1,
    lengths: Iterable[int] | None = None,
) -> Plan:
    """All answers for one model on one device.

    Args:
        model, device: one, or the name of a built-in one.
        batch, context: sequences, and tokens of each; the model's max_context when left out.
        k_format, v_format: how K and V are stored; v_format is k_format when left out.
        block_size: token slots of a block.
        chunk: new tokens of the largest step.
        reserve: the part of the device's memory that is left for activations and everything else.
        num_devices: devices of this kind that the model is split over.
        lengths: for the growth; powers of two up to twice the context when left out.

    Raises:
        InvalidArgument, InvalidType: naming the argument.
    """
    shape = get_model(model) if isinstance(model, str) else model
    place = get_device(device) if isinstance(device, str) else device
    length = shape.max_context if context is None else checks.integer(context, "context", 1)
    checks.integer(batch, "batch", 1)
    spec = shape.cache_spec(k_format, v_format, block_size=block_size)
    columns = _powers(2 * length) if lengths is None else tuple(lengths)
    return Plan(
        model=shape,
        device=place,
        spec=spec,
        batch=batch,
        context=length,
        chunk=chunk,
        reserve=reserve,
        layer_bytes=sizes.layer_bytes(spec),
        memory=sizes.memory(shape, spec, length, batch, chunk),
        room=capacity.kv_room(shape, place, reserve, num_devices),
        longest_context=capacity.longest_context(shape, place, spec, batch, reserve, num_devices),
        most_sequences=capacity.most_sequences(shape, place, spec, length, reserve, num_devices),
        waste=capacity.waste((length,) * batch, max(length, shape.max_context), block_size),
        growth=sizes.growth(spec, columns, sorted({1, batch})),
        decode=cost.decode_step(shape, spec, length, batch),
        prefill=cost.prefill(shape, spec, length, batch, chunk),
        scores=sizes.score_memory(shape, length, chunk),
        recompute=recompute(shape, max(1, length - GENERATED), min(GENERATED, length)),
        strategies=strategies.compare(shape, length, batch, block_size=block_size),
        splits=parallel.splits(shape, spec, length, batch, num_devices) if num_devices > 1 else (),
        offload=offload(shape, place, spec, length),
    )


def _powers(limit: int) -> tuple[int, ...]:
    lengths = [1024]
    while lengths[-1] * 2 <= limit:
        lengths.append(lengths[-1] * 2)
    return tuple(lengths)
