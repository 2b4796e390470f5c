"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from kvcore.models.families.llama import SLIDING, Llama
from kvcore.models.files import Fields


class Mistral(Llama):
    """Mistral 7B and what followed it; from version 0.2 on without a window."""

    model_type = "mistral"
    max_context = 4096 * 32
    has_windows = True

    def window(self, fields: Fields) -> int | None:
        return fields.nullable("sliding_window", int, 4096)

    def layer_types(self, fields: Fields) -> tuple[str, ...]:
        return (SLIDING,)
