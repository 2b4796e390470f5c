"""Qwen2 and Qwen3: Llama with biases or norms on queries and keys, and windows in late layers."""

from __future__ import annotations

from typing import Any

from kvcore.models.families.llama import FULL, SLIDING, Llama
from kvcore.models.files import Fields


class Qwen2(Llama):
    """Qwen2 and Qwen2.5."""

    model_type = "qwen2"
    understood = frozenset({"use_sliding_window"})
    max_context = 32768
    has_windows = True

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        return super().config(fields, max_context) | {"qkv_bias": True, "output_bias": False}

    def window(self, fields: Fields) -> int | None:
        # A sliding_window is always there, but only counts when use_sliding_window says so.
        used = fields.typed("use_sliding_window", bool, False)
        return fields.nullable("sliding_window", int, 4096) if used else None

    def layer_types(self, fields: Fields) -> tuple[str, ...]:
        if self.window(fields) is None:
            return (FULL,)
        count = fields.positive("num_hidden_layers")
        full = min(fields.typed("max_window_layers", int, 28), count)
        return (FULL,) * full + (SLIDING,) * (count - full)


class Qwen3(Qwen2):
    """Qwen3, dense."""

    model_type = "qwen3"
    head_dim = 128

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        bias = fields.typed("attention_bias", bool, False)
        own = {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}
        return super().config(fields, max_context) | own
