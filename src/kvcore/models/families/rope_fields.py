"""The rotary embedding that a config.json declares."""

from __future__ import annotations

import math

from kvcore.models.files import Fields
from kvcore.models.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    Rope,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def rope_parameters(fields: Fields) -> Fields:
    """rope_parameters, or rope_scaling as it was called before; empty when there is neither."""
    parameters: object = {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = fields.get(key, {})
        if not isinstance(parameters, dict):
            raise fields.error(key, "an object", repr(parameters)[:80])
        if parameters:
            break
    assert isinstance(parameters, dict)
    return Fields(fields.file, parameters)


def rope_kind(rope: Fields) -> str:
    """The rope_type, by its name of today."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in KINDS:
        raise rope.error("rope_type", f"one of {', '.join(KINDS)}", repr(kind))
    return str(kind)


def read_rope(
    fields: Fields, dim: int, theta: float, max_context: int, rope: Fields | None = None
) -> Rope:
    """The rotary embedding of heads of which `dim` elements are rotated.

    Args:
        fields: config.json.
        theta: the base, where the file has none.
        max_context: the most tokens of a sequence; LongRoPE has two sets of factors and takes one
            by it.
        rope: the parameters, where a file has several; `rope_parameters(fields)` otherwise.
    """
    if rope is None:
        rope = rope_parameters(fields)
        theta = fields.typed("rope_theta", float, theta)
    theta = rope.typed("rope_theta", float, theta)
    kind = rope_kind(rope)
    if kind == "default":
        return Rope(dim, theta)
    if kind == "longrope":
        return Rope(dim, theta, _long_rope(fields, rope, dim, max_context))
    factor = rope.typed("factor", float)
    if factor <= 0:
        raise rope.error("factor", "a positive number", factor)
    return Rope(dim, theta, _scaling(kind, factor, rope, fields))


def partial_rotary_factor(fields: Fields) -> float:
    """The share of a head's elements that are rotated."""
    share = fields.typed("partial_rotary_factor", float, 1.0)
    share = rope_parameters(fields).typed("partial_rotary_factor", float, share)
    if not 0 < share <= 1:
        raise fields.error("partial_rotary_factor", "a number from 0 to 1", share)
    return share


def _scaling(kind: str, factor: float, rope: Fields, fields: Fields) -> RopeScaling:
    if kind == "linear":
        return LinearScaling(factor)
    original = _original_context(rope, fields)
    if kind == "llama3":
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=rope.typed("low_freq_factor", float),
            high_freq_factor=rope.typed("high_freq_factor", float),
            original_context=original,
        )
    scales = (rope.nullable(key, float, None) for key in ("mscale", "mscale_all_dim"))
    attention_factor = rope.typed("attention_factor", float, yarn_attention_factor(factor, *scales))
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=rope.typed("beta_fast", float, 32.0),
        beta_slow=rope.typed("beta_slow", float, 1.0),
        attention_factor=attention_factor,
        truncate=rope.typed("truncate", bool, True),
    )


def _long_rope(fields: Fields, rope: Fields, dim: int, max_context: int) -> FrequencyFactors:
    """LongRoPE (Ding et al., 2024).

    The keys of one text must all be rotated alike, so the set of factors is chosen once, by the
    longest text that there can be, and not by the length of each.
    """
    original = _original_context(rope, fields)
    factors = {}
    for key in ("short_factor", "long_factor"):
        values = rope.get(key)
        numbers = isinstance(values, list) and all(isinstance(x, int | float) for x in values)
        if not numbers or len(values) != dim // 2:
            raise rope.error(key, f"a list of {dim // 2} numbers", repr(values)[:80])
        factors[key] = tuple(float(x) for x in values)
    stretch = rope.typed(
        "factor", float, fields.positive("max_position_embeddings", original) / original
    )
    default = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return FrequencyFactors(
        factors["long_factor" if max_context > original else "short_factor"],
        rope.typed("attention_factor", float, default),
    )


def _original_context(rope: Fields, fields: Fields) -> int:
    key = "original_max_position_embeddings"
    return rope.positive(key, fields.get(key, fields.get("max_position_embeddings")))
