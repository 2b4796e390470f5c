"""Llama, and what the other families have in common with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcore.models.config import ModelConfig
from kvcore.models.families.rope_fields import partial_rotary_factor, read_rope
from kvcore.models.files import Fields
from kvcore.models.tensors import Tensor, Tensors, rms_norm

# Keys of config.json that change the arithmetic, and the values that leave Llama's as it is.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "use_sliding_window": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_bidirectional_attention": (False,),
    "quantization_config": (),
}

FULL, SLIDING = "full_attention", "sliding_attention"


class Llama:
    """Llama and SmolLM2: the base of the other families, which say what they do otherwise.

    Attributes:
        model_type: as config.json calls the family.
        understood: keys of NEUTRAL that the family reads.
        max_context, norm_eps, rope_theta, head_dim, tied_head: what a config.json without the key
            means.
        activation_key, activation_names: the key of the activation, and what it may be.
        has_windows: whether layers may have a window.
    """

    model_type = "llama"
    understood: frozenset[str] = frozenset()
    max_context = 2048
    norm_eps = 1e-6
    rope_theta = 10000.0
    head_dim: int | None = None
    tied_head = False
    activation_key = "hidden_act"
    activation_names: tuple[str, ...] = ("silu", "swish")
    has_windows = False

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        """The arguments of a ModelConfig.

        Args:
            fields: config.json.
            max_context: fewer tokens than the model's own maximum.

        Raises:
            ModelFileError: for a missing or mistyped key or a feature that the decoder does not
                have; the message names the key.
        """
        self._refuse_unsupported(fields)
        hidden, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
        head_dim = fields.positive("head_dim", self.head_dim or max(hidden // heads, 1))
        bias = fields.typed("attention_bias", bool, False)
        layers = fields.positive("num_hidden_layers")
        context = fields.positive("max_position_embeddings", self.max_context)
        context = min(context, max_context or context)
        return {
            "family": self.model_type,
            "num_layers": layers,
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": fields.positive("num_key_value_heads", heads),
            "head_dim": head_dim,
            "intermediate_size": fields.positive("intermediate_size"),
            "vocab_size": fields.positive("vocab_size"),
            "max_context": context,
            "norm_eps": fields.typed("rms_norm_eps", float, self.norm_eps),
            "rope": read_rope(fields, self.rope_dim(fields, head_dim), self.rope_theta, context),
            "windows": self.windows(fields, layers),
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": fields.typed("mlp_bias", bool, False),
            "tied_head": fields.typed("tie_word_embeddings", bool, self.tied_head),
        }

    def rope_dim(self, fields: Fields, head_dim: int) -> int:
        """How many elements of a head are rotated."""
        share = partial_rotary_factor(fields)
        if share != 1:
            raise fields.error("partial_rotary_factor", "1", share)
        return head_dim

    def windows(self, fields: Fields, num_layers: int) -> tuple[int | None, ...]:
        """The window of each layer, or a pattern of windows."""
        listed = fields.get("layer_types")
        types = self.layer_types(fields) if listed is None else listed
        if listed is not None and (not isinstance(listed, list) or len(listed) != num_layers):
            raise fields.error("layer_types", f"a list of {num_layers}", repr(listed)[:80])
        known = (FULL, SLIDING) if self.has_windows else (FULL,)
        for layer_type in types:
            if layer_type not in known:
                raise fields.error("layer_types", " or ".join(known), repr(layer_type)[:80])
        window = self.window(fields)
        if listed is not None and SLIDING in listed and window is None:
            raise fields.error("sliding_window", "a positive integer", "nothing")
        return tuple(window if kind == SLIDING else None for kind in types)[:num_layers]

    def window(self, fields: Fields) -> int | None:
        """The window of the layers that have one."""
        return None

    def layer_types(self, fields: Fields) -> tuple[str, ...]:
        """The pattern of layer types where config.json does not list them."""
        return (FULL,)

    def _refuse_unsupported(self, fields: Fields) -> None:
        for key, neutral in NEUTRAL.items():
            value = fields.get(key)
            if value is not None and value not in neutral and key not in self.understood:
                raise fields.error(key, "a model without this feature", repr(value)[:80])
        activation = fields.get(self.activation_key, self.activation_names[0])
        if activation not in self.activation_names:
            raise fields.error(self.activation_key, self.activation_names[0], repr(activation))

    def outer(self, config: ModelConfig) -> Tensors:
        """See `Checkpoint`."""
        shape = (config.vocab_size, config.hidden_size)
        tensors = {
            "embedding": [Tensor("model.embed_tokens.weight", shape)],
            "norm": [self.norm("model.norm.weight", config.hidden_size)],
        }
        if not config.tied_head:
            tensors["head"] = [Tensor("lm_head.weight", shape)]
        return tensors

    def layer(self, config: ModelConfig, index: int) -> Tensors:
        """See `Checkpoint`."""
        at = f"model.layers.{index}."
        return {
            **self.norms(config, at),
            **self.attention(config, at + "self_attn."),
            **self.mlp(config, index, at + "mlp."),
        }

    def norms(self, config: ModelConfig, at: str) -> Tensors:
        """The norms of a layer whose tensors' names start with `at`."""
        return {
            "attention_norm": [self.norm(at + "input_layernorm.weight", config.hidden_size)],
            "mlp_norm": [self.norm(at + "post_attention_layernorm.weight", config.hidden_size)],
        }

    def norm(self, name: str, size: int) -> Tensor:
        """The weight of a norm."""
        return rms_norm(name, size)

    def attention(self, config: ModelConfig, at: str) -> Tensors:
        """The attention of a layer."""
        hidden, q_size, kv_size = config.hidden_size, config.q_size, config.kv_size
        rows = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        tensors = {
            "qkv": [Tensor(f"{at}{name}.weight", (n, hidden)) for name, n in rows.items()],
            "output": [Tensor(at + "o_proj.weight", (hidden, q_size))],
        }
        if config.qkv_bias:
            tensors["qkv_bias"] = [Tensor(f"{at}{name}.bias", (n,)) for name, n in rows.items()]
        if config.output_bias:
            tensors["output_bias"] = [Tensor(at + "o_proj.bias", (hidden,))]
        if config.qk_norm:
            tensors["q_norm"] = [self.norm(at + "q_norm.weight", config.head_dim)]
            tensors["k_norm"] = [self.norm(at + "k_norm.weight", config.head_dim)]
        return tensors

    def mlp(self, config: ModelConfig, index: int, at: str) -> Tensors:
        """The MLP of a layer."""
        return gated_mlp(config, at, config.intermediate_size)


def gated_mlp(config: ModelConfig, at: str, size: int) -> Tensors:
    """An MLP of gate, up and down projections of some inner width."""
    hidden = config.hidden_size
    names = ("gate_proj", "up_proj")
    tensors = {
        "gate_up": [Tensor(f"{at}{name}.weight", (size, hidden)) for name in names],
        "down": [Tensor(at + "down_proj.weight", (hidden, size))],
    }
    if config.mlp_bias:
        tensors["gate_up_bias"] = [Tensor(f"{at}{name}.bias", (size,)) for name in names]
        tensors["down_bias"] = [Tensor(at + "down_proj.bias", (hidden,))]
    return tensors
