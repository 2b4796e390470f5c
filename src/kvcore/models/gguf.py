"""Models from a GGUF file, read through the `gguf` package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.errors import InvalidArgument, ModelFileError
from kvcore.models.config import ModelConfig
from kvcore.models.files import Fields, require
from kvcore.models.rope import (
    FrequencyFactors,
    LinearScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Hugging Face names of tensors, and those of GGUF. {i} is the layer.
_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# Metadata that changes the arithmetic in ways that the decoder does not have.
_UNSUPPORTED = (
    "expert_count", "attention.sliding_window", "attention.scale", "attn_logit_softcapping",
    "final_logit_softcapping", "embedding_scale", "residual_scale", "logit_scale",
    "attention.max_alibi_bias", "attention.clamp_kqv",
)  # fmt: skip


@cache
def _reader_class() -> Any:
    gguf = require("gguf")

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """A GGUFReader that refuses to read beyond the end of its file.

        The base class slices a memory map, and a slice beyond the end is silently short: a
        truncated file would read as empty values, and a corrupt count as an endless loop.
        np.frombuffer checks, and is several times as fast.
        """

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            order = self.byte_order if override_order is None else override_order
            kind = np.dtype(dtype).newbyteorder(order)
            return np.frombuffer(self.data, kind, int(count), int(offset))

    return Reader


class GGUFFile:
    """An open GGUF file: its metadata and tensors.

    Args:
        path: the file.

    Raises:
        ModelFileError: if it is missing, truncated or no GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.errstate(over="ignore"):
                self._reader = _reader_class()(path)
        except OSError as error:
            raise ModelFileError(f"{path}: a readable file expected: {error}") from error
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise ModelFileError(f"{path}: a GGUF file expected: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.metadata = _Metadata(path, self._reader.fields)
        fields = Fields(path, self.metadata)
        self.architecture = fields.typed("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            expected = f"one of {', '.join(ARCHITECTURES)}"
            raise fields.error("general.architecture", expected, repr(self.architecture))

    @cached_property
    def config(self) -> ModelConfig:
        """The architecture that the metadata and the tensors declare.

        Raises:
            ModelFileError: for a missing or mistyped key or a feature that the decoder does not
                have; the message names the key.
        """
        arch = self.architecture
        fields = Fields(self.path, self.metadata)
        for name in _UNSUPPORTED:
            value = fields.get(f"{arch}.{name}")
            if value:
                raise fields.error(f"{arch}.{name}", "a model without this feature", value)
        hidden = fields.positive(f"{arch}.embedding_length")
        heads = fields.positive(f"{arch}.attention.head_count")
        head_dim = fields.positive(f"{arch}.attention.key_length", max(hidden // heads, 1))
        value_dim = fields.positive(f"{arch}.attention.value_length", head_dim)
        if value_dim != head_dim:
            raise fields.error(f"{arch}.attention.value_length", f"{head_dim}", value_dim)
        embedding = self._tensor("model.embed_tokens.weight")
        try:
            return ModelConfig(
                family=arch,
                num_layers=fields.positive(f"{arch}.block_count"),
                hidden_size=hidden,
                num_heads=heads,
                num_kv_heads=fields.positive(f"{arch}.attention.head_count_kv", heads),
                head_dim=head_dim,
                intermediate_size=fields.positive(f"{arch}.feed_forward_length"),
                vocab_size=int(embedding.shape[-1]),
                max_context=fields.positive(f"{arch}.context_length"),
                norm_eps=fields.typed(f"{arch}.attention.layer_norm_rms_epsilon", float),
                rope=self._rope(fields, head_dim),
                qkv_bias=self._has("blk.0.attn_q.bias"),
                output_bias=self._has("blk.0.attn_output.bias"),
                mlp_bias=self._has("blk.0.ffn_down.bias"),
                qk_norm=self._has("blk.0.attn_q_norm.weight"),
                tied_head=not self._has("output.weight"),
                bos_id=fields.get("tokenizer.ggml.bos_token_id"),
                eos_ids=self._eos_ids(),
            )
        except InvalidArgument as error:
            raise ModelFileError(f"{self.path}: {error}") from error

    def read(self, name: str, out: npt.NDArray[np.float32]) -> None:
        """Fills `out` with the tensor of a Hugging Face name, dequantised."""
        gguf = require("gguf")
        tensor = self._tensor(name)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != out.shape:
            raise ModelFileError(
                f"{self.path}: tensor {tensor.name}: shape {out.shape} expected, got {shape}"
            )
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ModelFileError(
                f"{self.path}: tensor {tensor.name}: a type that the gguf package decodes "
                f"expected, got {tensor.tensor_type.name}"
            ) from error
        if self.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = self._split_halves(values)
        out[...] = values

    def _split_halves(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Undoes the row order of llama.cpp, which puts the elements that RoPE pairs together."""
        pairs = self.config.head_dim // 2
        columns = values.shape[1:]
        by_pair = values.reshape(-1, pairs, 2, *columns)
        return np.asarray(by_pair.swapaxes(1, 2).reshape(values.shape), np.float32)

    def _has(self, gguf_name: str) -> bool:
        return gguf_name in self._tensors

    def _tensor(self, name: str) -> Any:
        gguf_name = _gguf_name(name)
        if gguf_name not in self._tensors:
            raise ModelFileError(f"{self.path}: tensor {gguf_name}: expected, but it is missing")
        return self._tensors[gguf_name]

    def _rope(self, fields: Fields, head_dim: int) -> Rope:
        arch = self.architecture
        dim = fields.positive(f"{arch}.rope.dimension_count", head_dim)
        theta = fields.typed(f"{arch}.rope.freq_base", float, 10000.0)
        scaling = self._rope_scaling(fields, f"{arch}.rope.scaling.")
        if self._has("rope_freqs.weight"):
            if scaling is not None:
                key = f"{arch}.rope.scaling.type"
                raise fields.error(key, "none beside rope_freqs.weight", self.metadata[key])
            tensor = self._tensors["rope_freqs.weight"]
            if tensor.data.shape != (dim // 2,):
                raise ModelFileError(
                    f"{self.path}: tensor rope_freqs.weight: shape {(dim // 2,)} expected, "
                    f"got {tensor.data.shape}"
                )
            scaling = FrequencyFactors(tuple(float(factor) for factor in tensor.data))
        return Rope(dim, theta, scaling)

    def _rope_scaling(self, fields: Fields, prefix: str) -> RopeScaling | None:
        kind = fields.get(prefix + "type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise fields.error(prefix + "type", "none, linear or yarn", repr(kind))
        factor = fields.typed(prefix + "factor", float)
        if factor <= 0:
            raise fields.error(prefix + "factor", "a positive number", factor)
        if kind == "linear":
            return LinearScaling(factor)
        scale = fields.typed(prefix + "attn_factor", float, 1.0)
        return YarnScaling(
            factor=factor,
            original_context=fields.positive(prefix + "original_context_length"),
            beta_fast=fields.typed(prefix + "yarn_beta_fast", float, 32.0),
            beta_slow=fields.typed(prefix + "yarn_beta_slow", float, 1.0),
            attention_factor=scale * yarn_attention_factor(factor),
        )

    def _eos_ids(self) -> frozenset[int]:
        keys = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
        return frozenset(int(self.metadata[key]) for key in keys if key in self.metadata)


class _Metadata(Mapping[str, Any]):
    """The metadata of a reader as plain Python values, decoded when asked for."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self._path = path
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        field = self._fields[key]
        try:
            return field.contents()
        except (ValueError, IndexError) as error:
            raise ModelFileError(f"{self._path}: {key}: a value expected: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def _gguf_name(name: str) -> str:
    """The GGUF name of a tensor with a Hugging Face name."""
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{suffix}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_INNER[inner]}.{suffix}"
