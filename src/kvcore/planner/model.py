"""Model: the numbers of a decoder that memory and cost follow from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcore import checks
from kvcore.errors import InvalidArgument
from kvcore.formats import get_format
from kvcore.groups import GroupSpec
from kvcore.spec import CacheSpec


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        q_rank: width of the queries' own latent; None: queries are projected directly.
        kv_rank: elements of the latent that keys and values share.
        nope_dim, rope_dim: elements of a head's query that are not rotated, and that are.
        value_dim: elements of a head's value.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    Attributes:
        count, per_token: experts, and how many of them a token takes.
        intermediate_size: width of each.
        first_layer: layers before this one have a plain MLP.
        shared_size: width of the MLP that every token takes beside its experts; 0: none.
        bias: the router and the experts have biases.
        choice_bias: the router has a bias that takes part in the choice only.
    """

    count: int
    per_token: int
    intermediate_size: int
    first_layer: int = 0
    shared_size: int = 0
    bias: bool = False
    choice_bias: bool = False


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer, as far as its memory and its cost are concerned.

    Attributes:
        name: what it is called.
        num_layers, hidden_size, vocab_size: L, width of the residual stream, tokens.
        num_heads, num_kv_heads, head_dim: Hq, H and D. With `latent`, what the cache sees of it:
            one KV head of kv_rank + rope_dim.
        intermediate_size: width of the MLP.
        max_context: the most tokens that it was made for.
        windows: how many of the last tokens a layer sees, None for all: one a layer, or a shorter
            pattern that repeats.
        latent, experts: None where the model has none.
        gated: the MLP has three matrices, else two.
        tied_head: the output head is the embedding matrix.
        qkv_bias, output_bias, mlp_bias, qk_norm, post_norms, sinks: what else has parameters.
        layer_norm: norms have a bias too.
        learned_positions: positions with a learned vector.
        dtype: the format that its weights are published in.
        source: where the numbers are from.
        assumed: they are not published, but guessed.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    windows: tuple[int | None, ...] = (None,)
    latent: Latent | None = None
    experts: Experts | None = None
    gated: bool = True
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    sinks: bool = False
    layer_norm: bool = False
    learned_positions: int = 0
    dtype: str = "bf16"
    source: str = ""
    assumed: bool = False

    def __post_init__(self) -> None:
        for field in (
            "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim",
            "intermediate_size", "vocab_size", "max_context",
        ):  # fmt: skip
            checks.integer(getattr(self, field), field, 1)
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_heads: expected a multiple of {self.num_kv_heads} KV heads, "
                f"got {self.num_heads}"
            )
        if not 1 <= len(self.windows) <= self.num_layers:
            raise InvalidArgument(
                f"windows: expected 1 to {self.num_layers} of them, got {len(self.windows)}"
            )
        if get_format(self.dtype, "dtype").is_quantized:
            raise InvalidArgument(f"dtype: expected fp32, fp16 or bf16, got {self.dtype!r}")

    # ---- attention

    def window(self, layer: int) -> int | None:
        """How many of the last tokens a layer sees; None: all."""
        return self.windows[layer % len(self.windows)]

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return tuple(self.window(i) for i in range(self.num_layers))

    @property
    def head_dim_v(self) -> int:
        """Elements of a value as attention sees it: the latent's, where there is one."""
        return self.head_dim if self.latent is None else self.latent.kv_rank

    @property
    def prompt_dims(self) -> int:
        """D + Dv of the heads that a prompt is computed with: those of latent attention before it
        is absorbed into the cached latent."""
        latent = self.latent
        if latent is None:
            return 2 * self.head_dim
        return latent.nope_dim + latent.rope_dim + latent.value_dim

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def cache_spec(
        self,
        k_format: str = "bf16",
        v_format: str | None = None,
        *,
        block_size: int = 64,
        **options: Any,
    ) -> CacheSpec:
        """The cache that the model's decoder writes to.

        Layers of the same window form a group, which keeps no more tokens than they see.

        Args:
            k_format, v_format: how K and V are stored; v_format is k_format when left out.
            block_size: token slots of a block.
            options: further arguments of CacheSpec.
        """
        windows = sorted({window or 0 for window in self.layer_windows})
        return CacheSpec(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_in_k=None if self.latent is None else self.latent.kv_rank,
            groups=[GroupSpec(block_size, window or None) for window in windows],
            layer_groups=[windows.index(window or 0) for window in self.layer_windows],
            k_format=k_format,
            v_format=k_format if v_format is None else v_format,
            **options,
        )

    # ---- parameters

    @property
    def parameters(self) -> int:
        """All weights."""
        layers = self.num_layers
        return (
            self.embedding_parameters
            + layers * (self.attention_parameters + self.norm_parameters)
            + sum(self.mlp_parameters(i) for i in range(layers))
            + self._norm
        )

    @property
    def active_parameters(self) -> int:
        """The weights that one token meets: of experts those it takes, of embeddings the head."""
        idle = sum(self._idle_expert_parameters(i) for i in range(self.num_layers))
        head = self.vocab_size * self.hidden_size
        return self.parameters - idle - self.embedding_parameters + head

    @property
    def weight_nbytes(self) -> int:
        """Bytes of all weights in `dtype`."""
        return self.parameters * get_format(self.dtype).element_bits // 8

    @property
    def embedding_parameters(self) -> int:
        """Embedding, output head and learned positions."""
        matrices = 1 if self.tied_head else 2
        return (matrices * self.vocab_size + self.learned_positions) * self.hidden_size

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        if self.latent is not None:
            return self._latent_parameters(self.latent)
        hidden, q_size = self.hidden_size, self.num_heads * self.head_dim
        qkv_size = q_size + 2 * self.num_kv_heads * self.head_dim
        return (
            hidden * qkv_size
            + self.qkv_bias * qkv_size
            + q_size * hidden
            + self.output_bias * hidden
            + self.qk_norm * 2 * self.head_dim
            + self.sinks * self.num_heads
        )

    @property
    def norm_parameters(self) -> int:
        """Of one layer."""
        return (4 if self.post_norms else 2) * self._norm

    def layer_experts(self, layer: int) -> Experts | None:
        """A layer's experts; None where it has a plain MLP."""
        experts = self.experts
        return None if experts is None or layer < experts.first_layer else experts

    def mlp_parameters(self, layer: int) -> int:
        """Of one layer's MLP or experts, the router included."""
        experts = self.layer_experts(layer)
        if experts is None:
            return self._mlp(self.intermediate_size, self.mlp_bias)
        routing = experts.count * (self.hidden_size + experts.bias + experts.choice_bias)
        each = self._mlp(experts.intermediate_size, experts.bias)
        return routing + experts.count * each + self._mlp(experts.shared_size, False)

    def expert_parameters(self, layer: int) -> int:
        """Of one expert of a layer; 0 where it has none."""
        experts = self.layer_experts(layer)
        return 0 if experts is None else self._mlp(experts.intermediate_size, experts.bias)

    def _idle_expert_parameters(self, layer: int) -> int:
        experts = self.layer_experts(layer)
        if experts is None:
            return 0
        return (experts.count - experts.per_token) * self.expert_parameters(layer)

    @property
    def _norm(self) -> int:
        return self.hidden_size * (2 if self.layer_norm else 1)

    def _mlp(self, size: int, bias: bool) -> int:
        matrices, biases = (3, 2) if self.gated else (2, 1)
        return matrices * self.hidden_size * size + bias * (biases * size + self.hidden_size)

    def _latent_parameters(self, latent: Latent) -> int:
        hidden, heads = self.hidden_size, self.num_heads
        query = heads * (latent.nope_dim + latent.rope_dim)
        rank = latent.q_rank
        queries = hidden * query if rank is None else rank * (hidden + 1 + query)
        down = hidden * (latent.kv_rank + latent.rope_dim) + latent.kv_rank
        up = latent.kv_rank * heads * (latent.nope_dim + latent.value_dim)
        return queries + down + up + heads * latent.value_dim * hidden
