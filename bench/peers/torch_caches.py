"""PyTorch as the peers need it: the version, and contiguous caches that they share."""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from bench.measure import Cursor, Task
from bench.peers import PeerAbsent, Workload

VERSION = "2.13.0"

# Large pages, as kvcore's storage has; read when torch first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if torch.__version__.partition("+")[0] != VERSION:
    raise PeerAbsent(f"torch {VERSION} is compared with, but {torch.__version__} is installed")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Caches(NamedTuple):
    """Attributes:
    layers: for each copy, (K, V) of each batch of sequences, [S, H, seq_len, D].
    cursor: the place in them; tasks over the same caches share it.
    """

    layers: list[list[tuple[Any, Any]]]
    cursor: Cursor


_shared: WeakKeyDictionary[Workload, Caches] = WeakKeyDictionary()


def caches(workload: Workload) -> Caches:
    """Contiguous caches without padding, the same for every caller with this workload.

    Sequences of one length make one batch; others make one each, so that nothing is read in vain.
    """
    _set_up(workload)
    if workload not in _shared:
        _shared[workload] = _build(workload)
    return _shared[workload]


def padded_caches(workload: Workload) -> Caches:
    """All sequences as one batch, with zeros after the end of each."""
    _set_up(workload)
    case, dtype = workload.case, DTYPES[workload.kv_format]
    shape = (len(case.new), max(case.seq_lens), case.num_kv_heads, case.head_dim)
    pair = []
    for sequences in (workload.data.k, workload.data.v):
        rows = np.zeros(shape, np.float32)
        for s, sequence in enumerate(sequences):
            rows[s, : len(sequence)] = sequence
        pair.append(heads_first(rows, dtype))
    layers = [[(pair[0].clone(), pair[1].clone())] for _ in range(workload.num_layers)]
    return Caches(layers, Cursor(workload.num_layers))


def _set_up(workload: Workload) -> None:
    torch.set_num_threads(workload.num_threads)
    torch.set_grad_enabled(False)


def _build(workload: Workload) -> Caches:
    dtype, data = DTYPES[workload.kv_format], workload.data
    if len(set(workload.case.seq_lens)) == 1:
        pairs = [(np.stack(data.k), np.stack(data.v))]
    else:
        pairs = [(k[None], v[None]) for k, v in zip(data.k, data.v, strict=True)]
    tensors = [tuple(heads_first(rows, dtype) for rows in pair) for pair in pairs]
    layers = [[(k.clone(), v.clone()) for k, v in tensors] for _ in range(workload.num_layers)]
    return Caches(layers, Cursor(workload.num_layers))


def heads_first(rows: np.ndarray, dtype: Any) -> Any:
    """[S, n, H, D] as a dense tensor [S, H, n, D]."""
    return torch.from_numpy(rows).transpose(1, 2).to(dtype).contiguous()


def queries(workload: Workload, layer: list[tuple[Any, Any]], *, fold: bool) -> list[Any]:
    """The queries of each batch: [S, Hq, n, D], or folded [S, H, Hq / H, D]."""
    case, start, cut = workload.case, 0, []
    for k, _ in layer:
        count, num_new = k.shape[0], case.new[0]
        rows = workload.data.q[start : start + count * num_new]
        start += count * num_new
        batch = rows.reshape(count, num_new, *rows.shape[1:])
        query = heads_first(batch, DTYPES[workload.kv_format])
        cut.append(query.view(count, case.num_kv_heads, -1, case.head_dim) if fold else query)
    return cut


class AttendTask(Task):
    """One call for each batch of sequences; `attend(query, k, v)` is the call.

    Its result is [S, Hq, n, D], or folded.
    """

    def __init__(self, workload: Workload, on: Caches, *, fold: bool) -> None:
        self._case = workload.case
        self._layers, self._cursor = on
        self._layer = 0
        self._queries = queries(workload, self._layers[0], fold=fold)
        self._outs: list[Any] = []

    def attend(self, query: Any, k: Any, v: Any) -> Any:
        raise NotImplementedError

    def prepare(self) -> None:
        self._layer = self._cursor.next()

    def run(self) -> None:
        pairs = zip(self._queries, self._layers[self._layer], strict=True)
        self._outs = [self.attend(query, k, v) for query, (k, v) in pairs]

    def output(self) -> np.ndarray:
        self.run()
        case = self._case
        parts = [
            out.float().reshape(out.shape[0], case.num_heads, -1, case.head_dim).transpose(1, 2)
            for out in self._outs
        ]
        shape = (-1, case.num_heads, case.head_dim)
        return np.concatenate([part.reshape(shape).numpy() for part in parts])
