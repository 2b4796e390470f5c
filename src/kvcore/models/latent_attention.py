"""Multi-head latent attention (DeepSeek-V2, 2024) on the latent itself.

A head's key is key_up . latent and its value value_up . latent. Both products are moved to the
other side of attention: q . (key_up . latent) = (key_up^T . q) . latent, and the weighted sum of
values is value_up . (the weighted sum of latents). So all heads attend over one KV head, whose key
is the latent followed by the rotated key that all share, and whose value is the latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcore.models.config import ModelConfig
from kvcore.models.layers import Rows, rms_norm
from kvcore.models.rope import Rotation
from kvcore.models.weights import LayerWeights

if TYPE_CHECKING:
    from kvcore.step import Step

# The norms of the latents have their own constant, whatever the model's norm_eps.
LATENT_NORM_EPS = 1e-6


class AbsorbedAttention:
    """The latent attention of one forward call; see `Attention`.

    Args:
        config: the architecture, with `latent`.
        rows: of the call.
    """

    def __init__(self, config: ModelConfig, rows: Rows) -> None:
        assert config.latent is not None
        self._latent = latent = config.latent
        self._rows = rows
        row_dim = latent.kv_rank + latent.rope_dim
        self._q_latent = rows.empty(latent.q_rank or 0)
        self._straight_q = rows.empty(config.num_heads, latent.nope_dim + latent.rope_dim)
        self._straight_k = rows.empty(1, row_dim)
        self._q = rows.empty(config.num_heads, row_dim)
        self._k = rows.empty(1, row_dim)

    def project(self, layer: LayerWeights, normed: Any, rotation: Rotation | None) -> None:
        """Computes the layer's absorbed queries and latents of `normed` [R, hidden]."""
        assert rotation is not None
        xp, rank, nope = self._rows.xp, self._latent.kv_rank, self._latent.nope_dim
        linear, count = self._rows.linear, self._rows.count

        def turn(rows: slice) -> None:
            latent = self._straight_k[rows, :, :rank]
            rms_norm(xp, latent, layer.kv_a_norm, LATENT_NORM_EPS, self._k[rows, :, :rank])
            rotation.apply(self._straight_k[..., rank:], self._k[..., rank:], rows)
            rotation.apply(self._straight_q[..., nope:], self._q[..., rank:], rows)

        def norm(rows: slice) -> None:
            latent = self._q_latent[rows]
            rms_norm(xp, latent, layer.q_a_norm, LATENT_NORM_EPS, latent)

        q_input = normed
        if self._latent.q_rank is not None:
            linear(normed, layer.q_a, layer.q_a_bias, self._q_latent)
            self._rows.each(norm)
            q_input = self._q_latent
        linear(q_input, layer.q_b, None, self._straight_q.reshape(count, -1))
        linear(normed, layer.kv_a, layer.kv_a_bias, self._straight_k.reshape(count, -1))
        self._rows.each(turn)
        by_head = self._rows.linear_by_head
        by_head(self._straight_q[..., :nope], layer.key_up, self._q[..., :rank])

    def append(self, step: Step, index: int) -> None:
        """Stores the latents and shared keys."""
        step.append(index, self._k, None)

    def attend(self, step: Step, index: int, options: dict[str, Any]) -> Any:
        """The weighted sums of latents [R, Hq, kv_rank]."""
        return step.attend(index, self._q, **options)

    @staticmethod
    def output(layer: LayerWeights, attended: Any, rows: Rows, out: Any) -> None:
        """Writes the output projection of the heads' values to `out` [R, hidden]."""
        heads, value_dim, _ = layer.value_up.shape
        values = rows.empty(heads, value_dim)
        rows.linear_by_head(attended, layer.value_up, values)
        rows.linear(values.reshape(rows.count, -1), layer.output, layer.output_bias, out)
