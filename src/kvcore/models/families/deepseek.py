"""DeepSeek-V2 and V3: multi-head latent attention and mixtures of many small experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcore.models.config import Experts, LatentAttention, ModelConfig
from kvcore.models.families.llama import Llama, gated_mlp
from kvcore.models.families.rope_fields import rope_kind, rope_parameters
from kvcore.models.files import Fields
from kvcore.models.rope import yarn_temperature
from kvcore.models.tensors import FloatArray, Tensor, Tensors, rms_norm


class DeepseekV2(Llama):
    """DeepSeek-V2, V2-Lite and their kin."""

    model_type = "deepseek_v2"
    scoring = "softmax"
    first_expert_layer = 0

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        latent = LatentAttention(
            q_rank=fields.nullable("q_lora_rank", int, 1536),
            kv_rank=fields.positive("kv_lora_rank", 512),
            nope_dim=fields.positive("qk_nope_head_dim", 128),
            rope_dim=fields.positive("qk_rope_head_dim", 64),
            value_dim=fields.positive("v_head_dim", 128),
        )
        scale = (latent.nope_dim + latent.rope_dim) ** -0.5
        rope = rope_parameters(fields)
        if rope_kind(rope) != "default" and rope.get("mscale_all_dim"):
            factor, all_dim = rope.typed("factor", float), rope.typed("mscale_all_dim", float)
            scale *= yarn_temperature(factor, all_dim) ** 2
        return super().config(fields, max_context) | {
            "num_kv_heads": 1,
            "head_dim": latent.kv_rank + latent.rope_dim,
            "attention_scale": scale,
            "latent": latent,
            "experts": self.experts(fields),
        }

    def rope_dim(self, fields: Fields, head_dim: int) -> int:
        return fields.positive("qk_rope_head_dim", 64)

    def experts(self, fields: Fields) -> Experts | None:
        """The mixture of experts; None when no layer has one."""
        first = fields.typed("first_k_dense_replace", int, self.first_expert_layer)
        if first >= fields.positive("num_hidden_layers"):
            return None
        for key, only in (("moe_layer_freq", 1), ("scoring_func", self.scoring)):
            if fields.get(key, only) != only:
                raise fields.error(key, repr(only), repr(fields.get(key)))
        width = fields.positive("moe_intermediate_size", 1407)
        return Experts(
            count=fields.positive("n_routed_experts", 64),
            per_token=fields.positive("num_experts_per_tok"),
            intermediate_size=width,
            first_layer=first,
            shared_size=width * fields.positive("n_shared_experts", 2),
            scale=fields.typed("routed_scaling_factor", float, 1.0),
            **self.routing(fields),
        )

    def routing(self, fields: Fields) -> dict[str, Any]:
        """How experts are chosen."""
        if fields.typed("norm_topk_prob", bool, False):
            raise fields.error("norm_topk_prob", "false", "true")
        method = fields.get("topk_method", "greedy")
        if method == "greedy":
            return {}
        if method != "group_limited_greedy":
            raise fields.error("topk_method", "greedy or group_limited_greedy", repr(method))
        groups, chosen = fields.positive("n_group"), fields.positive("topk_group")
        return {"groups": groups, "groups_per_token": chosen}

    def attention(self, config: ModelConfig, at: str) -> Tensors:
        assert config.latent is not None
        m, heads, hidden = config.latent, config.num_heads, config.hidden_size
        up_shape = (heads * (m.nope_dim + m.value_dim), m.kv_rank)
        query_dim = m.nope_dim + m.rope_dim

        def heads_of(values: FloatArray) -> FloatArray:
            return np.reshape(values, (heads, -1, m.kv_rank))

        def turn_heads(values: FloatArray) -> FloatArray:
            turned = _by_halves(values.reshape(heads, query_dim, -1), m.nope_dim)
            return np.reshape(turned, values.shape)

        def turn_key(values: FloatArray) -> FloatArray:
            return np.asarray(_by_halves(values[None], m.kv_rank)[0])

        q_b = "q_proj" if m.q_rank is None else "q_b_proj"
        q_shape = (heads * query_dim, m.q_rank or hidden)
        kv_a_shape = (m.kv_rank + m.rope_dim, hidden)
        key_up = Tensor(
            at + "kv_b_proj.weight",
            up_shape,
            lambda values: heads_of(values)[:, : m.nope_dim].transpose(0, 2, 1),
            (heads, m.kv_rank, m.nope_dim),
        )
        value_up = Tensor(
            at + "kv_b_proj.weight",
            up_shape,
            lambda values: heads_of(values)[:, m.nope_dim :],
            (heads, m.value_dim, m.kv_rank),
        )
        tensors = {
            "q_b": [Tensor(f"{at}{q_b}.weight", q_shape, turn_heads)],
            "kv_a": [Tensor(at + "kv_a_proj_with_mqa.weight", kv_a_shape, turn_key)],
            "kv_a_norm": [rms_norm(at + "kv_a_layernorm.weight", m.kv_rank)],
            "key_up": [key_up],
            "value_up": [value_up],
            "output": [Tensor(at + "o_proj.weight", (hidden, heads * m.value_dim))],
        }
        if m.q_rank is not None:
            tensors["q_a"] = [Tensor(at + "q_a_proj.weight", (m.q_rank, hidden))]
            tensors["q_a_norm"] = [rms_norm(at + "q_a_layernorm.weight", m.q_rank)]
        if config.output_bias:
            tensors["output_bias"] = [Tensor(at + "o_proj.bias", (hidden,))]
            bias = Tensor(
                at + "kv_a_proj_with_mqa.bias",
                kv_a_shape[:1],
                lambda values: turn_key(values[:, None])[:, 0],
            )
            tensors["kv_a_bias"] = [bias]
            if m.q_rank is not None:
                tensors["q_a_bias"] = [Tensor(at + "q_a_proj.bias", (m.q_rank,))]
        return tensors

    def mlp(self, config: ModelConfig, index: int, at: str) -> Tensors:
        experts = config.layer_experts(index)
        if experts is None:
            return gated_mlp(config, at, config.intermediate_size)
        hidden, size = config.hidden_size, experts.intermediate_size
        count = range(experts.count)
        tensors = {
            **gated_mlp(config, at + "shared_experts.", experts.shared_size),
            "router": [Tensor(at + "gate.weight", (experts.count, hidden))],
            "expert_gate_up": [
                Tensor(f"{at}experts.{e}.{name}_proj.weight", (size, hidden))
                for e in count
                for name in ("gate", "up")
            ],
            "expert_down": [
                Tensor(f"{at}experts.{e}.down_proj.weight", (hidden, size)) for e in count
            ],
        }
        if experts.choice_bias:
            name = at + "gate.e_score_correction_bias"
            tensors["choice_bias"] = [Tensor(name, (experts.count,))]
        return tensors


def _by_halves(values: FloatArray, start: int) -> FloatArray:
    """Heads [H, D, ...] whose rotated elements, from `start` on, go from pairs to halves.

    Files hold the two elements that turn together side by side. Queries and keys are put into the
    other order alike, which leaves their products as they are.
    """
    pairs = values[:, start:]
    return np.concatenate((values[:, :start], pairs[:, 0::2], pairs[:, 1::2]), axis=1)


class DeepseekV3(DeepseekV2):
    """DeepSeek-V3, R1 and their kin; files in FP8 have to be converted to float weights first."""

    model_type = "deepseek_v3"
    max_context = 4096
    scoring = "sigmoid"
    first_expert_layer = 3

    def config(self, fields: Fields, max_context: int | None = None) -> dict[str, Any]:
        if not fields.typed("rope_interleave", bool, True):
            raise fields.error("rope_interleave", "true", "false")
        return super().config(fields, max_context) | {"mlp_bias": False}

    def experts(self, fields: Fields) -> Experts | None:
        values = dict(fields.values)
        defaults = {
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
        }
        return super().experts(Fields(fields.file, defaults | values))

    def routing(self, fields: Fields) -> dict[str, Any]:
        return {
            "scoring": "sigmoid",
            "groups": fields.positive("n_group", 8),
            "groups_per_token": fields.positive("topk_group", 4),
            "group_score": "top2",
            "normalized": fields.typed("norm_topk_prob", bool, True),
            "choice_bias": True,
        }
