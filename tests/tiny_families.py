"""Tiny architectures: a Llama, and what the other families change in it."""

from __future__ import annotations

from typing import Any

from kvcore.models import ModelConfig, Rope, YarnScaling
from kvcore.models.config import ClampedSwiglu, Experts, LatentAttention
from kvcore.models.rope import FrequencyFactors

GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "attention_scale": 0.2,
    "post_norms": True,
    "activation": "gelu_tanh",
    "embedding_scale": 24**0.5,
    "tied_head": True,
}
GPT2: dict[str, Any] = {
    "hidden_size": 32,
    "head_dim": 8,
    "num_kv_heads": 4,
    "rope": None,
    "learned_positions": 128,
    "norm": "layer",
    "activation": "gelu_tanh",
    "gated": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tied_head": True,
}
LATENT: dict[str, Any] = {
    "num_kv_heads": 1,
    "head_dim": 40,
    "attention_scale": 0.2,
    "rope": Rope(8, 10000.0),
    "latent": LatentAttention(q_rank=20, kv_rank=32, nope_dim=12, rope_dim=8, value_dim=10),
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral", "windows": (19,)},
    "gemma2": GEMMA
    | {
        "family": "gemma2",
        "num_layers": 3,
        "windows": (19, None),
        "score_softcap": 2.0,
        "logit_softcap": 3.0,
    },
    "gemma3": GEMMA
    | {
        "family": "gemma3_text",
        "num_layers": 4,
        "windows": (19, 19, None),
        "rope": Rope(16, 1e6),
        "local_rope": Rope(16, 1e4),
        "qk_norm": True,
    },
    "gpt_oss": {
        "family": "gpt_oss",
        "windows": (19, None),
        "sinks": True,
        "qkv_bias": True,
        "output_bias": True,
        "intermediate_size": 24,
        "experts": Experts(5, 2, 24, scoring="softmax_of_chosen", bias=True),
        "activation": ClampedSwiglu(limit=0.5),
        "rope": Rope(16, 10000.0, YarnScaling(4.0, 32, attention_factor=1.1, truncate=False)),
    },
    "phi3": {
        "family": "phi3",
        "rope": Rope(12, 1e4, FrequencyFactors((1.0, 1.0, 1.5, 2.0, 2.0, 2.5), 1.2)),
    },
    "gpt2": GPT2 | {"family": "gpt2"},
    "deepseek_v2": LATENT
    | {
        "family": "deepseek_v2",
        "output_bias": True,
        "experts": Experts(6, 2, 12, first_layer=1, shared_size=20, scale=2.0),
    },
    "deepseek_v3": LATENT
    | {
        "family": "deepseek_v3",
        "latent": LatentAttention(q_rank=None, kv_rank=32, nope_dim=12, rope_dim=8, value_dim=10),
        "experts": Experts(
            8,
            3,
            12,
            shared_size=12,
            scoring="sigmoid",
            groups=4,
            groups_per_token=2,
            group_score="top2",
            normalized=True,
            scale=2.5,
            choice_bias=True,
        ),
    },
}


def tiny_config(**changes: Any) -> ModelConfig:
    """A small architecture: keywords replace the defaults."""
    values: dict[str, Any] = {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "vocab_size": 50,
        "max_context": 128,
        "norm_eps": 1e-5,
        "rope": Rope(16, 10000.0),
    }
    return ModelConfig(**(values | changes))
