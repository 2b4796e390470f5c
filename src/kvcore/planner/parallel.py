"""Splitting a model over devices: cache and weights on each, and bytes on the wire a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvcore import checks
from kvcore.formats import get_format
from kvcore.planner.model import Model
from kvcore.planner.sizes import ACTIVATION_BYTES, blocks_for
from kvcore.spec import CacheSpec

SplitKind = Literal["tensor", "pipeline", "context", "expert"]
PARTIAL_BYTES = 4  # partial results travel as float32


@dataclass(frozen=True)
class Split:
    """A model over n devices, for a decode step of the whole batch.

    Attributes:
        kind: "tensor": heads and rows of matrices; "pipeline": layers; "context": tokens of every
            sequence; "expert": experts, with the sequences and their attention shared out.
        num_devices: n.
        kv_nbytes: bytes of the cache on the device that has most.
        weight_nbytes: bytes of the weights on the device that has most.
        wire_nbytes: bytes that one device sends in a decode step.
        replicas: how often each KV head is stored; above 1 where there are more devices than heads.
    """

    kind: SplitKind
    num_devices: int
    kv_nbytes: int
    weight_nbytes: int
    wire_nbytes: int
    replicas: int = 1

    def wire_seconds(self, bandwidth: float) -> float:
        """The least time on a link of `bandwidth` bytes a second in one direction."""
        return self.wire_nbytes / bandwidth


def splits(
    model: Model, spec: CacheSpec, length: int, batch: int, num_devices: int
) -> tuple[Split, ...]:
    """Every way that the model can be split over `num_devices`, for the same texts."""
    checks.integer(num_devices, "num_devices", 1)
    found = [tensor(model, spec, length, batch, num_devices)]
    if num_devices <= model.num_layers:
        found.append(pipeline(model, spec, length, batch, num_devices))
    found.append(context(model, spec, length, batch, num_devices))
    if model.experts is not None and num_devices <= model.experts.count:
        found.append(expert(model, spec, length, batch, num_devices))
    return tuple(found)


def tensor(model: Model, spec: CacheSpec, length: int, batch: int, n: int) -> Split:
    """KV heads over devices; where there are fewer, each is stored on several. A latent is stored
    on all.

    Two sums over all devices a layer, of one row a sequence: a ring sends 2 (n - 1) / n of it.
    """
    heads = model.num_kv_heads
    share = -(-heads // n)
    kv = blocks_for(spec, length, batch).nbytes * share // heads
    rows = 2 * model.num_layers * batch * model.hidden_size * ACTIVATION_BYTES
    wire = 2 * (n - 1) * rows // n
    replicas = max(1, -(-n // heads))
    return Split("tensor", n, kv, -(-model.weight_nbytes // n), wire, replicas)


def pipeline(model: Model, spec: CacheSpec, length: int, batch: int, n: int) -> Split:
    """Consecutive layers over devices; a row a sequence passes from each to the next."""
    share = -(-model.num_layers // n)
    kv = max(
        _layers_nbytes(spec, length, batch, first, min(first + share, model.num_layers))
        for first in range(0, model.num_layers, share)
    )
    wire = batch * model.hidden_size * ACTIVATION_BYTES if n > 1 else 0
    each = [
        sum(_layer_parameters(model, i) for i in range(first, min(first + share, model.num_layers)))
        for first in range(0, model.num_layers, share)
    ]
    weights = max(each) + model.vocab_size * model.hidden_size
    return Split("pipeline", n, kv, weights * get_format(model.dtype).element_bits // 8, wire)


def context(model: Model, spec: CacheSpec, length: int, batch: int, n: int) -> Split:
    """Every sequence's blocks over devices, weights on each.

    A layer's queries go to all devices and their partial results (out and lse) come back.
    """
    groups = [n_blocks // batch for n_blocks in blocks_for(spec, length, batch).num_blocks]
    raw = blocks_for(spec, length, batch).num_raw_blocks
    shares = [batch * -(-blocks // n) for blocks in groups]
    kv = sum(spec.block_nbytes(g) * count for g, count in enumerate((*shares, *raw)))
    queries = batch * model.num_heads * model.head_dim * ACTIVATION_BYTES
    partials = batch * model.num_heads * (model.head_dim_v + 1) * PARTIAL_BYTES
    wire = model.num_layers * (queries + partials) * (n - 1) // n
    return Split("context", n, kv, model.weight_nbytes, wire)


def expert(model: Model, spec: CacheSpec, length: int, batch: int, n: int) -> Split:
    """Experts over devices, and sequences with their attention over the same.

    A token's row goes to each of its experts and comes back: two exchanges a layer of experts.
    """
    assert model.experts is not None
    mine = -(-batch // n)
    kv = blocks_for(spec, length, mine).nbytes
    layers = [i for i in range(model.num_layers) if model.layer_experts(i) is not None]
    each = model.expert_parameters(layers[0])
    away = (model.experts.count - -(-model.experts.count // n)) * each * len(layers)
    weights = (model.parameters - away) * get_format(model.dtype).element_bits // 8
    row = mine * model.experts.per_token * model.hidden_size * ACTIVATION_BYTES
    wire = 2 * len(layers) * row * (n - 1) // n
    return Split("expert", n, kv, weights, wire)


def _layer_parameters(model: Model, layer: int) -> int:
    return model.attention_parameters + model.norm_parameters + model.mlp_parameters(layer)


def _layers_nbytes(spec: CacheSpec, length: int, batch: int, begin: int, end: int) -> int:
    """Bytes of some layers' part of the blocks."""
    blocks = blocks_for(spec, length, batch)
    total = 0
    for layer in spec.layers[begin:end]:
        group = layer.group
        size = spec.groups[group].block_size
        total += blocks.num_blocks[group] * size * layer.bytes_per_token
        raw = spec.raw_pool(group)
        if raw is not None:
            count = blocks.num_raw_blocks[raw - len(spec.groups)]
            total += count * spec.pools[raw].block_size * layer.raw_bytes_per_token
    return total
