"""A decoder's weights: float32 matrices in the shapes that the decoder reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvcore.models.config import ModelConfig

FloatArray = npt.NDArray[np.float32]

# Matrices start on this many bytes, so that no vector load straddles a cache line.
ALIGNMENT = 64


@dataclass
class LayerWeights:
    """One layer. Matrices are [outputs, inputs]; arrays are of the decoder's array module.

    Attributes:
        qkv: [(Hq + 2 H) D, hidden]: query, key and value projections, one below the other.
        gate_up: [2 F, hidden]: SwiGLU's gate and up projections, one below the other.
        q_norm, k_norm: [D], of families with query and key norms.
    """

    attention_norm: Any
    qkv: Any
    output: Any
    mlp_norm: Any
    gate_up: Any
    down: Any
    qkv_bias: Any = None
    output_bias: Any = None
    gate_up_bias: Any = None
    down_bias: Any = None
    q_norm: Any = None
    k_norm: Any = None


@dataclass
class DecoderWeights:
    """All of a decoder: embedding [vocab, hidden], layers, final norm, head [vocab, hidden].

    `head` is the very array `embedding` when the model ties them.
    """

    embedding: Any
    layers: list[LayerWeights]
    norm: Any
    head: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, tied ones counted once."""
        arrays = [self.embedding, self.norm]
        if self.head is not self.embedding:
            arrays.append(self.head)
        for layer in self.layers:
            arrays += [array for array in vars(layer).values() if array is not None]
        return sum(int(array.nbytes) for array in arrays)


class TensorSource(Protocol):
    """Where tensors come from: a file format, or a random generator."""

    def read(self, name: str, out: FloatArray) -> None:
        """Fills `out` with the tensor of a Hugging Face name, or raises ModelFileError."""


def load_weights(
    config: ModelConfig,
    source: TensorSource,
    *,
    threads: int = 2,
    track: Callable[[list[Any]], Iterable[Any]] = iter,
) -> DecoderWeights:
    """Reads every tensor of `config` from `source`, fused as the decoder wants them.

    All arrays lie in one allocation, which the system can back with large pages.

    Args:
        threads: tensors that are read at a time; 1 reads them in a fixed order.
        track: wraps the iteration over tensors, for a progress bar.
    """
    weights, parts = _lay_out(config)
    pool = ThreadPoolExecutor(threads)
    try:
        reads = [pool.submit(source.read, name, out) for name, out in parts]
        for read in track(reads):
            read.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return weights


def _lay_out(config: ModelConfig) -> tuple[DecoderWeights, list[tuple[str, FloatArray]]]:
    """Unfilled weights, and which tensor, by its Hugging Face name, fills which part of them."""
    arena = _Arena(config)
    parts: list[tuple[str, FloatArray]] = []
    hidden, inter, head_dim = config.hidden_size, config.intermediate_size, config.head_dim

    def one(name: str, *shape: int) -> FloatArray:
        return stack([name], [shape[0]], *shape[1:])

    def stack(names: list[str], rows: list[int], *columns: int) -> FloatArray:
        out = arena.take(sum(rows), *columns)
        parts.extend(zip(names, np.split(out, np.cumsum(rows)[:-1]), strict=True))
        return out

    def lay_out_layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}."
        qkv = [at + f"self_attn.{x}_proj." for x in "qkv"]
        qkv_rows = [config.q_size, config.kv_size, config.kv_size]
        gate_up = [at + f"mlp.{x}_proj." for x in ("gate", "up")]
        output, down = at + "self_attn.o_proj.", at + "mlp.down_proj."
        layer = LayerWeights(
            attention_norm=one(at + "input_layernorm.weight", hidden),
            qkv=stack([name + "weight" for name in qkv], qkv_rows, hidden),
            output=one(output + "weight", hidden, config.q_size),
            mlp_norm=one(at + "post_attention_layernorm.weight", hidden),
            gate_up=stack([name + "weight" for name in gate_up], [inter, inter], hidden),
            down=one(down + "weight", hidden, inter),
        )
        if config.qkv_bias:
            layer.qkv_bias = stack([name + "bias" for name in qkv], qkv_rows)
        if config.output_bias:
            layer.output_bias = one(output + "bias", hidden)
        if config.mlp_bias:
            layer.gate_up_bias = stack([name + "bias" for name in gate_up], [inter, inter])
            layer.down_bias = one(down + "bias", hidden)
        if config.qk_norm:
            layer.q_norm = one(at + "self_attn.q_norm.weight", head_dim)
            layer.k_norm = one(at + "self_attn.k_norm.weight", head_dim)
        return layer

    embedding = one("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = [lay_out_layer(index) for index in range(config.num_layers)]
    norm = one("model.norm.weight", hidden)
    head = embedding if config.tied_head else one("lm_head.weight", config.vocab_size, hidden)
    return DecoderWeights(embedding, layers, norm, head), parts


class _Arena:
    """One float32 allocation that arrays are cut from."""

    def __init__(self, config: ModelConfig) -> None:
        step = ALIGNMENT // 4
        arrays = 3 + 12 * config.num_layers
        size = config.num_parameters + (arrays + 1) * step
        if 4 * size > np.iinfo(np.intp).max:
            raise MemoryError(f"weights of {4 * size} bytes")
        self._memory = np.empty(size, np.float32)
        self._next = -(self._memory.ctypes.data // 4) % step
        self._step = step

    def take(self, *shape: int) -> FloatArray:
        size = int(np.prod(shape))
        start = self._next
        self._next += -(-size // self._step) * self._step
        return self._memory[start : start + size].reshape(shape)


@dataclass
class RandomTensors:
    """A source of normal tensors, for tests and benchmarks: norms near 1, the rest near 0.

    With a standard deviation of about 0.15 a tiny model's logits are far from uniform.
    """

    rng: np.random.Generator
    std: float = 0.15

    def read(self, name: str, out: FloatArray) -> None:
        """Fills `out` with new draws."""
        self.rng.standard_normal(out=out, dtype=np.float32)
        out *= self.std
        if "norm" in name:
            out += 1.0
