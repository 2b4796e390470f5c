"""What the config.json of each family means, from the values that published models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import ModelFileError
from kvcore.models import ModelConfig, Rope, YarnScaling
from kvcore.models.config import ClampedSwiglu, Experts, LatentAttention
from kvcore.models.families import FAMILIES
from kvcore.models.hf import read_config
from kvcore.models.rope import FrequencyFactors, LinearScaling

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
DEEPSEEK: dict[str, Any] = SIZES | {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}


def read(directory: Path, model_type: str, max_context: int | None = None, **keys: Any) -> Any:
    (directory / "config.json").write_text(json.dumps(keys | {"model_type": model_type}))
    return read_config(directory, max_context)


def windows(config: ModelConfig) -> list[int | None]:
    return [config.window(layer) for layer in range(config.num_layers)]


def test_mistral(tmp_path: Path) -> None:
    assert windows(read(tmp_path, "mistral", **SIZES, sliding_window=32)) == [32] * 12
    assert windows(read(tmp_path, "mistral", **SIZES)) == [4096] * 12
    assert windows(read(tmp_path, "mistral", **SIZES, sliding_window=None)) == [None] * 12


def test_qwen2(tmp_path: Path) -> None:
    keys = SIZES | {"sliding_window": 32, "max_window_layers": 8}
    assert windows(read(tmp_path, "qwen2", **keys)) == [None] * 12
    used = read(tmp_path, "qwen2", **keys, use_sliding_window=True)
    assert windows(used) == [None] * 8 + [32] * 4


def test_gemma2(tmp_path: Path) -> None:
    config = read(tmp_path, "gemma2", **SIZES, query_pre_attn_scalar=144, sliding_window=4096)
    assert windows(config) == [4096, None] * 6
    assert (config.head_dim, config.attention_scale) == (256, 1 / 12)
    assert (config.score_softcap, config.logit_softcap) == (50.0, 30.0)
    assert (config.embedding_scale, config.activation) == (8.0, "gelu_tanh")
    assert config.post_norms and config.tied_head and config.local_rope is None
    plain = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = read(tmp_path, "gemma2", **SIZES, **plain)
    assert (config.score_softcap, config.logit_softcap) == (None, None)


def test_gemma3(tmp_path: Path) -> None:
    keys = SIZES | {"sliding_window": 512, "head_dim": 32, "rope_local_base_freq": 5000}
    scaling = {"factor": 8.0, "rope_type": "linear"}
    config = read(tmp_path, "gemma3_text", **keys, rope_scaling=scaling)
    assert windows(config) == ([512] * 5 + [None]) * 2
    assert config.layer_rope(5) == Rope(32, 1e6, LinearScaling(8.0))
    assert config.layer_rope(0) == Rope(32, 5000.0)
    assert config.qk_norm and config.score_softcap is None

    parameters = {
        "full_attention": scaling,
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000},
    }
    assert read(tmp_path, "gemma3_text", **keys, rope_parameters=parameters) == config
    one_kind = read(tmp_path, "gemma3_text", **keys, sliding_window_pattern=20)
    assert windows(one_kind) == [512] * 12


def test_gpt_oss(tmp_path: Path) -> None:
    config = read(tmp_path, "gpt_oss", **SIZES, num_local_experts=32, sliding_window=128)
    assert windows(config) == [128, None] * 6
    assert config.experts == Experts(32, 4, 96, scoring="softmax_of_chosen", bias=True)
    assert config.activation == ClampedSwiglu(1.702, 7.0)
    assert config.sinks and config.qkv_bias and config.output_bias
    assert config.rope.theta == 150000.0
    assert isinstance(config.rope.scaling, YarnScaling) and not config.rope.scaling.truncate
    with pytest.raises(ModelFileError, match="quantization_config"):
        read(tmp_path, "gpt_oss", **SIZES, quantization_config={"quant_method": "mxfp4"})


def test_phi3(tmp_path: Path) -> None:
    assert windows(read(tmp_path, "phi3", **SIZES, sliding_window=2047)) == [2047] * 12
    assert windows(read(tmp_path, "phi3", **SIZES)) == [None] * 12
    partly = read(tmp_path, "phi3", **SIZES, partial_rotary_factor=0.75)
    assert (partly.head_dim, partly.rope) == (16, Rope(12, 10000.0))


@pytest.mark.parametrize(
    ("max_context", "divisor", "context"), [(None, 4.0, 512), (64, 1.0, 64), (65, 4.0, 65)]
)
def test_long_rope_is_chosen_by_the_context(
    tmp_path: Path, max_context: int | None, divisor: float, context: int
) -> None:
    keys = SIZES | {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    }
    config = read(tmp_path, "phi3", max_context, **keys)
    assert config.max_context == context
    # sqrt(1 + ln(512 / 64) / ln(64)), whichever factors are taken.
    assert config.rope.scaling == FrequencyFactors((divisor,) * 8, pytest.approx(1.5**0.5))


def test_gpt2(tmp_path: Path) -> None:
    config = read(tmp_path, "gpt2", n_embd=768, n_layer=12, n_head=12, n_positions=1024)
    assert (config.head_dim, config.num_kv_heads, config.intermediate_size) == (64, 12, 3072)
    assert (config.norm, config.gated, config.rope) == ("layer", False, None)
    assert (config.learned_positions, config.max_context) == (1024, 1024)
    assert config.vocab_size == 50257 and config.tied_head
    short = read(tmp_path, "gpt2", 100, n_embd=768)
    assert (short.learned_positions, short.max_context) == (1024, 100)


def test_deepseek_v2(tmp_path: Path) -> None:
    keys = DEEPSEEK | {"q_lora_rank": None, "num_experts_per_tok": 6}
    config = read(tmp_path, "deepseek_v2", **keys)
    assert config.latent == LatentAttention(None, 512, 128, 64, 128)
    assert (config.num_kv_heads, config.head_dim) == (1, 576)
    assert config.experts == Experts(64, 6, 24, first_layer=1, shared_size=48)
    # 192^-1/2 * (0.0707 ln 40 + 1)^2, and no temperature in cos and sin.
    assert config.attention_scale == pytest.approx(0.11472138679292611)
    assert config.rope.dim == 64 and config.rope.scaling.attention_factor == 1.0
    dense = read(tmp_path, "deepseek_v2", **keys | {"first_k_dense_replace": 12})
    assert dense.experts is None


def test_deepseek_v3(tmp_path: Path) -> None:
    config = read(tmp_path, "deepseek_v3", **DEEPSEEK, q_lora_rank=1536)
    assert config.latent == LatentAttention(1536, 512, 128, 64, 128)
    assert config.experts == Experts(
        256,
        8,
        24,
        first_layer=1,
        shared_size=24,
        scoring="sigmoid",
        groups=8,
        groups_per_token=4,
        group_score="top2",
        normalized=True,
        scale=2.5,
        choice_bias=True,
    )


@pytest.mark.parametrize(
    ("model_type", "key", "changes"),
    [
        ("mistral", "sliding_window", {"sliding_window": "all"}),
        ("gemma2", "hidden_activation", {"hidden_activation": "relu"}),
        ("gemma2", "query_pre_attn_scalar", {"query_pre_attn_scalar": 0}),
        ("gemma2", "score_softcap", {"attn_logit_softcapping": -1.0}),
        ("gemma2", "use_bidirectional_attention", {"use_bidirectional_attention": True}),
        ("gemma3_text", "full_attention", {"rope_parameters": {"full_attention": 3}}),
        ("gemma3_text", "sliding_window_pattern", {"sliding_window_pattern": 0}),
        ("gpt_oss", "experts.per_token", {"num_local_experts": 3}),
        ("gpt_oss", "swiglu_limit", {"swiglu_limit": "7"}),
        ("phi3", "partial_rotary_factor", {"partial_rotary_factor": 1.5}),
        ("phi3", "rope.dim", {"partial_rotary_factor": 0.3125}),
        ("gpt2", "n_embd", {"n_embd": 100}),
        ("gpt2", "activation_function", {"activation_function": "relu"}),
        ("gpt2", "scale_attn_by_inverse", {"scale_attn_by_inverse_layer_idx": True}),
        ("deepseek_v2", "num_experts_per_tok", {}),
        ("deepseek_v2", "topk_method", {"topk_method": "random", "num_experts_per_tok": 2}),
        (
            "deepseek_v2",
            "n_group",
            {"topk_method": "group_limited_greedy", "num_experts_per_tok": 2},
        ),
        ("deepseek_v3", "rope_interleave", {"rope_interleave": False}),
        ("deepseek_v3", "scoring_func", {"scoring_func": "softmax"}),
        ("deepseek_v3", "kv_lora_rank", {"kv_lora_rank": 0}),
        ("deepseek_v3", "latent.q_rank", {"q_lora_rank": 0}),
        ("deepseek_v3", "experts.first_layer", {"first_k_dense_replace": -1}),
        (
            "deepseek_v3",
            "mscale",
            {"rope_scaling": DEEPSEEK["rope_scaling"] | {"mscale": "1"}},
        ),
        ("deepseek_v3", "experts.groups", {"n_group": 3}),
    ],
)
def test_bad_configs_name_the_key(
    tmp_path: Path, model_type: str, key: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ModelFileError, match=key) as raised:
        read(tmp_path, model_type, **SIZES | changes)
    assert "config.json" in str(raised.value)


def test_unknown_families_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="model_type") as raised:
        read(tmp_path, "mamba", **SIZES)
    assert all(name in str(raised.value) for name in FAMILIES)
    assert len(FAMILIES) == 11
