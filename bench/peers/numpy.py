"""NumPy over one contiguous cache per sequence: matrix products, a softmax, matrix products."""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from bench.cases import Case
from bench.formats import FLOATS
from bench.measure import Cursor, Task
from bench.peers import Peer, Workload
from kvcore import arrays

Pair = tuple[np.ndarray, np.ndarray]


def prepare(workload: Workload) -> dict[str, Task]:
    """The task "numpy". K and V are kept in a format of floats and converted when used."""
    if workload.kv_format not in FLOATS:
        return {}
    threadpool_limits(workload.num_threads, user_api="blas")
    kind = AppendTask if workload.case.kind == "append" else AttendTask
    return {"numpy": kind(workload)}


PEER = Peer(prepare)


def _caches(workload: Workload) -> list[list[Pair]]:
    """For each layer and sequence, K and V as [H, seq_len, D]."""
    dtype = _dtype(workload.kv_format)
    pairs = [
        tuple(np.ascontiguousarray(rows.transpose(1, 0, 2)).astype(dtype) for rows in pair)
        for pair in zip(workload.data.k, workload.data.v, strict=True)
    ]
    return [[(k.copy(), v.copy()) for k, v in pairs] for _ in range(workload.num_layers)]


def _dtype(kv_format: str) -> np.dtype:
    if kv_format == "bf16":
        return arrays.bfloat16()
    return np.dtype({"fp32": np.float32, "fp16": np.float16}[kv_format])


class AttendTask(Task):
    def __init__(self, workload: Workload) -> None:
        self._case, self._q = workload.case, workload.data.q
        self._out = np.empty_like(self._q)
        self._caches = _caches(workload)
        self._cursor, self._layer = Cursor(workload.num_layers), 0

    def prepare(self) -> None:
        self._layer = self._cursor.next()

    def run(self) -> None:
        starts = self._case.query_starts
        for s, (k, v) in enumerate(self._caches[self._layer]):
            rows = slice(starts[s], starts[s + 1])
            self._out[rows] = _attend(self._q[rows], k, v, self._case)

    def output(self) -> np.ndarray:
        self.run()
        return self._out


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, case: Case) -> np.ndarray:
    """Causal attention of one sequence: q [n, Hq, D], k and v [H, seq_len, D] -> [n, Hq, D]."""
    num_new, num_heads, dim = q.shape
    heads, seq_len = k.shape[:2]
    grouped = q.reshape(num_new, heads, -1, dim).transpose(1, 2, 0, 3) * case.scale
    rows = grouped.reshape(heads, -1, dim)
    out = np.empty_like(rows)
    hidden = None
    if num_new > 1:
        hidden = ~np.tri(num_new, seq_len, seq_len - num_new, dtype=bool)
    # All heads of a decode at once; a prefill head by head, where a score matrix is large.
    at_once = heads if num_new == 1 else 1
    for first in range(0, heads, at_once):
        part = slice(first, first + at_once)
        scores = rows[part] @ k[part].astype(np.float32, copy=False).transpose(0, 2, 1)
        if hidden is not None:
            scores.reshape(-1, num_new, seq_len)[:, hidden] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        out[part] = (scores @ v[part].astype(np.float32, copy=False)) / total
    grouped_out: np.ndarray = out.reshape(heads, num_heads // heads, num_new, dim)
    return grouped_out.transpose(2, 0, 1, 3).reshape(num_new, num_heads, dim)


class AppendTask(Task):
    def __init__(self, workload: Workload) -> None:
        self._case = workload.case
        self._k, self._v = workload.data.new(self._case)
        self._caches = _caches(workload)
        self._cursor, self._layer = Cursor(workload.num_layers), 0

    def prepare(self) -> None:
        self._layer = self._cursor.next()

    def run(self) -> None:
        starts = self._case.query_starts
        for s, (k, v) in enumerate(self._caches[self._layer]):
            rows, stored = slice(starts[s], starts[s + 1]), self._case.stored[s]
            k[:, stored:] = self._k[rows].transpose(1, 0, 2)
            v[:, stored:] = self._v[rows].transpose(1, 0, 2)
