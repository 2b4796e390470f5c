"""The decoder recomputed from scratch: no cache, no fusing, plain NumPy, to be compared against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcore.models.config import ModelConfig
from kvcore.models.rope import inverse_frequencies
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
    x = weights.embedding[tokens]
    inv_freq, factor = inverse_frequencies(config.rope)
    angles = np.arange(len(tokens))[:, None] * inv_freq
    cos, sin = ((f(angles) * factor).astype(np.float32) for f in (np.cos, np.sin))
    for layer in weights.layers:
        x = x + _attention(config, layer, _norm(config, x, layer.attention_norm), cos, sin)
        x = x + _mlp(config, layer, _norm(config, x, layer.mlp_norm))
    if last_only:
        x = x[-1:]
    return np.asarray(_norm(config, x, weights.norm) @ weights.head.T)


def _norm(config: ModelConfig, x: FloatArray, weight: FloatArray) -> FloatArray:
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + np.float32(config.norm_eps)) * weight)


def _linear(x: FloatArray, weight: FloatArray, bias: FloatArray | None) -> FloatArray:
    return np.asarray(x @ weight.T if bias is None else x @ weight.T + bias)


def _attention(
    config: ModelConfig, layer: LayerWeights, x: FloatArray, cos: FloatArray, sin: FloatArray
) -> FloatArray:
    n, heads = len(x), (-1, config.head_dim)
    bounds = [config.q_size, config.q_size + config.kv_size]
    projected = np.split(_linear(x, layer.qkv, layer.qkv_bias), bounds, axis=-1)
    q, k, v = (part.reshape(n, *heads).transpose(1, 0, 2) for part in projected)
    if config.qk_norm:
        q, k = _norm(config, q, layer.q_norm), _norm(config, k, layer.k_norm)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)

    # Query heads share keys in runs of num_heads / num_kv_heads: [H, ratio, n, D] and [H, n, D].
    grouped = q.reshape(config.num_kv_heads, -1, n, config.head_dim)
    scores = grouped @ k[:, None].transpose(0, 1, 3, 2) / np.float32(np.sqrt(config.head_dim))
    scores[..., np.triu(np.ones((n, n), bool), 1)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    heads_out = (scores @ v[:, None]).reshape(config.num_heads, n, config.head_dim)
    out = np.ascontiguousarray(heads_out.transpose(1, 0, 2)).reshape(n, -1)
    return _linear(out, layer.output, layer.output_bias)


def _rotate(x: FloatArray, cos: FloatArray, sin: FloatArray) -> FloatArray:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _mlp(config: ModelConfig, layer: LayerWeights, x: FloatArray) -> FloatArray:
    gate, up = np.split(_linear(x, layer.gate_up, layer.gate_up_bias), 2, axis=-1)
    with np.errstate(over="ignore"):
        hidden = gate / (1 + np.exp(-gate)) * up
    return _linear(hidden, layer.down, layer.down_bias)
