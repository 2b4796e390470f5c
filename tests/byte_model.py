"""A small random model whose tokens are bytes."""

from __future__ import annotations

from typing import Any

from kvcore.models import Model, ModelConfig, Rope


class ByteStream:
    def push(self, token):
        return chr(32 + token % 95)

    def flush(self):
        return ""


class ByteTokenizer:
    eos_ids = frozenset({0})

    def encode(self, text, add_special=True):
        return [ord(character) % 256 for character in text]

    def chat(self, messages):
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))

    def stream(self):
        return ByteStream()


def make_model(
    head_dim: int = 8, backend: str = "cpu", device: int | None = None, **changes: Any
) -> Model:
    config = ModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=48,
        vocab_size=256,
        max_context=512,
        norm_eps=1e-5,
        rope=Rope(dim=head_dim, theta=10_000.0),
        **changes,
    )
    decoder = Model.random(config, backend=backend, device=device).decoder
    return Model(config, decoder, ByteTokenizer, source="tiny")
