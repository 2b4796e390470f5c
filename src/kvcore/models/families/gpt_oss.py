"""GPT-OSS: attention sinks, a window in every other layer, and experts with a clamped SwiGLU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcore.models.config import ClampedSwiglu, Experts, ModelConfig
from kvcore.models.families.llama import FULL, SLIDING, Llama
from kvcore.models.files import Fields
from kvcore.models.tensors import FloatArray, Tensor, Tensors

# What a config.json without parameters of the rope means.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(Llama):
    """GPT-OSS with float weights; the published files in MXFP4 have to be converted first."""

    model_type = "gpt_oss"
    understood = frozenset({"num_local_experts", "num_experts"})
    max_context = 131072
    norm_eps = 1e-5
    rope_theta = 150000.0
    head_dim = 64
    has_windows = True

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        values = dict(fields.values)
        values.setdefault("attention_bias", True)
        if not values.get("rope_parameters") and not values.get("rope_scaling"):
            values["rope_parameters"] = YARN
        shared = super().config(Fields(fields.file, values), max_context)
        experts = Experts(
            count=fields.positive("num_local_experts", fields.get("num_experts", 128)),
            per_token=fields.positive("num_experts_per_tok", 4),
            intermediate_size=shared["intermediate_size"],
            scoring="softmax_of_chosen",
            bias=True,
        )
        activation = ClampedSwiglu(
            fields.typed("swiglu_alpha", float, 1.702), fields.typed("swiglu_limit", float, 7.0)
        )
        return shared | {"sinks": True, "experts": experts, "activation": activation}

    def window(self, fields: Fields) -> int | None:
        return fields.nullable("sliding_window", int, 128)

    def layer_types(self, fields: Fields) -> tuple[str, ...]:
        return (SLIDING, FULL)

    def attention(self, config: ModelConfig, at: str) -> Tensors:
        sinks = [Tensor(at + "sinks", (config.num_heads,))]
        return {**super().attention(config, at), "sinks": sinks}

    def mlp(self, config: ModelConfig, index: int, at: str) -> Tensors:
        assert config.experts is not None
        count, size, hidden = config.experts.count, config.intermediate_size, config.hidden_size

        def by_halves(values: FloatArray) -> FloatArray:
            """Columns gate, up, gate, up, ... as the rows of the gate, then those of up."""
            split = values.reshape(count, -1, size, 2)
            return np.reshape(split.transpose(0, 3, 2, 1), (count, 2 * size, -1))

        gate_up = Tensor(
            at + "experts.gate_up_proj",
            (count, hidden, 2 * size),
            by_halves,
            (count, 2 * size, hidden),
        )
        gate_up_bias = Tensor(
            at + "experts.gate_up_proj_bias",
            (count, 2 * size),
            lambda values: by_halves(values)[..., 0],
        )
        down = Tensor(
            at + "experts.down_proj",
            (count, size, hidden),
            lambda values: values.transpose(0, 2, 1),
            (count, hidden, size),
        )
        return {
            "router": [Tensor(at + "router.weight", (count, hidden))],
            "router_bias": [Tensor(at + "router.bias", (count,))],
            "expert_gate_up": [gate_up],
            "expert_gate_up_bias": [gate_up_bias],
            "expert_down": [down],
            "expert_down_bias": [Tensor(at + "experts.down_proj_bias", (count, hidden))],
        }
