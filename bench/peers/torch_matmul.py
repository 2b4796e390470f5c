"""PyTorch's matmul: two products and a softmax, the heads of a group as rows. For a decode."""

from __future__ import annotations

from typing import Any

import torch

from bench.measure import Task
from bench.peers import Peer, Workload
from bench.peers.torch_caches import AttendTask, caches


def prepare(workload: Workload) -> dict[str, Task]:
    """The task "torch-matmul". A prefill would write and mask all of its scores."""
    return {"torch-matmul": MatmulTask(workload)} if workload.case.kind == "decode" else {}


PEER = Peer(prepare)


class MatmulTask(AttendTask):
    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, caches(workload), fold=True)
        self._queries = [query * workload.case.scale for query in self._queries]

    def attend(self, query: Any, k: Any, v: Any) -> Any:
        return torch.softmax(query @ k.transpose(2, 3), dim=-1) @ v
