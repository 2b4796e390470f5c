"""A decoder's weights: float32 arrays in the shapes that the decoder reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvcore.models.config import ModelConfig
from kvcore.models.tensors import FloatArray, Tensor, Tensors, shape_of

# Matrices start on this many bytes, so that no vector load straddles a cache line.
ALIGNMENT = 64


@dataclass
class LayerWeights:
    """One layer. Matrices are [outputs, inputs]; arrays are of the decoder's array module.

    A norm is [hidden], or with LayerNorm [2, hidden]: weight and bias. What a family does not have
    is None.

    Attributes:
        qkv: [(Hq + 2 H) D, hidden]: query, key and value projections, one below the other.
        gate_up: [2 F, hidden]: the MLP's gate and up projections, one below the other, or
            [F, hidden] without a gate. In a layer with experts, those of the shared MLP.
        q_norm, k_norm: [D], of families with query and key norms.
        sinks: [Hq], the logits that take part in the softmax without a value.
        attention_post_norm, mlp_post_norm: norms of what is added to the residual.
        q_a, q_b: [q_rank, hidden] and [Hq (nope_dim + rope_dim), q_rank], latent attention's
            projection of queries; without q_rank, q_b is [Hq (nope_dim + rope_dim), hidden].
        kv_a: [kv_rank + rope_dim, hidden], to the latent and the shared key.
        key_up: [Hq, kv_rank, nope_dim], from a query to what is multiplied with the latent.
        value_up: [Hq, value_dim, kv_rank], from the latent to a head's value.
        router: [E, hidden].
        expert_gate_up, expert_down: [E, 2 F, hidden] and [E, hidden, F].
        choice_bias: [E], for the choice of experts alone.
    """

    attention_norm: Any
    output: Any
    mlp_norm: Any
    qkv: Any = None
    qkv_bias: Any = None
    output_bias: Any = None
    q_norm: Any = None
    k_norm: Any = None
    sinks: Any = None
    q_a: Any = None
    q_a_bias: Any = None
    q_a_norm: Any = None
    q_b: Any = None
    kv_a: Any = None
    kv_a_bias: Any = None
    kv_a_norm: Any = None
    key_up: Any = None
    value_up: Any = None
    gate_up: Any = None
    gate_up_bias: Any = None
    down: Any = None
    down_bias: Any = None
    router: Any = None
    router_bias: Any = None
    choice_bias: Any = None
    expert_gate_up: Any = None
    expert_gate_up_bias: Any = None
    expert_down: Any = None
    expert_down_bias: Any = None
    attention_post_norm: Any = None
    mlp_post_norm: Any = None

    def arrays(self) -> Iterator[Any]:
        """Those that the layer has."""
        return (array for array in vars(self).values() if array is not None)


@dataclass
class DecoderWeights:
    """All of a decoder: embedding [vocab, hidden], layers, final norm, head [vocab, hidden].

    Attributes:
        head: the very array `embedding` when the model ties them.
        positions: [max_context, hidden], added to the embedding; None with rotary embedding.
    """

    embedding: Any
    layers: list[LayerWeights]
    norm: Any
    head: Any
    positions: Any = None

    def arrays(self) -> Iterator[Any]:
        """All arrays, tied ones once."""
        yield self.embedding
        yield self.norm
        if self.head is not self.embedding:
            yield self.head
        if self.positions is not None:
            yield self.positions
        for layer in self.layers:
            yield from layer.arrays()

    def converted(self, convert: Callable[[Any], Any]) -> DecoderWeights:
        """convert(array) of every array; tied ones stay one."""
        outer = {"embedding": self.embedding, "norm": self.norm, "positions": self.positions}
        if self.head is not self.embedding:
            outer["head"] = self.head
        arrays = _converted(outer, convert)
        arrays.setdefault("head", arrays["embedding"])
        layers = [LayerWeights(**_converted(vars(layer), convert)) for layer in self.layers]
        return DecoderWeights(layers=layers, **arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, tied ones counted once."""
        return sum(int(array.nbytes) for array in self.arrays())

    @property
    def num_parameters(self) -> int:
        """Elements of all arrays, tied ones counted once."""
        return sum(int(array.size) for array in self.arrays())


def _converted(arrays: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: None if array is None else convert(array) for name, array in arrays.items()}


class Checkpoint(Protocol):
    """Where a checkpoint of a family keeps its weights."""

    def outer(self, config: ModelConfig) -> Tensors:
        """The tensors of the `DecoderWeights` that are no layer's, by field."""

    def layer(self, config: ModelConfig, index: int) -> Tensors:
        """The tensors of a layer's `LayerWeights`, by field.

        Layers with experts are alike, and so are those without.
        """


class TensorSource(Protocol):
    """Where tensors come from: a file format, or a random generator."""

    def read(self, tensor: Tensor, out: FloatArray) -> None:
        """Fills `out` with a tensor, or raises ModelFileError."""


def load_weights(
    config: ModelConfig,
    checkpoint: Checkpoint,
    source: TensorSource,
    *,
    threads: int = 2,
    track: Callable[[list[Any]], Iterable[Any]] = iter,
) -> DecoderWeights:
    """Reads every tensor of `config` from `source`, fused as the decoder wants them.

    All arrays lie in one allocation, which the system can back with large pages.

    Args:
        checkpoint: which tensor fills which part of which array.
        threads: tensors that are read at a time; 1 reads them in a fixed order.
        track: wraps the iteration over tensors, for a progress bar.
    """
    weights, parts = _lay_out(config, checkpoint)
    pool = ThreadPoolExecutor(threads)
    try:
        reads = [pool.submit(source.read, tensor, out) for tensor, out in parts]
        for read in track(reads):
            read.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return weights


def _lay_out(
    config: ModelConfig, checkpoint: Checkpoint
) -> tuple[DecoderWeights, list[tuple[Tensor, FloatArray]]]:
    """Unfilled weights, and which tensor fills which part of them."""
    arena = _Arena(_count_elements(config, checkpoint))
    parts: list[tuple[Tensor, FloatArray]] = []

    def take(tensors: Tensors) -> dict[str, FloatArray]:
        arrays = {}
        for name, pieces in tensors.items():
            out = arrays[name] = arena.take(shape_of(pieces))
            start = 0
            for piece in pieces:
                rows = piece.part[0]
                parts.append((piece, out[start : start + rows]))
                start += rows
        return arrays

    outer = take(checkpoint.outer(config))
    outer.setdefault("head", outer["embedding"])
    layers = [
        LayerWeights(**take(checkpoint.layer(config, index))) for index in range(config.num_layers)
    ]
    for layer in layers:
        if layer.expert_gate_up is not None:
            layer.expert_gate_up, layer.expert_down = _by_expert(config, layer)
    return DecoderWeights(**outer, layers=layers), parts


def _count_elements(config: ModelConfig, checkpoint: Checkpoint) -> int:
    """Elements of an arena that holds all arrays, computed without a look at every layer."""

    def size(tensors: Tensors) -> int:
        return sum(_aligned(int(np.prod(shape_of(pieces)))) for pieces in tensors.values())

    count, last = config.num_layers, config.num_layers - 1
    first_experts = count if config.experts is None else min(config.experts.first_layer, count)
    total = size(checkpoint.outer(config))
    if first_experts:
        total += first_experts * size(checkpoint.layer(config, 0))
    if first_experts < count:
        total += (count - first_experts) * size(checkpoint.layer(config, last))
    return total


def _by_expert(config: ModelConfig, layer: LayerWeights) -> tuple[FloatArray, FloatArray]:
    """A layer's experts, however they lie in files: [E, 2 F, hidden] and [E, hidden, F]."""
    assert config.experts is not None
    count, size = config.experts.count, config.experts.intermediate_size
    return (
        layer.expert_gate_up.reshape(count, 2 * size, config.hidden_size),
        layer.expert_down.reshape(count, config.hidden_size, size),
    )


def _aligned(size: int) -> int:
    step = ALIGNMENT // 4
    return -(-size // step) * step


class _Arena:
    """One float32 allocation that arrays are cut from."""

    def __init__(self, size: int) -> None:
        size += ALIGNMENT // 4
        if 4 * size > np.iinfo(np.intp).max:
            raise MemoryError(f"weights of {4 * size} bytes")
        self._memory = np.empty(size, np.float32)
        self._next = -(self._memory.ctypes.data // 4) % (ALIGNMENT // 4)

    def take(self, shape: tuple[int, ...]) -> FloatArray:
        size = int(np.prod(shape))
        start = self._next
        self._next += _aligned(size)
        return self._memory[start : start + size].reshape(shape)


@dataclass
class RandomTensors:
    """A source of normal tensors, for tests and benchmarks: norms near 1, the rest near 0.

    With a standard deviation of about 0.15 a tiny model's logits are far from uniform.
    """

    rng: np.random.Generator
    std: float = 0.15

    def read(self, tensor: Tensor, out: FloatArray) -> None:
        """Fills `out` with new draws."""
        values = self.rng.standard_normal(tensor.shape, dtype=np.float32)
        values *= self.std
        values += tensor.center
        out[...] = tensor.pick(values)
