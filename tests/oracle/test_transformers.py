"""Logits of random tiny models of Llama and Qwen, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvcore
from kvcore.models import load
from tiny_models import LENGTH, cached_logits, logits_of, random_model

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa-biases": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-wide-heads": ("Llama", {"head_dim": 32}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-tuned": (
        "Llama",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "hidden_size": 48}),
    "qwen3": ("Qwen3", {}),
    "qwen3-wide-heads": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"attention_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_tiny_models(case: str, tmp_path: Path) -> None:
    theirs = random_model(*CASES[case])
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = np.random.default_rng(6).integers(0, 256, LENGTH)
    expected = logits_of(theirs, ids)
    assert expected.std() > 0.5
    np.testing.assert_allclose(model.decoder.forward_full(ids), expected, rtol=0, atol=1e-4)
    cached = cached_logits(model, ids, [40, 7, 33])
    np.testing.assert_allclose(cached, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype: str, tmp_path: Path) -> None:
    half, theirs = getattr(torch, dtype), random_model("Llama", {})
    with torch.no_grad():
        for parameter in theirs.parameters():  # not .to(): that would round the rotation as well
            parameter.copy_(parameter.to(half).float())
    ids = np.arange(50)
    expected = logits_of(theirs, ids)
    theirs.to(half).save_pretrained(tmp_path)
    got = load(tmp_path).decoder.forward_full(ids)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_sharded_files(tmp_path: Path) -> None:
    theirs = random_model("Qwen3", {})
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = np.arange(50)
    got = load(tmp_path).decoder.forward_full(ids)
    np.testing.assert_allclose(got, logits_of(theirs, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["llama-llama3", "qwen2", "qwen3"])
def test_greedy_tokens(case: str, tmp_path: Path) -> None:
    theirs = random_model(*CASES[case])
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    prompt = np.arange(20)
    expected = theirs.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=40, do_sample=False, eos_token_id=None
    )[0].tolist()

    spec = model.cache_spec(block_size=16, k_format="fp32", v_format="fp32")
    cache = kvcore.KVCache(spec, num_blocks=16)
    sequence, ids, new = cache.sequence(), prompt.tolist(), prompt.tolist()
    for _ in range(40):
        with cache.step([(sequence, len(new))]) as step:
            logits = model.decoder.forward(step, new)
        new = [int(np.argmax(logits[0]))]
        ids += new
    assert ids == expected
