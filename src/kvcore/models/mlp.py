"""The multi-layer perceptron of a decoder layer."""

from __future__ import annotations

from typing import Any

from kvcore.models.config import Activation
from kvcore.models.layers import Rows, activate, gated


class Mlp:
    """The MLPs of one forward call, all of one size.

    Args:
        size: its inner width F.
        activation: of the gate, or of the only input.
        rows: of the call.
        is_gated: down(activation(gate(x)) * up(x)), or else down(activation(up(x))).
    """

    def __init__(
        self, size: int, activation: Activation, rows: Rows, *, is_gated: bool = True
    ) -> None:
        self._activation = activation
        self._rows = rows
        self._is_gated = is_gated
        self._inner = rows.empty(2 * size if is_gated else size)
        self._gate, self._up = self._inner[:, :size], self._inner[:, size:]
        self._hidden = rows.empty(size)

    def apply(
        self, normed: Any, gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any, out: Any
    ) -> None:
        """Writes the MLP of `normed` [R, hidden] to `out`, which may be the same array.

        Args:
            gate_up: [2 F, hidden], the gate's rows first; [F, hidden] without a gate.
            down: [hidden, F].
            gate_up_bias, down_bias: [2 F] or [F], and [hidden]; or None.
        """
        xp = self._rows.xp

        def act(rows: slice) -> None:
            if self._is_gated:
                gated(xp, self._activation, self._gate[rows], self._up[rows], self._hidden[rows])
            else:
                activate(xp, self._activation, self._gate[rows], self._hidden[rows])

        self._rows.linear(normed, gate_up, gate_up_bias, self._inner)
        self._rows.each(act)
        self._rows.linear(self._hidden, down, down_bias, out)
