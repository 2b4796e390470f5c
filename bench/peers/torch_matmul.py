"""PyTorch's matmul: two products and a softmax, the heads of a group as rows. For a decode."""

from __future__ import annotations

from typing import Any

import torch

from bench.measure import Task
from bench.peers import Peer, Workload
from bench.peers.torch_caches import DTYPES, AttendTask, caches


def prepare(workload: Workload) -> dict[str, Task]:
    """The task "torch-matmul". A prefill would write and mask all of its scores."""
    offered = workload.case.kind == "decode" and workload.kv_format in DTYPES
    return {"torch-matmul": MatmulTask(workload)} if offered else {}


PEER = Peer(prepare)


class MatmulTask(AttendTask):
    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, caches(workload), fold=True)
        self._queries = [query * workload.case.scale for query in self._queries]

    def attend(self, query: Any, k: Any, v: Any) -> Any:
        return torch.softmax(query @ k.transpose(2, 3), dim=-1) @ v
