"""The architecture that a GGUF file declares, in its metadata and by the tensors that it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kvcore.errors import InvalidArgument, ModelFileError
from kvcore.models.config import ModelConfig
from kvcore.models.files import Fields
from kvcore.models.rope import (
    FrequencyFactors,
    LinearScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")

# Metadata that changes the arithmetic in ways that the decoder does not have.
_UNSUPPORTED = (
    "expert_count", "attention.scale", "embedding_scale", "residual_scale", "logit_scale",
    "attention.max_alibi_bias", "attention.clamp_kqv",
)  # fmt: skip

# Layers with a window in a period, of which the last is the one without.
_WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}

# Gemma's largest models scale scores by hidden / heads and not by head_dim, which no key tells;
# they are known by their number of layers.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}

Vectors = Callable[[str], tuple[float, ...]]
Shapes = Mapping[str, tuple[int, ...]]


def read_config(
    fields: Fields, vectors: Vectors, shapes: Shapes, max_context: int | None
) -> ModelConfig:
    """The architecture; errors as `GGUFFile.config` has them.

    Args:
        fields: the metadata.
        vectors: the values of a tensor of one axis, by its name.
        shapes: of all tensors.
        max_context: fewer tokens than the model's own maximum.
    """
    arch = fields.typed("general.architecture", str)
    for name in _UNSUPPORTED:
        value = fields.get(f"{arch}.{name}")
        if value:
            raise fields.error(f"{arch}.{name}", "a model without this feature", value)
    if "token_embd.weight" not in shapes:
        raise ModelFileError(
            f"{fields.file}: tensor token_embd.weight: expected, but it is missing"
        )
    context = fields.positive(f"{arch}.context_length")
    context = min(context, max_context or context)
    hidden = fields.positive(f"{arch}.embedding_length")
    heads = fields.positive(f"{arch}.attention.head_count")
    head_dim = fields.positive(f"{arch}.attention.key_length", max(hidden // heads, 1))
    value_dim = fields.positive(f"{arch}.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise fields.error(f"{arch}.attention.value_length", f"{head_dim}", value_dim)
    own = {"gemma2": _gemma, "gemma3": _gemma, "gpt2": _gpt2}.get(arch, _plain)
    try:
        shared: dict[str, Any] = {
            "family": arch,
            "num_layers": fields.positive(f"{arch}.block_count"),
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": fields.positive(f"{arch}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": fields.positive(f"{arch}.feed_forward_length"),
            "vocab_size": shapes["token_embd.weight"][0],
            "max_context": context,
            "windows": _windows(fields, arch),
            "qkv_bias": bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & shapes.keys()),
            "output_bias": "blk.0.attn_output.bias" in shapes,
            "mlp_bias": "blk.0.ffn_down.bias" in shapes,
            "qk_norm": "blk.0.attn_q_norm.weight" in shapes,
            "tied_head": "output.weight" not in shapes,
            "bos_id": fields.get("tokenizer.ggml.bos_token_id"),
            "eos_ids": _eos_ids(fields),
        }
        if arch != "gpt2":
            shared["norm_eps"] = fields.typed(f"{arch}.attention.layer_norm_rms_epsilon", float)
            shared["rope"] = _rope(fields, arch, head_dim, context, vectors, shapes)
        return ModelConfig(**shared | own(fields, arch, shared))
    except InvalidArgument as error:
        raise ModelFileError(f"{fields.file}: {error}") from error


def _plain(fields: Fields, arch: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = fields.get(f"{arch}.{name}")
        if value:
            raise fields.error(f"{arch}.{name}", "a model without this feature", value)
    return {}


def _gemma(fields: Fields, arch: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    largest = shared["num_layers"] == _LARGEST_GEMMA[arch]
    per_head = shared["hidden_size"] // shared["num_heads"]
    own: dict[str, Any] = {
        "attention_scale": (per_head if largest else shared["head_dim"]) ** -0.5,
        "score_softcap": fields.nullable(f"{arch}.attn_logit_softcapping", float, None),
        "logit_softcap": fields.nullable(f"{arch}.final_logit_softcapping", float, None),
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": math.sqrt(shared["hidden_size"]),
    }
    if arch == "gemma3":
        theta = fields.typed("gemma3.rope.freq_base_swa", float, 10000.0)
        own["family"] = "gemma3_text"
        own["local_rope"] = Rope(shared["head_dim"], theta)
    return own


def _gpt2(fields: Fields, arch: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rope": None,
        "learned_positions": fields.positive("gpt2.context_length"),
        "norm": "layer",
        "norm_eps": fields.typed("gpt2.attention.layer_norm_epsilon", float),
        "activation": "gelu_tanh",
        "gated": False,
    }


def _windows(fields: Fields, arch: str) -> tuple[int | None, ...]:
    if not fields.get(f"{arch}.attention.sliding_window"):
        return (None,)
    window = fields.positive(f"{arch}.attention.sliding_window")
    period = _WINDOW_PERIOD.get(arch)
    if period is None:
        return (window,)
    pattern = (window,) * (period - 1) + (None,)
    return pattern[: fields.positive(f"{arch}.block_count")]


def _rope(
    fields: Fields, arch: str, head_dim: int, context: int, vectors: Vectors, shapes: Shapes
) -> Rope:
    dim = fields.positive(f"{arch}.rope.dimension_count", head_dim)
    if dim != head_dim and arch != "phi3":
        raise fields.error(f"{arch}.rope.dimension_count", f"rope.dim {head_dim}", dim)
    theta = fields.typed(f"{arch}.rope.freq_base", float, 10000.0)
    prefix = f"{arch}.rope.scaling."
    if "rope_factors_long.weight" in shapes:
        original = fields.positive(prefix + "original_context_length")
        name = "rope_factors_long" if context > original else "rope_factors_short"
        factors = _factors(fields, f"{name}.weight", dim, vectors, shapes)
        attention_factor = fields.typed(prefix + "attn_factor", float, 1.0)
        return Rope(dim, theta, FrequencyFactors(factors, attention_factor))
    scaling = _scaling(fields, prefix)
    if "rope_freqs.weight" in shapes:
        if scaling is not None:
            key = prefix + "type"
            raise fields.error(key, "none beside rope_freqs.weight", fields.get(key))
        scaling = FrequencyFactors(_factors(fields, "rope_freqs.weight", dim, vectors, shapes))
    return Rope(dim, theta, scaling)


def _factors(
    fields: Fields, name: str, dim: int, vectors: Vectors, shapes: Shapes
) -> tuple[float, ...]:
    if shapes.get(name) != (dim // 2,):
        raise ModelFileError(
            f"{fields.file}: tensor {name}: shape {(dim // 2,)} expected, got {shapes.get(name)}"
        )
    return vectors(name)


def _scaling(fields: Fields, prefix: str) -> RopeScaling | None:
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


def _eos_ids(fields: Fields) -> frozenset[int]:
    keys = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    return frozenset(int(fields.values[key]) for key in keys if key in fields.values)
