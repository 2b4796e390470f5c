"""Mixtures of experts: which experts a token takes, with what share, and what they add up to."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcore.models.config import Experts, ModelConfig
from kvcore.models.layers import Rows
from kvcore.models.mlp import Mlp
from kvcore.models.weights import LayerWeights


class ExpertLayer:
    """The mixtures of experts of one forward call.

    Args:
        config: the architecture, with `experts`.
        rows: of the call.
    """

    def __init__(self, config: ModelConfig, rows: Rows) -> None:
        assert config.experts is not None
        self._experts = config.experts
        self._activation = config.activation
        self._rows = rows
        self._logits = rows.empty(config.experts.count)
        shared = config.experts.shared_size
        self._shared = Mlp(shared, config.activation, rows) if shared else None

    def apply(self, layer: LayerWeights, normed: Any, out: Any) -> None:
        """Writes the weighted sum of the experts of `normed` [R, hidden] to `out`, another array.

        A row's experts are added in the order of their numbers, whatever rows stand beside it.
        """
        device = self._rows.device
        self._rows.linear(normed, layer.router, layer.router_bias, self._logits)
        chosen, shares = route(device.xp, self._experts, self._logits, layer.choice_bias)
        if self._shared is None:
            out[...] = 0
        else:
            weights = (layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias)
            self._shared.apply(normed, *weights, out)
        # One wait for the device a layer, however many experts there are.
        on_host = device.get(chosen)
        for expert in np.unique(on_host).tolist():
            rows, ranks = map(device.put, np.nonzero(on_host == expert))
            share = shares[rows, ranks][:, None]
            out[rows] += self._apply_one(layer, expert, normed[rows]) * share

    def _apply_one(self, layer: LayerWeights, expert: int, x: Any) -> Any:
        """One expert over some rows x."""
        rows = Rows(self._rows.device, len(x))
        mlp = Mlp(self._experts.intermediate_size, self._activation, rows)
        biases = layer.expert_gate_up_bias, layer.expert_down_bias
        up_bias, down_bias = (None if bias is None else bias[expert] for bias in biases)
        out = rows.empty(x.shape[1])
        gate_up, down = layer.expert_gate_up[expert], layer.expert_down[expert]
        mlp.apply(x, gate_up, up_bias, down, down_bias, out)
        return out


def route(xp: Any, experts: Experts, logits: Any, choice_bias: Any) -> tuple[Any, Any]:
    """The experts that each token takes, and their shares.

    Args:
        logits: [R, E], of the router.
        choice_bias: [E], added to the scores for the choice alone, or None.

    Returns:
        int and float32 arrays [R, per_token].
    """
    if experts.scoring == "softmax_of_chosen":
        chosen = _largest(xp, logits, experts.per_token)
        return chosen, _softmax(xp, xp.take_along_axis(logits, chosen, axis=-1))
    scores = (_sigmoid if experts.scoring == "sigmoid" else _softmax)(xp, logits)
    worth = scores if choice_bias is None else scores + choice_bias
    if experts.groups > experts.groups_per_token:
        worth = xp.where(_in_best_groups(xp, experts, worth), worth, -xp.inf)
    chosen = _largest(xp, worth, experts.per_token)
    shares = xp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalized:
        shares = shares / (shares.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, (shares * experts.scale).astype(xp.float32)


def _in_best_groups(xp: Any, experts: Experts, worth: Any) -> Any:
    """Which experts a token may choose, by their groups: bool [R, E]."""
    grouped = worth.reshape(len(worth), experts.groups, -1)
    if experts.group_score == "max":
        group_worth = grouped.max(axis=-1)
    else:
        group_worth = xp.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    best = _largest(xp, group_worth, experts.groups_per_token)
    allowed = xp.zeros((len(worth), experts.groups), bool)
    xp.put_along_axis(allowed, best, True, axis=-1)
    return xp.repeat(allowed, grouped.shape[-1], axis=-1)


def _largest(xp: Any, values: Any, count: int) -> Any:
    """The places of the `count` largest values of each row, the largest first."""
    return xp.argsort(-values, axis=-1, kind="stable")[..., :count]


def _sigmoid(xp: Any, x: Any) -> Any:
    with np.errstate(over="ignore"):
        return 1 / (1 + xp.exp(-x))


def _softmax(xp: Any, x: Any) -> Any:
    weights = xp.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
