"""Phi-3 and Phi-4: Llama with fused projections, LongRoPE and partly rotated heads."""

from __future__ import annotations

from kvcore.models.config import ModelConfig
from kvcore.models.families.llama import SLIDING, Llama
from kvcore.models.families.rope_fields import partial_rotary_factor
from kvcore.models.files import Fields
from kvcore.models.tensors import Tensor, Tensors


class Phi3(Llama):
    """Phi-3, Phi-3.5 and Phi-4, dense."""

    model_type = "phi3"
    max_context = 4096
    norm_eps = 1e-5
    has_windows = True

    def rope_dim(self, fields: Fields, head_dim: int) -> int:
        return int(head_dim * partial_rotary_factor(fields))

    def window(self, fields: Fields) -> int | None:
        return fields.nullable("sliding_window", int, None)

    def layer_types(self, fields: Fields) -> tuple[str, ...]:
        return (SLIDING,)

    def attention(self, config: ModelConfig, at: str) -> Tensors:
        hidden = config.hidden_size
        rows = config.q_size + 2 * config.kv_size
        return {
            "qkv": [Tensor(at + "qkv_proj.weight", (rows, hidden))],
            "output": [Tensor(at + "o_proj.weight", (hidden, config.q_size))],
        }

    def mlp(self, config: ModelConfig, index: int, at: str) -> Tensors:
        hidden, size = config.hidden_size, config.intermediate_size
        return {
            "gate_up": [Tensor(at + "gate_up_proj.weight", (2 * size, hidden))],
            "down": [Tensor(at + "down_proj.weight", (hidden, size))],
        }
