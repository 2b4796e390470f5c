"""Gemma 2: soft caps, a window in every other layer, and norms before and after each block."""

from __future__ import annotations

import math
from typing import Any

from kvcore.models.config import ModelConfig
from kvcore.models.families.llama import FULL, SLIDING, Llama
from kvcore.models.files import Fields
from kvcore.models.tensors import Tensor, Tensors


class Gemma2(Llama):
    """Gemma 2."""

    model_type = "gemma2"
    understood = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
    max_context = 8192
    head_dim = 256
    tied_head = True
    activation_key = "hidden_activation"
    activation_names = ("gelu_pytorch_tanh",)
    has_windows = True
    score_softcap: float | None = 50.0
    logit_softcap: float | None = 30.0

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        scalar = fields.typed("query_pre_attn_scalar", float, 256.0)
        if scalar <= 0:
            raise fields.error("query_pre_attn_scalar", "a positive number", scalar)
        shared = super().config(fields, max_context)
        return shared | {
            "attention_scale": scalar**-0.5,
            "score_softcap": fields.nullable("attn_logit_softcapping", float, self.score_softcap),
            "logit_softcap": fields.nullable("final_logit_softcapping", float, self.logit_softcap),
            "post_norms": True,
            "activation": "gelu_tanh",
            "embedding_scale": math.sqrt(shared["hidden_size"]),
        }

    def window(self, fields: Fields) -> int | None:
        return fields.nullable("sliding_window", int, 4096)

    def layer_types(self, fields: Fields) -> tuple[str, ...]:
        return (SLIDING, FULL)

    def norms(self, config: ModelConfig, at: str) -> Tensors:
        names = {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
        size = config.hidden_size
        return {field: [self.norm(f"{at}{name}.weight", size)] for field, name in names.items()}

    def norm(self, name: str, size: int) -> Tensor:
        # Files hold what is added to 1.
        return Tensor(name, (size,), lambda values: values + 1)
