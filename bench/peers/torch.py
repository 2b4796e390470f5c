"""PyTorch's scaled_dot_product_attention over contiguous caches, without padding.

"torch" passes the query heads of a group as rows of one query, where that is possible (decode);
"torch-gqa" leaves the groups to `enable_gqa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.measure import Task
from bench.peers import Peer, Workload
from bench.peers.torch_caches import DTYPES, AttendTask, caches


def prepare(workload: Workload) -> dict[str, Task]:
    """The tasks "torch" and "torch-gqa", over the same caches."""
    case = workload.case
    if workload.kv_format not in DTYPES:
        return {}
    if case.kind == "append":
        return {"torch": AppendTask(workload)}
    grouped = case.num_heads > case.num_kv_heads
    if not grouped or case.kind == "prefill":
        return {"torch": SdpaTask(workload, fold=False)}
    return {
        "torch": SdpaTask(workload, fold=True),
        "torch-gqa": SdpaTask(workload, fold=False),
    }


PEER = Peer(prepare)


class SdpaTask(AttendTask):
    def __init__(self, workload: Workload, *, fold: bool) -> None:
        super().__init__(workload, caches(workload), fold=fold)
        case = workload.case
        num_new, seq_len = case.new[0], case.seq_lens[0]
        self._options: dict[str, Any] = {"scale": case.scale}
        if not fold and case.num_heads > case.num_kv_heads:
            self._options["enable_gqa"] = True
        if num_new == seq_len:
            self._options["is_causal"] = True
        elif num_new > 1:
            visible = torch.ones(num_new, seq_len, dtype=torch.bool).tril(seq_len - num_new)
            hidden = torch.zeros(num_new, seq_len, dtype=DTYPES[workload.kv_format])
            self._options["attn_mask"] = hidden.masked_fill(~visible, float("-inf"))

    def attend(self, query: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(query, k, v, **self._options)


class AppendTask(Task):
    def __init__(self, workload: Workload) -> None:
        case = workload.case
        self._layers, self._cursor = caches(workload)
        self._layer, self._stored = 0, case.stored[0]
        count = self._layers[0][0][0].shape[0]
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
