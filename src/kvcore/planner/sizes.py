"""How much memory a model takes: bytes a token, growth over length and batch, and the total."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvcore import checks
from kvcore.planner.model import Model
from kvcore.spec import CacheSpec

SCORE_BYTES = 4  # float32
LOGIT_BYTES = 4
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class LayerBytes:
    """One layer's share of a token.

    Attributes:
        layer: its number.
        window: how many of the last tokens it keeps; None: all.
        nbytes: bytes of one token's K and V, metadata included.
    """

    layer: int
    window: int | None
    nbytes: int


@dataclass(frozen=True)
class Blocks:
    """The blocks that sequences of one length take while they grow to it, a token a step.

    Attributes:
        num_blocks: of each group.
        num_raw_blocks: of each pool of raw rows.
        nbytes: bytes of a cache with these.
        slots: tokens that the largest group has room for.
    """

    num_blocks: tuple[int, ...]
    num_raw_blocks: tuple[int, ...]
    nbytes: int
    slots: int


@dataclass(frozen=True)
class Growth:
    """Bytes of the cache over length and batch.

    Attributes:
        lengths: tokens of each sequence.
        batches: sequences.
        nbytes: one row a batch, one column a length.
    """

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    nbytes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Memory:
    """What a model takes on a device.

    Attributes:
        weights, activations, kv: bytes.
    """

    weights: int
    activations: int
    kv: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.kv

    @property
    def kv_share(self) -> float:
        """The cache's part of the total, 0 to 1."""
        return self.kv / self.total


@dataclass(frozen=True)
class ScoreMemory:
    """Bytes that attention's scores take at the peak of a prefill, of one layer and sequence.

    Attributes:
        whole: all scores at once, Hq * S * S float32.
        chunked: those of a chunk of C new tokens, Hq * C * S.
        online: with a running softmax no score leaves the processor.
    """

    whole: int
    chunked: int
    online: int


def layer_bytes(spec: CacheSpec) -> tuple[LayerBytes, ...]:
    """Bytes of a token in each layer; 0 where a layer reads another's cache."""
    return tuple(
        LayerBytes(
            i,
            spec.groups[layer.group].retention,
            layer.bytes_per_token if layer.kv_source == i else 0,
        )
        for i, layer in enumerate(spec.layers)
    )


def blocks_for(spec: CacheSpec, length: int, batch: int = 1, num_new: int = 1) -> Blocks:
    """The blocks that `batch` sequences take while they grow to `length` tokens.

    Args:
        spec: the cache.
        length: tokens of each sequence.
        batch: sequences.
        num_new: the most tokens that a step adds to a sequence.
    """
    checks.integer(length, "length", 1)
    checks.integer(batch, "batch", 1)
    counts = [batch * pool.blocks_for(length, num_new) for pool in spec.pools]
    blocks, raw = tuple(counts[: len(spec.groups)]), tuple(counts[len(spec.groups) :])
    slots = max(n * group.block_size for n, group in zip(blocks, spec.groups, strict=True))
    return Blocks(blocks, raw, spec.nbytes(blocks, raw), slots)


def growth(spec: CacheSpec, lengths: Iterable[int], batches: Iterable[int] = (1,)) -> Growth:
    """The cache's bytes for every batch and length."""
    columns, rows = tuple(lengths), tuple(batches)
    sizes = tuple(tuple(blocks_for(spec, n, b).nbytes for n in columns) for b in rows)
    return Growth(columns, rows, sizes)


def activation_bytes(model: Model, num_tokens: int, batch: int = 1) -> int:
    """Bytes of activations while a step of `num_tokens` new tokens runs, an estimate from below.

    In 16 bits and for each token: the residual stream and its normed copy, and beside them the
    widest of what a layer holds at once, Q, K, V and the output or the MLP's two inner rows. And
    the logits of each sequence's last token in float32.
    """
    latent, experts = model.latent, model.experts
    heads = model.num_heads
    if latent is None:
        attention = 2 * heads * model.head_dim + 2 * model.num_kv_heads * model.head_dim
    else:
        query = latent.nope_dim + latent.rope_dim
        attention = heads * (query + model.head_dim + model.head_dim_v) + model.head_dim
    inner = model.intermediate_size
    if experts is not None:
        taken = experts.per_token * experts.intermediate_size + experts.shared_size
        inner = max(inner if experts.first_layer else 0, taken)
    mlp = (2 if model.gated else 1) * inner
    width = 2 * model.hidden_size + max(attention, mlp)
    return num_tokens * width * ACTIVATION_BYTES + batch * model.vocab_size * LOGIT_BYTES


def memory(model: Model, spec: CacheSpec, length: int, batch: int = 1, chunk: int = 2048) -> Memory:
    """What the model takes with `batch` sequences of `length` tokens.

    Args:
        model: the model.
        spec: its cache, such as `model.cache_spec("int8")`.
        length: tokens of each sequence.
        batch: sequences.
        chunk: new tokens of the largest step.
    """
    tokens = max(batch, min(chunk, length * batch))
    kv = blocks_for(spec, length, batch).nbytes
    return Memory(model.weight_nbytes, activation_bytes(model, tokens, batch), kv)


def score_memory(model: Model, length: int, chunk: int) -> ScoreMemory:
    """What a prefill of `length` tokens holds of scores, whole, in chunks, and online."""
    checks.integer(length, "length", 1)
    checks.integer(chunk, "chunk", 1)
    row = model.num_heads * length * SCORE_BYTES
    return ScoreMemory(row * length, row * min(chunk, length), 0)
