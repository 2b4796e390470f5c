"""What a cache takes by other means: heads, windows, formats, sharing, paging, and together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from kvcore import checks
from kvcore.errors import InvalidArgument
from kvcore.formats import get_format
from kvcore.planner.model import Latent, Model
from kvcore.planner.sizes import blocks_for
from kvcore.spec import CacheSpec

Kind = Literal["heads", "window", "format", "sharing", "paging", "combined"]

#: The latent of DeepSeek-V2 and V3, for what a model would take with it.
LATENT = Latent(q_rank=None, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)

#: Key and value formats, the largest first.
FORMAT_PAIRS = (
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("int8", "int8"),
    ("fp8_e4m3", "fp8_e4m3"),
    ("rot8", "rot8"),
    ("rot6", "rot6"),
    ("rot6", "rot4"),
    ("int4", "int4"),
    ("chan4", "rot4"),
    ("rot4", "rot4"),
    ("chan4", "rot3"),
    ("rot3", "rot3"),
    ("chan2", "rot2"),
)


@dataclass(frozen=True)
class Strategy:
    """One way to keep the same texts.

    Attributes:
        name: such as "GQA, 8 KV heads", "chan4/rot4" or "window 4096".
        kind: what it changes.
        nbytes: bytes of the cache.
        ratio: bytes of the model's own cache in bf16 over these: above 1 saves.
    """

    name: str
    kind: Kind
    nbytes: int
    ratio: float


@dataclass(frozen=True)
class Texts:
    """What is to be kept.

    Attributes:
        length, batch: tokens of a sequence, and sequences.
        shared: tokens that all of them begin with.
        window: tokens that a windowed model sees.
        max_length: what a contiguous cache has room for in each sequence.
        block_size: token slots of a block.
    """

    length: int
    batch: int
    shared: int
    window: int
    max_length: int
    block_size: int

    def nbytes(self, model: Model, k_format: str = "bf16", v_format: str | None = None) -> int:
        """Bytes of a paged cache."""
        return blocks_for(self._spec(model, k_format, v_format), self.length, self.batch).nbytes

    def shared_nbytes(
        self, model: Model, k_format: str = "bf16", v_format: str | None = None
    ) -> int:
        """The same with the whole blocks of the shared prefix stored once."""
        spec = self._spec(model, k_format, v_format)
        saved = sum(
            (self.batch - 1) * (self.shared // group.block_size) * spec.block_nbytes(g)
            for g, group in enumerate(spec.groups)
            if group.retention is None
        )
        return self.nbytes(model, k_format, v_format) - saved

    def contiguous_nbytes(self, model: Model) -> int:
        """The same with every layer's slots for max_length tokens, whatever its window."""
        everything = replace(model, windows=(None,))
        return self.batch * self.max_length * self._spec(everything, "bf16", None).bytes_per_token

    def _spec(self, model: Model, k_format: str, v_format: str | None) -> CacheSpec:
        return model.cache_spec(k_format, v_format, block_size=self.block_size)


def compare(
    model: Model,
    length: int,
    batch: int = 1,
    *,
    shared: int | None = None,
    window: int = 4096,
    block_size: int = 64,
) -> tuple[Strategy, ...]:
    """The bytes of `batch` sequences of `length` tokens under each strategy.

    Args:
        model: the model; the first row is its own cache, paged and in bf16.
        length, batch: tokens of a sequence, and sequences.
        shared: tokens that all sequences begin with; half of them when left out.
        window: of the window strategies.
        block_size: token slots of a block.
    """
    checks.integer(length, "length", 1)
    checks.integer(batch, "batch", 1)
    prefix = length // 2 if shared is None else checks.integer(shared, "shared", 0, length)
    texts = Texts(
        length,
        batch,
        prefix,
        checks.integer(window, "window", 1),
        max(length, model.max_context),
        block_size,
    )
    rows = (*_heads(model, texts), *_windows(model, texts), *_formats(model, texts),
            *_places(model, texts), *_combined(model, texts))  # fmt: skip
    own = rows[0][2]
    return tuple(Strategy(name, kind, nbytes, own / nbytes) for name, kind, nbytes in rows)


Row = tuple[str, Kind, int]


def _heads(model: Model, texts: Texts) -> Iterator[Row]:
    yield "as it is", "heads", texts.nbytes(model)
    for name, shape in head_variants(model):
        yield name, "heads", texts.nbytes(shape)


def _windows(model: Model, texts: Texts) -> Iterator[Row]:
    windowed = replace(model, windows=(texts.window,))
    yield f"window {texts.window} in all layers", "window", texts.nbytes(windowed)
    if model.num_layers > 1:
        mixed = replace(model, windows=(texts.window, None))
        yield f"window {texts.window} in every other layer", "window", texts.nbytes(mixed)
    # A block of sink tokens stays at the start of each sequence.
    spec = windowed.cache_spec(block_size=texts.block_size)
    sinks = texts.batch * spec.block_nbytes() if texts.length > texts.window else 0
    name = f"window {texts.window} and a block of sinks"
    yield name, "window", texts.nbytes(windowed) + sinks


def _formats(model: Model, texts: Texts) -> Iterator[Row]:
    for k_format, v_format in format_pairs(model):
        yield f"{k_format}/{v_format}", "format", texts.nbytes(model, k_format, v_format)


def _places(model: Model, texts: Texts) -> Iterator[Row]:
    yield f"prefix of {texts.shared} shared", "sharing", texts.shared_nbytes(model)
    yield f"contiguous, {texts.max_length} each", "paging", texts.contiguous_nbytes(model)


def _combined(model: Model, texts: Texts) -> Iterator[Row]:
    windowed = replace(model, windows=(texts.window, None)[: model.num_layers])
    for k_format, v_format in format_pairs(model):
        if (k_format, v_format) not in (("rot8", "rot8"), ("chan4", "rot4")):
            continue
        name = f"{k_format}/{v_format}"
        yield (
            f"{name}, prefix of {texts.shared} shared",
            "combined",
            texts.shared_nbytes(model, k_format, v_format),
        )
        yield (
            f"{name}, window {texts.window} in every other layer",
            "combined",
            texts.nbytes(windowed, k_format, v_format),
        )


def head_variants(model: Model) -> Iterator[tuple[str, Model]]:
    """The model with other attention, as many query heads and the same head_dim."""
    latent = model.latent
    head_dim = model.head_dim if latent is None else latent.nope_dim + latent.rope_dim
    plain = replace(model, latent=None, head_dim=head_dim, num_kv_heads=model.num_heads)
    yield f"MHA, {model.num_heads} KV heads", plain
    for heads in (8, 4):
        if heads < model.num_heads and model.num_heads % heads == 0:
            yield f"GQA, {heads} KV heads", replace(plain, num_kv_heads=heads)
    yield "MQA, 1 KV head", replace(plain, num_kv_heads=1)
    if latent is None:
        width = LATENT.kv_rank + LATENT.rope_dim
        name = f"MLA, latent of {LATENT.kv_rank} + {LATENT.rope_dim}"
        yield name, replace(model, latent=LATENT, head_dim=width, num_kv_heads=1)


def format_pairs(model: Model) -> Iterator[tuple[str, str]]:
    """The pairs of FORMAT_PAIRS that the model's heads can be stored in."""
    for k_format, v_format in FORMAT_PAIRS:
        quantized = get_format(k_format).is_quantized
        if model.latent is not None and (quantized or k_format != v_format):
            continue
        try:
            model.cache_spec(k_format, v_format)
        except InvalidArgument:
            continue  # head_dim is no multiple of what the format needs
        yield k_format, v_format
