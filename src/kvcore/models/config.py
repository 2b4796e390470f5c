"""What a decoder is made of, as declared features rather than as a class per family."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcore.errors import InvalidArgument
from kvcore.models.rope import Rope


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder-only transformer.

    Every layer is: RMSNorm, attention with rotary embedding, residual, RMSNorm, SwiGLU, residual.

    Attributes:
        family: "llama" (also SmolLM2), "mistral", "qwen2" or "qwen3".
        num_heads: query heads; a multiple of num_kv_heads.
        head_dim: elements of a head; need not be hidden_size / num_heads.
        intermediate_size: width of the SwiGLU.
        max_context: the most tokens that a sequence may hold.
        norm_eps: added to the mean square in RMSNorm.
        qkv_bias, output_bias, mlp_bias: which projections have biases.
        qk_norm: RMSNorm over head_dim on queries and keys before the rotation.
        tied_head: the output head is the embedding matrix.
        bos_id: the token that starts a text, or None.
        eos_ids: tokens that end a text.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    norm_eps: float
    rope: Rope
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim",
            "intermediate_size", "vocab_size", "max_context",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise InvalidArgument(f"{name}: a positive integer expected, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_heads: a multiple of num_kv_heads ({self.num_kv_heads}) expected, "
                f"got {self.num_heads}"
            )
        if self.head_dim % 2 or self.rope.dim != self.head_dim:
            raise InvalidArgument(
                f"rope.dim: the even head_dim ({self.head_dim}) expected, got {self.rope.dim}"
            )
        if not 0 < self.norm_eps < math.inf:
            raise InvalidArgument(f"norm_eps: a positive number expected, got {self.norm_eps!r}")

    @property
    def q_size(self) -> int:
        """Elements of a token's queries, all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of a token's keys, all heads; its values are as many."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights that a file of this model holds."""
        h, f = self.hidden_size, self.intermediate_size
        qkv = self.q_size + 2 * self.kv_size
        layer = qkv * h + self.q_size * h + 3 * f * h + 2 * h
        layer += qkv * self.qkv_bias + h * self.output_bias + (2 * f + h) * self.mlp_bias
        layer += 2 * self.head_dim * self.qk_norm
        heads = 1 if self.tied_head else 2
        return self.num_layers * layer + heads * self.vocab_size * h + h
