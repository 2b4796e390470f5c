"""PyTorch's flex_attention, compiled.

It has no call for sequences of different lengths: these are padded to one, and a block mask leaves
the padding unread.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kvcore
from bench.cases import Case
from bench.machine import out_dir
from bench.measure import Task
from bench.peers import Peer, PeerAbsent, Workload
from bench.peers.torch_caches import DTYPES, AttendTask, caches, padded_caches

# What was compiled for one instruction set gives wrong answers under another, and the compiler's
# own cache does not tell them apart.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(out_dir() / f"torch-compiled-{kvcore.get_isa()}")
)


def prepare(workload: Workload) -> dict[str, Task]:
    """The task "torch-flex"."""
    if workload.case.kind == "append" or workload.kv_format not in DTYPES:
        return {}
    _need_compiler()
    return {"torch-flex": FlexTask(workload)}


PEER = Peer(prepare)


class FlexTask(AttendTask):
    def __init__(self, workload: Workload) -> None:
        case = workload.case
        ragged = len(set(case.seq_lens)) > 1
        on = padded_caches(workload) if ragged else caches(workload)
        super().__init__(workload, on, fold=False)
        self._options: dict[str, Any] = {
            "scale": case.scale,
            "enable_gqa": case.num_heads > case.num_kv_heads,
            "block_mask": _block_mask(case) if ragged or case.kind == "prefill" else None,
        }
        torch._dynamo.reset()
        self._compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(self, query: Any, k: Any, v: Any) -> Any:
        return self._compiled(query, k, v, **self._options)


def _block_mask(case: Case) -> Any:
    stored = torch.tensor(case.stored)

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key <= query + stored[batch]

    count, num_new, longest = len(case.new), case.new[0], max(case.seq_lens)
    return create_block_mask(visible, count, None, num_new, longest, device="cpu")


@cache
def _need_compiler() -> None:
    """Raises PeerAbsent where torch.compile finds no C++ compiler or no Python headers."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8))
    except Exception as error:  # whatever is missing, each part of torch.compile has its own
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeerAbsent(f"torch.compile does not work here: {line[:200]}") from None
