"""Multi-head attention with grouped keys: from normed rows to the cache, and back from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcore.models.config import ModelConfig
from kvcore.models.layers import Rows, rms_norm
from kvcore.models.rope import Rotation
from kvcore.models.weights import LayerWeights

if TYPE_CHECKING:
    from kvcore.step import Step


class Attention:
    """The attention of one forward call: what its layers write to, and the views that they need.

    Args:
        config: the architecture.
        rows: of the call.
    """

    def __init__(self, config: ModelConfig, rows: Rows) -> None:
        self._config = config
        self._rows = rows
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        # Queries and keys are neighbours before and after the rotation: one call turns both.
        self._qkv = rows.empty(config.q_size + 2 * config.kv_size)
        straight = self._qkv.reshape(rows.count, heads + 2 * kv_heads, head_dim)
        self._straight_q = straight[:, :heads]
        self._straight_k = straight[:, heads : heads + kv_heads]
        self._straight_qk = straight[:, : heads + kv_heads]
        self._v = straight[:, heads + kv_heads :]
        if config.rope is None:
            self._q, self._k = self._straight_q, self._straight_k
        else:
            self._qk = rows.empty(heads + kv_heads, head_dim)
            self._q, self._k = self._qk[:, :heads], self._qk[:, heads:]

    def project(self, layer: LayerWeights, normed: Any, rotation: Rotation | None) -> None:
        """Computes the layer's queries, keys and values of `normed` [R, hidden]."""
        config, xp, eps = self._config, self._rows.xp, self._config.norm_eps

        def turn(rows: slice) -> None:
            if config.qk_norm:
                q, k = self._straight_q[rows], self._straight_k[rows]
                rms_norm(xp, q, layer.q_norm, eps, q)
                rms_norm(xp, k, layer.k_norm, eps, k)
            if rotation is not None:
                rotation.apply(self._straight_qk, self._qk, rows)

        self._rows.linear(normed, layer.qkv, layer.qkv_bias, self._qkv)
        self._rows.each(turn)

    def append(self, step: Step, index: int) -> None:
        """Stores the keys and values."""
        step.append(index, self._k, self._v)

    def attend(self, step: Step, index: int, options: dict[str, Any]) -> Any:
        """What the queries see [R, ...], a row for each row of the call."""
        return step.attend(index, self._q, **options).reshape(len(self._q), self._config.q_size)

    @staticmethod
    def output(layer: LayerWeights, attended: Any, rows: Rows, out: Any) -> None:
        """Writes the output projection of `attended` to `out` [R, hidden], for these `rows`."""
        rows.linear(attended, layer.output, layer.output_bias, out)
