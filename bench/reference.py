"""The answer that every peer is held to: attention in float64 over the values before any format."""

from __future__ import annotations

import numpy as np

from bench.cases import Case, Data

#: Query rows of each sequence that are computed; all of them would take longer than the bench.
ROWS = 16


class Reference:
    """The answer to evenly spaced query rows of each sequence, the first and last among them."""

    def __init__(self, case: Case, data: Data) -> None:
        self._rows: list[int] = []
        answers = []
        for s, start in enumerate(case.query_starts[:-1]):
            rows = np.unique(np.linspace(0, case.new[s] - 1, ROWS).astype(int))
            self._rows += (start + rows).tolist()
            answers.append(
                _attention(data.q[start + rows], data.k[s], data.v[s], case.stored[s] + rows, case)
            )
        self._answer = np.concatenate(answers)

    def error(self, output: np.ndarray) -> float:
        """The rms distance of [T, Hq, D] from the answer, over the answer's rms."""
        distance = output[self._rows].astype(np.float64) - self._answer
        return float(np.linalg.norm(distance) / np.linalg.norm(self._answer))


def _attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, case: Case
) -> np.ndarray:
    """q [n, Hq, D], the last key that each row sees, k and v [m, H, D] -> [n, Hq, D]."""
    group = case.num_heads // case.num_kv_heads
    hidden = np.repeat(np.arange(len(k)) > positions[:, None], group, axis=0)
    answer = np.empty(q.shape)
    for head in range(case.num_kv_heads):
        heads = slice(head * group, (head + 1) * group)
        rows = q[:, heads].reshape(-1, case.head_dim).astype(np.float64) * case.scale
        scores = rows @ k[:, head].astype(np.float64).T
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        answer[:, heads] = (weights @ v[:, head].astype(np.float64)).reshape(len(q), group, -1)
    return answer
