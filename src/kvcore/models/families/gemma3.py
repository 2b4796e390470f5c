"""Gemma 3, the language model: five local layers to a global one, each kind with its own rope."""

from __future__ import annotations

from typing import Any

from kvcore.models.families.gemma2 import Gemma2
from kvcore.models.families.llama import FULL, SLIDING
from kvcore.models.families.rope_fields import read_rope, rope_parameters
from kvcore.models.files import Fields
from kvcore.models.rope import Rope


class Gemma3(Gemma2):
    """Gemma 3 without its vision tower."""

    model_type = "gemma3_text"
    max_context = 131072
    rope_theta = 1e6
    local_rope_theta = 1e4
    score_softcap = None
    logit_softcap = None

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        rope = rope_parameters(fields)
        if not {FULL, SLIDING} & rope.values.keys():
            # Before there were parameters by kind of layer, the only ones were the global layers'.
            local = fields.typed("rope_local_base_freq", float, self.local_rope_theta)
            shared = super().config(fields, max_context)
            return shared | {"qk_norm": True, "local_rope": Rope(shared["head_dim"], local)}
        parts = {key: Fields(rope.file, _object(rope, key)) for key in (FULL, SLIDING)}
        plain = {k: v for k, v in fields.values.items() if k != "rope_parameters"}
        shared = super().config(Fields(fields.file, plain), max_context)
        thetas = {FULL: self.rope_theta, SLIDING: self.local_rope_theta}
        ropes = {
            key: read_rope(
                fields, shared["head_dim"], thetas[key], shared["max_context"], parts[key]
            )
            for key in (FULL, SLIDING)
        }
        return shared | {"qk_norm": True, "rope": ropes[FULL], "local_rope": ropes[SLIDING]}

    def layer_types(self, fields: Fields) -> tuple[str, ...]:
        pattern = fields.positive("sliding_window_pattern", 6)
        if pattern > fields.positive("num_hidden_layers"):
            return (SLIDING,)
        return (SLIDING,) * (pattern - 1) + (FULL,)


def _object(fields: Fields, key: str) -> dict[str, Any]:
    value = fields.get(key, {})
    if not isinstance(value, dict):
        raise fields.error(key, "an object", repr(value)[:80])
    return value
