"""A model as a whole: configuration, decoder and tokenizer, loaded from a name or a path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kvcore import checks
from kvcore.errors import ModelFileError
from kvcore.models import hf, registry
from kvcore.models.config import ModelConfig
from kvcore.models.decoder import Decoder
from kvcore.models.device import Device
from kvcore.models.families import FAMILIES
from kvcore.models.files import require
from kvcore.models.gguf import GGUFFile
from kvcore.models.gguf_tokenizer import build_tokenizer
from kvcore.models.hf_tokenizer import read_tokenizer
from kvcore.models.tokenizer import Tokenizer
from kvcore.models.weights import DecoderWeights, RandomTensors, load_weights
from kvcore.spec import CacheSpec, GroupSpec


class Model:
    """A decoder with its tokenizer.

    Attributes:
        config: the architecture.
        decoder: runs tokens against a step of a cache.
        device: where the decoder computes, and where its caches have to be.
        source: where the model came from, for messages.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        load_tokenizer: Callable[[], Tokenizer],
        *,
        source: str,
    ) -> None:
        self.config = config
        self.decoder = decoder
        self.source = source
        self._load_tokenizer = load_tokenizer

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        seed: int = 0,
        std: float = 0.15,
        *,
        backend: str = "cpu",
        device: int | None = None,
    ) -> Model:
        """A model with random weights and no tokenizer, for tests and benchmarks.

        Args:
            std: standard deviation of the weights.
            backend, device: as in `load`. They do not change the weights.
        """
        place = Device(backend, device)

        def no_tokenizer() -> Tokenizer:
            raise ModelFileError("a tokenizer expected, but a random model has none")

        tensors = RandomTensors(np.random.default_rng(seed), std)
        weights = load_weights(config, FAMILIES[config.family], tensors, threads=1)
        return cls(config, Decoder(config, weights, place), no_tokenizer, source="random weights")

    @property
    def device(self) -> Device:
        return self.decoder.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read at first use; ModelFileError when the model came without one."""
        return self._load_tokenizer()

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        try:
            return self.config.eos_ids | self.tokenizer.eos_ids
        except ModelFileError:
            return self.config.eos_ids

    def cache_spec(
        self,
        block_size: int = 64,
        k_format: str = "bf16",
        v_format: str = "bf16",
        *,
        slack: int = 0,
        **options: Any,
    ) -> CacheSpec:
        """The cache that this model's decoder writes to.

        Layers of the same window form a group, which keeps no more tokens than they see.

        Args:
            block_size, k_format, v_format: as in `CacheSpec`.
            slack: tokens that these groups keep beyond that, and raw rows of quantized formats
                that all groups do, for texts that are truncated by as many.
            options: further arguments of `CacheSpec`, such as layer_formats, raw_last or key_bias.
        """
        config = self.config
        # Layers that see all tokens come first.
        windows = sorted({config.window(i) or 0 for i in range(config.num_layers)})
        latent = config.latent
        return CacheSpec(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            v_in_k=None if latent is None else latent.kv_rank,
            groups=[GroupSpec(block_size, window or None, slack) for window in windows],
            layer_groups=[windows.index(config.window(i) or 0) for i in range(config.num_layers)],
            k_format=k_format,
            v_format=v_format,
            **options,
        )

    def __repr__(self) -> str:
        c = self.config
        millions = self.decoder.weights.num_parameters / 1e6
        return (
            f"Model({self.source}: {c.family}, {millions:.0f}M parameters, {c.num_layers} layers, "
            f"{c.num_heads}/{c.num_kv_heads} heads of {c.head_dim}, vocabulary {c.vocab_size}, "
            f"context {c.max_context})"
        )


def load(
    model: str | os.PathLike[str],
    backend: str = "cpu",
    *,
    device: int | None = None,
    max_context: int | None = None,
    progress: bool = False,
) -> Model:
    """Loads a model.

    Args:
        model: a name ("smollm2"), a Hugging Face directory or a GGUF file.
        backend: where the decoder computes: "cpu" or "cuda".
        device: the CUDA device's number, None for the current one; None for the CPU.
        max_context: fewer tokens than the model's own maximum, as the longest text. A model with
            LongRoPE computes short and long contexts differently, and chooses by it.
        progress: shows a bar on stderr while weights are read.

    Raises:
        ModelFileError: if there is no such model, or its files are malformed or unsupported.
        MissingExtra: if a package is not installed; the message has the command.
        InvalidArgument: if there is no such backend or device.
        BackendUnavailable: if the backend cannot be used here.
    """
    place = Device(backend, device)
    if max_context is not None:
        checks.integer(max_context, "max_context", 1)
    if isinstance(model, str) and model in registry.MODELS:
        path = registry.locate(model)
    else:
        path = Path(model)
        if not path.exists():
            names = ", ".join(registry.names())
            raise ModelFileError(
                f"{path}: a directory, a .gguf file or a known name ({names}) expected, "
                "but there is no such file"
            )
    track = _progress_bar if progress else iter
    try:
        load_parts = _load_hf if path.is_dir() else _load_gguf
        config, weights, load_tokenizer = load_parts(path, max_context, track)
    except MemoryError as error:
        raise ModelFileError(f"{path}: a model that fits in memory expected: {error}") from error
    decoder = Decoder(config, weights, place)
    return Model(config, decoder, load_tokenizer, source=str(model))


_Track = Callable[[list[Any]], Iterable[Any]]
_Parts = tuple[ModelConfig, DecoderWeights, Callable[[], Tokenizer]]


def _load_hf(directory: Path, max_context: int | None, track: _Track) -> _Parts:
    config = hf.read_config(directory, max_context)
    with hf.SafetensorsSource(directory) as source:
        weights = load_weights(config, FAMILIES[config.family], source, track=track)
    return config, weights, lambda: read_tokenizer(directory, config.eos_ids)


def _load_gguf(path: Path, max_context: int | None, track: _Track) -> _Parts:
    file = GGUFFile(path)
    config, metadata = file.config(max_context), file.metadata
    weights = load_weights(config, file, file, track=track)
    return config, weights, lambda: build_tokenizer(path, metadata, config.eos_ids)


def _progress_bar(tensors: list[Any]) -> Iterable[Any]:
    bar: Iterable[Any] = require("tqdm").tqdm(tensors, desc="loading", unit="tensor")
    return bar
