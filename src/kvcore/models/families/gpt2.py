"""GPT-2: learned positions, LayerNorm with biases, and an MLP without a gate."""

from __future__ import annotations

from typing import Any

from kvcore.models.config import ModelConfig
from kvcore.models.families.llama import Llama
from kvcore.models.files import Fields
from kvcore.models.tensors import Tensor, Tensors, layer_norm, transposed


class Gpt2(Llama):
    """GPT-2."""

    model_type = "gpt2"
    activation_key = "activation_function"
    activation_names = ("gelu_new", "gelu_pytorch_tanh")

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        self._refuse_unsupported(fields)
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if fields.typed(key, bool, False):
                raise fields.error(key, "a model without this feature", "true")
        hidden, heads = fields.positive("n_embd", 768), fields.positive("n_head", 12)
        if hidden % heads:
            raise fields.error("n_embd", f"a multiple of n_head ({heads})", hidden)
        own_context = fields.positive("n_positions", 1024)
        scaled = fields.typed("scale_attn_weights", bool, True)
        return {
            "family": self.model_type,
            "num_layers": fields.positive("n_layer", 12),
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": hidden // heads,
            "intermediate_size": fields.positive("n_inner", 4 * hidden),
            "vocab_size": fields.positive("vocab_size", 50257),
            "max_context": min(own_context, max_context or own_context),
            "norm_eps": fields.typed("layer_norm_epsilon", float, 1e-5),
            "rope": None,
            "learned_positions": own_context,
            "attention_scale": None if scaled else 1.0,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "norm": "layer",
            "activation": "gelu_tanh",
            "gated": False,
            "tied_head": fields.typed("tie_word_embeddings", bool, True),
        }

    def outer(self, config: ModelConfig) -> Tensors:
        hidden, positions = config.hidden_size, config.learned_positions or config.max_context
        tensors = {
            "embedding": [Tensor("transformer.wte.weight", (config.vocab_size, hidden))],
            "positions": [Tensor("transformer.wpe.weight", (positions, hidden))],
            "norm": layer_norm("transformer.ln_f", hidden),
        }
        if not config.tied_head:
            tensors["head"] = [Tensor("lm_head.weight", (config.vocab_size, hidden))]
        return tensors

    def layer(self, config: ModelConfig, index: int) -> Tensors:
        at = f"transformer.h.{index}."
        hidden, size = config.hidden_size, config.intermediate_size
        return {
            "attention_norm": layer_norm(at + "ln_1", hidden),
            "qkv": [transposed(at + "attn.c_attn.weight", hidden, 3 * hidden)],
            "qkv_bias": [Tensor(at + "attn.c_attn.bias", (3 * hidden,))],
            "output": [transposed(at + "attn.c_proj.weight", hidden, hidden)],
            "output_bias": [Tensor(at + "attn.c_proj.bias", (hidden,))],
            "mlp_norm": layer_norm(at + "ln_2", hidden),
            "gate_up": [transposed(at + "mlp.c_fc.weight", hidden, size)],
            "gate_up_bias": [Tensor(at + "mlp.c_fc.bias", (size,))],
            "down": [transposed(at + "mlp.c_proj.weight", size, hidden)],
            "down_bias": [Tensor(at + "mlp.c_proj.bias", (hidden,))],
        }
