from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import InvalidArgument, ModelFileError
from kvcore.models import LinearScaling, Llama3Scaling, Rope, YarnScaling
from kvcore.models.hf import read_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def write(directory: Path, config: object) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_llama(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, LLAMA))
    assert (config.family, config.num_layers, config.head_dim) == ("llama", 3, 16)
    assert config.rope == Rope(16, 20000.0)
    assert (config.bos_id, config.eos_ids) == (0, frozenset({2}))
    assert not (config.qkv_bias or config.output_bias or config.mlp_bias or config.qk_norm)
    assert not config.tied_head


def test_families_declare_features(tmp_path: Path) -> None:
    qwen2 = read_config(write(tmp_path, LLAMA | {"model_type": "qwen2", "sliding_window": 9}))
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read_config(write(tmp_path, LLAMA | {"model_type": "qwen3", "head_dim": 32}))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 32)
    biased = LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    llama = read_config(write(tmp_path, biased))
    assert llama.qkv_bias and llama.output_bias and llama.mlp_bias and llama.tied_head


def test_generation_config_adds_ends_of_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7, 9]}')
    assert read_config(write(tmp_path, LLAMA)).eos_ids == {2, 7, 9}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, LinearScaling(2.0)),
        ({"rope_scaling": {"rope_type": "default"}}, None),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Llama3Scaling(8.0, 1.0, 4.0, 64)),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3}}, Llama3Scaling(8.0, 1.0, 4.0, 64)),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "attention_factor": 1.5}},
            YarnScaling(4.0, 512, attention_factor=1.5),
        ),
    ],
)
def test_rope_scalings(tmp_path: Path, keys: dict[str, Any], expected: object) -> None:
    assert read_config(write(tmp_path, LLAMA | keys)).rope == Rope(16, 20000.0, expected)


def test_rope_theta_of_rope_parameters_wins(tmp_path: Path) -> None:
    keys = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert read_config(write(tmp_path, LLAMA | keys)).rope == Rope(16, 7.0)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model_type", {"model_type": "mamba"}),
        ("model_type", {"model_type": None}),
        ("hidden_size", {"hidden_size": None}),
        ("hidden_size", {"hidden_size": "64"}),
        ("hidden_size", {"hidden_size": True}),
        ("num_hidden_layers", {"num_hidden_layers": 0}),
        ("num_heads", {"num_key_value_heads": 3}),
        ("vocab_size", {"vocab_size": -1}),
        ("rms_norm_eps", {"rms_norm_eps": "small"}),
        ("norm_eps", {"rms_norm_eps": 0}),
        ("tie_word_embeddings", {"tie_word_embeddings": 1}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("windows", {"model_type": "mistral", "sliding_window": 0}),
        ("sliding_window", {"model_type": "mistral", "sliding_window": "all"}),
        ("sliding_window", {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}),
        ("sliding_window", {"use_sliding_window": True, "sliding_window": 9}),
        ("num_local_experts", {"num_local_experts": 8}),
        ("quantization_config", {"quantization_config": {"quant_method": "awq"}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
        ("rope_type", {"rope_scaling": {"rope_type": "dynamic"}}),
        ("short_factor", {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 8}}),
        ("rope_scaling", {"rope_scaling": "linear"}),
        ("factor", {"rope_scaling": {"rope_type": "linear"}}),
        ("factor", {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
        ("low_freq_factor", {"rope_scaling": {"rope_type": "llama3", "factor": 2}}),
        ("eos_token_id", {"eos_token_id": "</s>"}),
        ("head_dim", {"head_dim": 15}),
    ],
)
def test_bad_configs_name_the_key(tmp_path: Path, key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match=key) as raised:
        read_config(write(tmp_path, LLAMA | changes))
    assert "config.json" in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff\xfe"])
def test_not_a_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFileError, match="JSON"):
        read_config(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json"):
        read_config(tmp_path)


def test_config_checks_itself(tiny_config: Any) -> None:
    with pytest.raises(InvalidArgument, match="num_heads"):
        tiny_config(num_heads=5)
    with pytest.raises(InvalidArgument, match="hidden_size"):
        tiny_config(hidden_size=0)
    with pytest.raises(InvalidArgument, match="head_dim"):
        tiny_config(rope=Rope(32, 10000.0))
