"""What a step costs: operations and bytes, and the time that a device needs at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvcore import checks
from kvcore.formats import get_format
from kvcore.layers import RAW_ROW_ELEMENT_BYTES
from kvcore.planner.device import Device
from kvcore.planner.model import Model
from kvcore.planner.sizes import ACTIVATION_BYTES
from kvcore.spec import CacheSpec

Bound = Literal["bandwidth", "arithmetic"]


@dataclass(frozen=True)
class Cost:
    """Work, apart from any device.

    Attributes:
        flops: operations; a multiply-add is two.
        nbytes: bytes that go between memory and the processor at least once.
    """

    flops: float
    nbytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.nbytes

    def bound(self, device: Device) -> Bound:
        """What limits it: its intensity is below the device's ridge, or not."""
        return "bandwidth" if self.intensity < device.ridge else "arithmetic"

    def seconds(self, device: Device) -> float:
        """The least time: reading and computing overlap wholly."""
        return max(self.flops / device.fp16_flops, self.nbytes / device.bandwidth)


@dataclass(frozen=True)
class StepCost:
    """A step's weights (projections, MLP or experts, output head) and its attention.

    Attributes:
        weights, attention: each part's cost; one follows the other, so that times add up.
        new_tokens: tokens that the step computes.
        sequences: sequences that it computes them for.
    """

    weights: Cost
    attention: Cost
    new_tokens: int
    sequences: int

    @property
    def total(self) -> Cost:
        return self.weights + self.attention

    def seconds(self, device: Device) -> float:
        """The least time of the step."""
        return self.weights.seconds(device) + self.attention_seconds(device)

    def attention_seconds(self, device: Device) -> float:
        """That of its attention; on a device that was measured, the time expected."""
        return self.attention.seconds(device) / device.attention_share

    def tokens_per_second(self, device: Device) -> float:
        """New tokens a second, all sequences together."""
        return self.new_tokens / self.seconds(device)


def decode_step(model: Model, spec: CacheSpec, context: int, batch: int = 1) -> StepCost:
    """One new token for each of `batch` sequences that hold `context` tokens with it."""
    checks.integer(context, "context", 1)
    checks.integer(batch, "batch", 1)
    return StepCost(
        _weights(model, batch, batch), decode_attention(model, spec, context, batch), batch, batch
    )


def decode_attention(model: Model, spec: CacheSpec, context: int, batch: int = 1) -> Cost:
    """The attention of a decode step: every K and V that is seen is read once."""
    pair = 2 * model.num_heads * (model.head_dim + model.head_dim_v)
    flops = nbytes = 0.0
    for window, layer in zip(model.layer_windows, spec.layers, strict=True):
        seen = context if window is None else min(context, window)
        raw = min(seen, spec.raw_first + spec.raw_last) if layer.is_quantized else 0
        flops += pair * seen
        nbytes += (
            seen - raw
        ) * layer.bytes_per_token + raw * layer.elements_per_token * RAW_ROW_ELEMENT_BYTES
    rows = model.num_layers * model.num_heads * (model.head_dim + model.head_dim_v)
    return Cost(batch * flops, batch * (nbytes + rows * ACTIVATION_BYTES + spec.bytes_per_token))


def prefill(
    model: Model, spec: CacheSpec, length: int, batch: int = 1, chunk: int | None = None
) -> StepCost:
    """The prompts of `batch` sequences, whole or in chunks of at most `chunk` tokens each.

    Latent attention is counted in its unabsorbed form, in which prompts are computed.
    """
    checks.integer(length, "length", 1)
    size = length if chunk is None else min(checks.integer(chunk, "chunk", 1), length)
    steps = -(-length // size)
    weights = Cost(0, 0)
    for i in range(steps):
        tokens = min(size, length - i * size)
        weights += _weights(model, batch * tokens, batch)
    pair = 2 * model.num_heads * model.prompt_dims
    flops = sum(pair * visible_pairs(length, window) for window in model.layer_windows)
    reread = sum(
        _visible_span(length, size, i, window) * layer.bytes_per_token
        for window, layer in zip(model.layer_windows, spec.layers, strict=True)
        for i in range(steps)
    )
    rows = model.num_layers * length * model.num_heads * (model.head_dim + model.head_dim_v)
    nbytes = reread + rows * ACTIVATION_BYTES + length * spec.bytes_per_token
    return StepCost(weights, Cost(batch * flops, batch * nbytes), batch * length, batch)


def visible_pairs(length: int, window: int | None = None) -> int:
    """(query, key) pairs of a causal prompt of `length` tokens, each seeing itself."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def experts_met(count: int, per_token: int, num_tokens: int) -> float:
    """Distinct experts that `num_tokens` tokens choose on average, if all are as likely."""
    return float(count * (1 - (1 - per_token / count) ** num_tokens))


def _weights(model: Model, num_tokens: int, num_logits: int) -> Cost:
    """Everything but attention: each weight that is met is read once."""
    head = model.vocab_size * model.hidden_size
    active = model.active_parameters - head
    flops = 2.0 * (num_tokens * active + num_logits * head)
    met = float(active + head)
    for i in range(model.num_layers):
        experts = model.layer_experts(i)
        if experts is not None:
            taken = experts_met(experts.count, experts.per_token, num_tokens)
            met += (taken - experts.per_token) * model.expert_parameters(i)
    nbytes = met * get_format(model.dtype).element_bits / 8
    rows = 2 * num_tokens * model.num_layers * model.hidden_size * ACTIVATION_BYTES
    return Cost(flops, nbytes + rows)


def _visible_span(length: int, size: int, step: int, window: int | None) -> int:
    """Tokens that a chunk's queries see at least one of."""
    begin, end = step * size, min(length, (step + 1) * size)
    return end if window is None else end - max(0, begin + 1 - window)
