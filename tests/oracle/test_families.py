"""Logits of random tiny models of every family at every position, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcore.models import generate, load
from tiny_models import LENGTH, SIZES, cached_logits, logits_of, random_model

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")

GPT2_SIZES: dict[str, Any] = {
    "n_embd": 96,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 128,
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 6,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "first_k_dense_replace": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 16 for i in range(8)],
    "long_factor": [1.5 + i / 4 for i in range(8)],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 21}),
    "mistral-without-window": ("Mistral", {"sliding_window": None}),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    ),
    "gemma2": ("Gemma2", {"sliding_window": 21, "query_pre_attn_scalar": 24}),
    "gemma2-tied": (
        "Gemma2",
        {"sliding_window": 16, "tie_word_embeddings": True, "attn_logit_softcapping": 2.0},
    ),
    "gemma2-without-caps": (
        "Gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 64},
    ),
    "gemma3": ("Gemma3Text", {"sliding_window": 21, "num_hidden_layers": 7}),
    "gemma3-scaled": (
        "Gemma3Text",
        {"sliding_window": 9, "num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE},
    ),
    "gpt-oss": (
        "GptOss",
        {"sliding_window": 21, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "gpt-oss-plain-rope": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 4,
            "swiglu_limit": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": 21, "num_key_value_heads": 6}),
    "phi3-partly-rotated": (
        "Phi3",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ),
    "phi3-longrope": (
        "Phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64},
    ),
    "gpt2": ("GPT2", {}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 120}),
    "deepseek-v2": ("DeepseekV2", MLA | {"first_k_dense_replace": 1}),
    "deepseek-v2-dense": ("DeepseekV2", MLA | {"q_lora_rank": None, "attention_bias": True}),
    "deepseek-v2-groups": (
        "DeepseekV2",
        MLA
        | {
            "first_k_dense_replace": 0,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.0,
        },
    ),
    "deepseek-v2-yarn": (
        "DeepseekV2",
        MLA | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        MLA | {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    ),
    "deepseek-v3-dense": ("DeepseekV3", MLA | {"attention_bias": True}),
    "deepseek-v3-yarn": (
        "DeepseekV3",
        MLA
        | {
            "first_k_dense_replace": 2,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
}


def case_of(name: str) -> Any:
    family, changes = CASES[name]
    sizes = SIZES
    if family == "GPT2":
        sizes = GPT2_SIZES
    elif family == "Phi3":
        sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return random_model(family, changes, sizes)


WITH_WINDOWS = ["mistral", "gemma2", "gemma3", "gpt-oss", "phi3-window"]


@pytest.mark.parametrize("case", CASES)
def test_logits_at_every_position(case: str, tmp_path: Path) -> None:
    theirs = case_of(case)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = np.random.default_rng(6).integers(0, 256, LENGTH)
    expected = logits_of(theirs, ids)
    assert expected.std() > 0.5
    full = model.decoder.forward_full(ids)
    np.testing.assert_allclose(full, expected, rtol=1e-5, atol=1e-4)
    for chunks in ([LENGTH], [40, 7, 33]):
        cached = cached_logits(model, ids, chunks)
        np.testing.assert_allclose(cached, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["gemma2", "gpt-oss", "deepseek-v3"])
def test_errors_against_float64(case: str, tmp_path: Path) -> None:
    theirs = case_of(case)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = np.random.default_rng(6).integers(0, 256, LENGTH)
    rounding = np.abs(logits_of(theirs, ids) - (exact := logits_of(theirs.double(), ids))).max()
    cached = cached_logits(model, ids, [40, 7, 33])
    assert np.abs(cached - exact).max() < 3 * rounding


@pytest.mark.parametrize("case", WITH_WINDOWS)
def test_greedy_tokens(case: str, tmp_path: Path) -> None:
    theirs = case_of(case)
    theirs.save_pretrained(tmp_path)
    prompt = np.arange(30)
    expected = theirs.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=40, do_sample=False, eos_token_id=None
    )[0].tolist()
    options = {"block_size": 16, "k_format": "fp32", "v_format": "fp32"}
    done = generate(load(tmp_path), [prompt.tolist()], max_tokens=40, ignore_eos=True, **options)
    assert prompt.tolist() + done[0].tokens == expected


@pytest.mark.parametrize("length", [64, 90])
def test_long_rope_by_context(length: int, tmp_path: Path) -> None:
    """transformers takes the short factors for a text up to the original context."""
    theirs = case_of("phi3-longrope")
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(6).integers(0, 256, length)
    model = load(tmp_path, max_context=length)
    cached = cached_logits(model, ids, [length - 9])
    np.testing.assert_allclose(cached, logits_of(theirs, ids), rtol=1e-5, atol=1e-4)


def test_half_precision_norms_that_are_added_to_1(tmp_path: Path) -> None:
    theirs = case_of("gemma2")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16().float())
    ids = np.arange(50)
    expected = logits_of(theirs, ids)
    theirs.bfloat16().save_pretrained(tmp_path)
    got = load(tmp_path).decoder.forward_full(ids)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
