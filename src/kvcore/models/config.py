"""What a decoder is made of, as declared features rather than as a class per family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kvcore.errors import InvalidArgument
from kvcore.models.rope import Rope


@dataclass(frozen=True)
class ClampedSwiglu:
    """GPT-OSS's activation: g * sigmoid(alpha * g) * (u + 1).

    The gate g is cut at `limit` from above, u at `limit` on both sides.
    """

    alpha: float = 1.702
    limit: float = 7.0


# What a gated MLP does to its gate, or a plain one to its only input.
Activation = Literal["silu", "gelu_tanh"] | ClampedSwiglu


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads in one latent.

    A token's row in the cache is its latent, which is the value as well, and a rotated key that
    all heads share.

    Attributes:
        q_rank: width of the queries' own latent; None projects queries directly.
        kv_rank: elements of the latent.
        nope_dim, rope_dim: elements of a head's query that are not rotated, and that are.
        value_dim: elements of a head's value.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if (name, value) != ("q_rank", None):
                _check_positive(f"latent.{name}", value)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    Attributes:
        count: experts, of which a token takes `per_token`.
        intermediate_size: width of each.
        first_layer: layers before this one have a plain MLP.
        shared_size: width of an MLP that every token takes beside its experts; 0 for none.
        scoring: how router logits become scores: "softmax" or "sigmoid" over all experts, or
            "softmax_of_chosen", where the largest logits choose and only they share the softmax.
        groups, groups_per_token: experts lie in groups of equal size, and only those of a token's
            best groups can be chosen.
        group_score: a group counts by the "max" or the "top2" sum of its experts.
        normalized: the scores of the chosen experts are divided by their sum.
        scale: multiplies the scores of the chosen experts.
        choice_bias: a bias per expert that takes part in the choice, but not in the score.
        bias: router and experts have biases.
    """

    count: int
    per_token: int
    intermediate_size: int
    first_layer: int = 0
    shared_size: int = 0
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "top2"] = "max"
    normalized: bool = False
    scale: float = 1.0
    choice_bias: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "intermediate_size", "groups", "groups_per_token"):
            _check_positive(f"experts.{name}", getattr(self, name))
        for name in ("first_layer", "shared_size"):
            if getattr(self, name) < 0:
                raise InvalidArgument(
                    f"experts.{name}: at least 0 expected, got {getattr(self, name)}"
                )
        if self.count % self.groups or self.groups_per_token > self.groups:
            raise InvalidArgument(
                f"experts.groups: a divisor of count ({self.count}) that is at least "
                f"groups_per_token ({self.groups_per_token}) expected, got {self.groups}"
            )
        size = self.count // self.groups
        if self.group_score == "top2" and size < 2:
            raise InvalidArgument(f"experts.groups: groups of at least 2 expected, got {size}")
        if self.per_token > size * self.groups_per_token:
            raise InvalidArgument(
                f"experts.per_token: at most {size * self.groups_per_token} expected, "
                f"got {self.per_token}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder-only transformer.

    Every layer is: norm, attention, residual, norm, MLP or experts, residual.

    Attributes:
        family: "llama" (also SmolLM2), "gemma2", ...: who wrote the checkpoint.
        num_heads: query heads; a multiple of num_kv_heads.
        head_dim: elements of a head; need not be hidden_size / num_heads.
        intermediate_size: width of the MLP.
        max_context: the most tokens that a sequence may hold.
        norm_eps: added to the mean square or variance in norms.
        rope: the rotary embedding; None for none.
        learned_positions: how many positions have a learned vector that is added to the embedding.
        local_rope: that of layers with a window, where it is another.
        windows: how many of the last tokens a layer sees, itself included, or None for all: one
            for each layer, or a shorter pattern that repeats.
        attention_scale: multiplies q . k; None: 1 / sqrt(head_dim).
        score_softcap, logit_softcap: c in c * tanh(x / c) for scores and for logits.
        sinks: each head has a learned logit in its softmax, without a value.
        qkv_bias, output_bias, mlp_bias: which projections have biases.
        qk_norm: RMSNorm over head_dim on queries and keys before the rotation.
        latent: attention over a latent in place of num_kv_heads heads of head_dim.
        norm: "rms" for RMSNorm, "layer" for LayerNorm with a bias.
        post_norms: attention and MLP are normed before they are added, too.
        activation: of the MLP and the experts.
        gated: the MLP is down(activation(gate(x)) * up(x)); or else down(activation(up(x))).
        experts: a mixture of experts, from one of the layers on.
        embedding_scale: multiplies the embedding.
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
    rope: Rope | None
    learned_positions: int | None = None
    local_rope: Rope | None = None
    windows: tuple[int | None, ...] = (None,)
    attention_scale: float | None = None
    score_softcap: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    latent: LatentAttention | None = None
    norm: Literal["rms", "layer"] = "rms"
    post_norms: bool = False
    activation: Activation = "silu"
    gated: bool = True
    experts: Experts | None = None
    embedding_scale: float = 1.0
    tied_head: bool = False
    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim",
            "intermediate_size", "vocab_size", "max_context",
        ):  # fmt: skip
            _check_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_heads: a multiple of num_kv_heads ({self.num_kv_heads}) expected, "
                f"got {self.num_heads}"
            )
        for name in ("rope", "local_rope"):
            self._check_rope(name, getattr(self, name))
        if not 0 < self.norm_eps < math.inf:
            raise InvalidArgument(f"norm_eps: a positive number expected, got {self.norm_eps!r}")
        for name in ("attention_scale", "score_softcap", "logit_softcap", "embedding_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgument(f"{name}: a positive number expected, got {value!r}")
        if not 1 <= len(self.windows) <= self.num_layers:
            raise InvalidArgument(
                f"windows: one for each of {self.num_layers} layers or a shorter pattern "
                f"expected, got {len(self.windows)}"
            )
        for window in self.windows:
            if window is not None:
                _check_positive("windows", window)

    def _check_rope(self, name: str, rope: Rope | None) -> None:
        if rope is None:
            return
        most = self.head_dim if self.latent is None else self.latent.rope_dim
        if rope.dim % 2 or not 0 < rope.dim <= most or (self.latent and rope.dim != most):
            raise InvalidArgument(
                f"{name}.dim: an even number of head_dim ({most}) expected, got {rope.dim}"
            )

    @property
    def q_size(self) -> int:
        """Elements of a token's queries, all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of a token's keys, all heads; its values are as many."""
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """How many of the last tokens a layer sees; None for all."""
        return self.windows[layer % len(self.windows)]

    def layer_rope(self, layer: int) -> Rope | None:
        """A layer's rotary embedding."""
        local = self.local_rope is not None and self.window(layer) is not None
        return self.local_rope if local else self.rope

    def layer_experts(self, layer: int) -> Experts | None:
        """A layer's mixture of experts; None where it has a plain MLP."""
        experts = self.experts
        return None if experts is None or layer < experts.first_layer else experts


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or value <= 0:
        raise InvalidArgument(f"{name}: a positive integer expected, got {value!r}")
