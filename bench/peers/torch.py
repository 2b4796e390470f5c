"""PyTorch's scaled_dot_product_attention over contiguous caches, without padding.

Sequences of one length make one batch; others take one call each, which reads nothing in vain.
"torch" passes the query heads of a group as rows of one query, where that is possible (decode);
"torch-gqa" leaves the groups to `enable_gqa`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bench.measure import Cursor, Task
from bench.peers import PeerAbsent, Workload

VERSION = "2.13.0"

# Large pages, as kvcore's storage has; read when torch first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
try:
    import torch
    from torch.nn.functional import scaled_dot_product_attention
except ImportError:
    raise PeerAbsent(f"torch is not installed: pip install torch=={VERSION}") from None
if torch.__version__.partition("+")[0] != VERSION:
    raise PeerAbsent(f"torch {VERSION} is compared with, but {torch.__version__} is installed")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def prepare(workload: Workload) -> dict[str, Task]:
    """The tasks "torch" and "torch-gqa", over the same caches."""
    torch.set_num_threads(workload.num_threads)
    torch.set_grad_enabled(False)
    case, layers = workload.case, _caches(workload)
    cursor = Cursor(workload.num_layers)
    if case.kind == "append":
        return {"torch": AppendTask(workload, layers, cursor)}
    grouped = case.num_heads > case.num_kv_heads
    if not grouped or case.kind == "prefill":
        return {"torch": AttendTask(workload, layers, cursor, fold=False)}
    return {
        "torch": AttendTask(workload, layers, cursor, fold=True),
        "torch-gqa": AttendTask(workload, layers, cursor, fold=False),
    }


def _caches(workload: Workload) -> list[list[tuple[Any, Any]]]:
    """For each layer, (K, V) of each batch of sequences: [S, H, seq_len, D]."""
    dtype, data = DTYPES[workload.kv_format], workload.data
    if len(set(workload.case.seq_lens)) == 1:
        pairs = [(np.stack(data.k), np.stack(data.v))]
    else:
        pairs = [(k[None], v[None]) for k, v in zip(data.k, data.v, strict=True)]
    tensors = [tuple(_heads_first(rows, dtype) for rows in pair) for pair in pairs]
    return [[(k.clone(), v.clone()) for k, v in tensors] for _ in range(workload.num_layers)]


def _heads_first(rows: np.ndarray, dtype: Any) -> Any:
    """[S, n, H, D] as a dense tensor [S, H, n, D]."""
    return torch.from_numpy(rows).transpose(1, 2).to(dtype).contiguous()


class AttendTask(Task):
    def __init__(
        self, workload: Workload, layers: list[Any], cursor: Cursor, *, fold: bool
    ) -> None:
        case = workload.case
        self._case, self._layers, self._cursor, self._layer = case, layers, cursor, 0
        self._dtype = DTYPES[workload.kv_format]
        self._queries = self._cut(workload.data.q, fold)
        self._outs: list[Any] = []
        num_new, seq_len = case.new[0], case.seq_lens[0]
        self._options: dict[str, Any] = {"scale": case.scale}
        if not fold and case.num_heads > case.num_kv_heads:
            self._options["enable_gqa"] = True
        if num_new == seq_len:
            self._options["is_causal"] = True
        elif num_new > 1:
            visible = torch.ones(num_new, seq_len, dtype=torch.bool).tril(seq_len - num_new)
            hidden = torch.zeros(num_new, seq_len, dtype=self._dtype)
            self._options["attn_mask"] = hidden.masked_fill(~visible, float("-inf"))

    def _cut(self, q: np.ndarray, fold: bool) -> list[Any]:
        """The queries of each batch: [S, Hq, n, D], folded [S, H, Hq / H, D]."""
        case, start, queries = self._case, 0, []
        for k, _ in self._layers[0]:
            count, num_new = k.shape[0], case.new[0]
            rows = q[start : start + count * num_new]
            start += count * num_new
            query = _heads_first(rows.reshape(count, num_new, *rows.shape[1:]), self._dtype)
            if fold:
                query = query.view(count, case.num_kv_heads, -1, case.head_dim)
            queries.append(query)
        return queries

    def prepare(self) -> None:
        self._layer = self._cursor.next()

    def run(self) -> None:
        self._outs = [
            scaled_dot_product_attention(q, k, v, **self._options)
            for q, (k, v) in zip(self._queries, self._layers[self._layer], strict=True)
        ]

    def output(self) -> np.ndarray:
        self.run()
        case = self._case
        parts = [
            out.float().reshape(out.shape[0], case.num_heads, -1, case.head_dim).transpose(1, 2)
            for out in self._outs
        ]
        shape = (-1, case.num_heads, case.head_dim)
        return np.concatenate([part.reshape(shape).numpy() for part in parts])


class AppendTask(Task):
    def __init__(self, workload: Workload, layers: list[Any], cursor: Cursor) -> None:
        case = workload.case
        self._layers, self._cursor, self._layer = layers, cursor, 0
        self._stored = case.stored[0]
        count = layers[0][0][0].shape[0]
        new = workload.data.new(case)
        self._new = [
            torch.from_numpy(rows.reshape(count, -1, *rows.shape[1:])).transpose(1, 2)
            for rows in new
        ]

    def prepare(self) -> None:
        self._layer = self._cursor.next()

    def run(self) -> None:
        ((k, v),) = self._layers[self._layer]
        k[:, :, self._stored :].copy_(self._new[0])
        v[:, :, self._stored :].copy_(self._new[1])
