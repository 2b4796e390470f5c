"""Models from config.json and GGUF files, against the built-in ones."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import kvcore
from kvcore.models import registry
from kvcore.planner import get_model, read_model

CONFIGS = {
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "sliding_window": 4096, "vocab_size": 32000,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "sliding_window": None, "vocab_size": 32000,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "sliding_window": 131072,
        "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "head_dim": 128, "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "vocab_size": 151936,
    },
    "gemma-2-9b": {
        "model_type": "gemma2", "head_dim": 256, "hidden_size": 3584, "intermediate_size": 14336,
        "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "sliding_window": 4096, "vocab_size": 256000,
    },
    "gemma-3-4b": {
        "model_type": "gemma3", "torch_dtype": "bfloat16",
        "text_config": {
            "head_dim": 256, "hidden_size": 2560, "intermediate_size": 10240,
            "max_position_embeddings": 131072, "num_attention_heads": 8, "num_hidden_layers": 34,
            "num_key_value_heads": 4, "sliding_window": 1024, "vocab_size": 262208,
        },
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "torch_dtype": "float32", "vocab_size": 50257,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_size": 2880,
        "intermediate_size": 2880, "max_position_embeddings": 131072, "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "sliding_window": 128, "vocab_size": 201088,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400,
    },
}  # fmt: skip


def write_config(directory, values):
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_the_built_in_models(name, tmp_path):
    found = read_model(write_config(tmp_path, CONFIGS[name]))
    wanted = get_model(name)
    assert found.layer_windows == wanted.layer_windows
    assert found.parameters == wanted.parameters
    same = {"name": "", "source": "", "windows": (None,)}
    assert replace(found, **same) == replace(wanted, **same)


def test_a_config_file_alone(tmp_path):
    write_config(tmp_path, CONFIGS["llama-3-8b"])
    found = read_model(tmp_path / "config.json")
    assert found.name == tmp_path.name
    assert found.cache_spec().bytes_per_token == 131_072


def test_the_gguf_file_of_smollm2():
    found = read_model(registry.locate("smollm2"))
    wanted = get_model("smollm2-135m")
    assert found.parameters == wanted.parameters
    assert replace(found, name="", source="") == replace(wanted, name="", source="")


def test_windows_of_some_layers_of_qwen(tmp_path):
    values = CONFIGS["qwen2.5-7b"] | {"use_sliding_window": True, "max_window_layers": 21}
    found = read_model(write_config(tmp_path, values))
    assert found.layer_windows == (None,) * 21 + (131072,) * 7


def test_a_family_that_nobody_knows(tmp_path):
    found = read_model(write_config(tmp_path, CONFIGS["llama-3-8b"] | {"model_type": "new"}))
    assert found.cache_spec().bytes_per_token == 131_072


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size: an integer expected, got nothing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: a positive integer expected, got 0"),
        ({"vocab_size": "many"}, "vocab_size: an integer expected, got 'many'"),
        ({"num_key_value_heads": 5}, "num_heads: expected a multiple of 5 KV heads, got 32"),
    ],
)
def test_sizes_that_are_missing_or_wrong(changes, message, tmp_path):
    write_config(tmp_path, CONFIGS["llama-3-8b"] | changes)
    with pytest.raises(kvcore.ModelFileError, match=message) as caught:
        read_model(tmp_path)
    assert "config.json" in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(kvcore.ModelFileError, match="there is no such file"):
        read_model(tmp_path)
    with pytest.raises(kvcore.ModelFileError, match="there is no such file"):
        read_model(tmp_path / "missing.gguf")


def test_a_file_that_is_not_gguf(tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(kvcore.ModelFileError, match=r"broken.gguf"):
        read_model(file)
