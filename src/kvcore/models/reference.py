"""The decoder recomputed from scratch: no cache, no fusing, plain NumPy, to be compared against."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvcore.models.config import Activation, ClampedSwiglu, ModelConfig
from kvcore.models.latent_attention import LATENT_NORM_EPS
from kvcore.models.moe import route
from kvcore.models.rope import Rope, inverse_frequencies
from kvcore.models.weights import DecoderWeights, LayerWeights

FloatArray = npt.NDArray[np.float32]


def forward(
    config: ModelConfig,
    weights: DecoderWeights,
    tokens: npt.NDArray[np.int64],
    *,
    last_only: bool = False,
) -> FloatArray:
    """Logits of one text, float32 [n, vocab], or [1, vocab] of its last token.

    Args:
        weights: NumPy arrays.
        tokens: ids [n], inside the vocabulary.
    """
    x = weights.embedding[tokens] * np.float32(config.embedding_scale)
    if weights.positions is not None:
        x = x + weights.positions[: len(tokens)]
    for index, layer in enumerate(weights.layers):
        attention = _attention if config.latent is None else _latent_attention
        added = attention(config, index, layer, _norm(config, x, layer.attention_norm))
        x = x + _post_norm(config, added, layer.attention_post_norm)
        normed = _norm(config, x, layer.mlp_norm)
        mlp = _mlp if config.layer_experts(index) is None else _experts
        x = x + _post_norm(config, mlp(config, layer, normed), layer.mlp_post_norm)
    if last_only:
        x = x[-1:]
    logits = _norm(config, x, weights.norm) @ weights.head.T
    if config.logit_softcap is not None:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
    return np.asarray(logits)


def _norm(config: ModelConfig, x: FloatArray, weight: FloatArray) -> FloatArray:
    if config.norm == "layer":
        centered = x - np.mean(x, axis=-1, keepdims=True)
        return np.asarray(_rms_norm(centered, weight[0], config.norm_eps) + weight[1])
    return _rms_norm(x, weight, config.norm_eps)


def _rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + np.float32(eps)) * weight)


def _post_norm(config: ModelConfig, x: FloatArray, weight: FloatArray | None) -> FloatArray:
    return x if weight is None else _norm(config, x, weight)


def _linear(x: FloatArray, weight: FloatArray, bias: FloatArray | None) -> FloatArray:
    return np.asarray(x @ weight.T if bias is None else x @ weight.T + bias)


def _attention(config: ModelConfig, index: int, layer: LayerWeights, x: FloatArray) -> FloatArray:
    n, heads = len(x), (-1, config.head_dim)
    bounds = [config.q_size, config.q_size + config.kv_size]
    projected = np.split(_linear(x, layer.qkv, layer.qkv_bias), bounds, axis=-1)
    q, k, v = (part.reshape(n, *heads).transpose(1, 0, 2) for part in projected)
    if config.qk_norm:
        q = _rms_norm(q, layer.q_norm, config.norm_eps)
        k = _rms_norm(k, layer.k_norm, config.norm_eps)
    rope = config.layer_rope(index)
    q, k = _rotate(q, rope), _rotate(k, rope)
    # Query heads share keys in runs of num_heads / num_kv_heads.
    sharers = config.num_heads // config.num_kv_heads
    k, v = np.repeat(k, sharers, axis=0), np.repeat(v, sharers, axis=0)
    out = _see(config, index, layer, q, k, v)
    return _linear(out, layer.output, layer.output_bias)


def _latent_attention(
    config: ModelConfig, index: int, layer: LayerWeights, x: FloatArray
) -> FloatArray:
    """As the paper has it, with every head's own keys and values."""
    latent, n = config.latent, len(x)
    assert latent is not None
    if latent.q_rank is not None:
        low = _linear(x, layer.q_a, layer.q_a_bias)
        q = _rms_norm(low, layer.q_a_norm, LATENT_NORM_EPS) @ layer.q_b.T
    else:
        q = x @ layer.q_b.T
    q = q.reshape(n, config.num_heads, -1).transpose(1, 0, 2)
    q_nope, q_rope = np.split(q, [latent.nope_dim], axis=-1)
    kv, k_rope = np.split(_linear(x, layer.kv_a, layer.kv_a_bias), [latent.kv_rank], axis=-1)
    kv = _rms_norm(kv, layer.kv_a_norm, LATENT_NORM_EPS)
    k_nope = kv @ layer.key_up
    v = kv @ layer.value_up.transpose(0, 2, 1)
    rope = config.layer_rope(index)
    k_rope = np.broadcast_to(_rotate(k_rope[None], rope), (*k_nope.shape[:2], latent.rope_dim))
    q = np.concatenate((q_nope, _rotate(q_rope, rope)), axis=-1)
    k = np.concatenate((k_nope, k_rope), axis=-1)
    out = _see(config, index, layer, q, k, v)
    return _linear(out, layer.output, layer.output_bias)


def _see(
    config: ModelConfig,
    index: int,
    layer: LayerWeights,
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
) -> FloatArray:
    """What queries [H, n, D] see of keys [H, n, D] and values [H, n, Dv]: [n, H Dv]."""
    heads, n, head_dim = q.shape
    scale = config.attention_scale or 1 / math.sqrt(head_dim)
    scores = q @ k.transpose(0, 2, 1) * np.float32(scale)
    if config.score_softcap is not None:
        scores = config.score_softcap * np.tanh(scores / config.score_softcap)
    distance = np.arange(n)[:, None] - np.arange(n)
    scores[:, (distance < 0) | (distance >= (config.window(index) or n))] = -np.inf
    if layer.sinks is not None:
        sinks = np.broadcast_to(layer.sinks[:, None, None], (heads, n, 1))
        scores = np.concatenate((scores, sinks), axis=-1)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    out = scores[..., :n] @ v
    return np.reshape(out.transpose(1, 0, 2), (n, -1))


def _rotate(x: FloatArray, rope: Rope | None) -> FloatArray:
    """Heads [H, n, D] of the tokens 0 to n, turned."""
    if rope is None:
        return x
    inv_freq, factor = inverse_frequencies(rope)
    angles = np.arange(x.shape[1])[:, None] * inv_freq
    cos, sin = ((f(angles) * factor).astype(np.float32) for f in (np.cos, np.sin))
    turned, rest = np.split(x, [rope.dim], axis=-1)
    first, second = np.split(turned, 2, axis=-1)
    parts = (first * cos - second * sin, second * cos + first * sin, rest)
    return np.concatenate(parts, axis=-1)


def _mlp(config: ModelConfig, layer: LayerWeights, x: FloatArray) -> FloatArray:
    inner = _linear(x, layer.gate_up, layer.gate_up_bias)
    return _linear(_activated(config, inner), layer.down, layer.down_bias)


def _activated(config: ModelConfig, inner: FloatArray) -> FloatArray:
    if not config.gated:
        return _activation(config.activation, inner)
    gate, up = np.split(inner, 2, axis=-1)
    if isinstance(config.activation, ClampedSwiglu):
        limit = config.activation.limit
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
    return _activation(config.activation, gate) * up


def _activation(activation: Activation, x: FloatArray) -> FloatArray:
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return np.asarray(x * (1 + np.tanh(inner)) / 2)
    alpha = activation.alpha if isinstance(activation, ClampedSwiglu) else 1.0
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-alpha * x)))


def _experts(config: ModelConfig, layer: LayerWeights, x: FloatArray) -> FloatArray:
    """Every expert of every token, of which most do not count."""
    experts = config.experts
    assert experts is not None
    logits = _linear(x, layer.router, layer.router_bias)
    chosen, shares = route(np, experts, logits, layer.choice_bias)
    weights = np.zeros((len(x), experts.count), np.float32)
    np.put_along_axis(weights, chosen, shares, axis=-1)
    out = _mlp(config, layer, x) if experts.shared_size else np.zeros_like(x)
    for e in range(experts.count):
        up_bias, down_bias = (
            None if bias is None else bias[e]
            for bias in (layer.expert_gate_up_bias, layer.expert_down_bias)
        )
        inner = _activated(config, _linear(x, layer.expert_gate_up[e], up_bias))
        out = out + weights[:, e, None] * _linear(inner, layer.expert_down[e], down_bias)
    return np.asarray(out)
