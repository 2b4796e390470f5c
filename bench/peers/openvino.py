"""OpenVINO's PagedAttention, the CPU operator under its continuous batching: blocks of 32 tokens.

The operator also appends the step's own K and V. Blocks lie in shuffled order, as kvcore's do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import openvino
from openvino import opset13, properties
from openvino.op import _PagedAttentionExtension as PagedAttention

from bench.cases import Case
from bench.formats import quantized_bits
from bench.measure import Cursor, Task
from bench.peers import Peer, PeerAbsent, Workload

BLOCK_SIZE = 32
PRECISIONS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
QUANTIZED = {8: "u8", 4: "u4"}  # of so many bits, keys by channel and values by token
CACHES = ("key_cache.0", "value_cache.0")


def prepare(workload: Workload) -> dict[str, Task]:
    """The task "openvino". Quantized formats stand for how many bits they have."""
    if workload.case.kind == "append" or _precision(workload) is None:
        return {}
    return {"openvino": AttendTask(workload)}


# It runs in TBB, which picks workers anew for each call.
PEER = Peer(prepare, pinned=False)


class AttendTask(Task):
    pinned = False

    def __init__(self, workload: Workload) -> None:
        self._case = workload.case
        compiled = _compile(workload)
        self._request = compiled.create_infer_request()
        table = _Table(self._case)
        self._caches = [
            tuple(_cache(compiled.input(name), table.num_blocks) for name in CACHES)
            for _ in range(workload.num_layers)
        ]
        self._cursor = Cursor(workload.num_layers)
        self._set(table.filling(workload))
        for layer in self._caches:
            self._set(dict(zip(CACHES, layer, strict=True)))
            self._request.infer()
        self._set(table.step(workload))

    def _set(self, inputs: dict[str, Any]) -> None:
        for name, value in inputs.items():
            self._request.set_tensor(name, value)

    def prepare(self) -> None:
        self._set(dict(zip(CACHES, self._caches[self._cursor.next()], strict=True)))

    def run(self) -> None:
        self._request.infer()

    def output(self) -> np.ndarray:
        self.prepare()
        self.run()
        out = np.array(self._request.get_output_tensor(0).data, np.float32)
        return out.reshape(self._case.num_tokens, self._case.num_heads, self._case.head_dim)


class _Table:
    """Which blocks belong to which sequence, and the operator's inputs that tell of it."""

    def __init__(self, case: Case) -> None:
        self._case = case
        counts = [-(-n // BLOCK_SIZE) for n in case.seq_lens]
        self.num_blocks = sum(counts)
        self._blocks = np.random.default_rng(1).permutation(self.num_blocks)
        self._begins = np.cumsum([0, *counts])

    def step(self, workload: Workload) -> dict[str, Any]:
        """The case: its new tokens on all that is stored."""
        case = self._case
        k, v = workload.data.new(case)
        return self._inputs(
            workload.data.q, k, v, case.stored, case.query_starts, self._begins, max(case.seq_lens)
        )

    def filling(self, workload: Workload) -> dict[str, Any]:
        """All tokens, every block as a sequence of its own: no attention over a long past."""
        case, cuts = self._case, [0]
        for seq_len in case.seq_lens:
            ends = [*range(BLOCK_SIZE, seq_len, BLOCK_SIZE), seq_len]
            cuts += [cuts[-1] + end for end in ends]
        k, v = np.concatenate(workload.data.k), np.concatenate(workload.data.v)
        q = np.zeros((len(k), case.num_heads * case.head_dim), np.float32)
        stored = np.zeros(self.num_blocks)
        begins = np.arange(self.num_blocks + 1)
        return self._inputs(q, k, v, stored, cuts, begins, BLOCK_SIZE)

    def _inputs(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        stored: Any,
        query_starts: Any,
        begins: Any,
        longest: int,
    ) -> dict[str, Any]:
        rows = {"query": q, "key": k, "value": v}
        books = {
            "past_lens": stored,
            "subsequence_begins": query_starts,
            "block_indices": self._blocks,
            "block_indices_begins": begins,
            "max_context_len": longest,
        }
        tensors = {name: openvino.Tensor(x.reshape(len(x), -1)) for name, x in rows.items()}
        return tensors | {
            name: openvino.Tensor(np.array(value, np.int32)) for name, value in books.items()
        }


def _cache(port: Any, num_blocks: int) -> Any:
    """A tensor for the blocks, over NumPy's memory, because it gets large pages."""
    kind, shape = port.get_element_type(), port.get_partial_shape()
    sizes = [num_blocks, *(shape[axis].get_length() for axis in range(1, len(shape)))]
    nbytes = math.prod(sizes) * kind.bitwidth // 8
    return openvino.Tensor(np.zeros(nbytes, np.uint8).view(kind.to_dtype()), sizes, kind)


def _precision(workload: Workload) -> str | None:
    """What it calls the format, or one of as many bits."""
    bits = quantized_bits(workload.kv_format)
    return QUANTIZED.get(bits) if bits else PRECISIONS.get(workload.kv_format)


def _compile(workload: Workload) -> Any:
    core = openvino.Core()
    capabilities = core.get_property("CPU", properties.device.capabilities())
    in_bf16 = workload.kv_format == "bf16"
    if in_bf16 and "BF16" not in capabilities:
        raise PeerAbsent("a bf16 cache needs a CPU with bfloat16 instructions")
    compiled = core.compile_model(
        _model(workload.case),
        "CPU",
        {
            "KV_CACHE_PRECISION": _precision(workload),
            "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32",
            "INFERENCE_NUM_THREADS": workload.num_threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        },
    )
    kind = compiled.input(CACHES[0]).get_element_type()
    if kind.get_type_name() != _precision(workload):
        raise PeerAbsent(f"it keeps the cache as {kind.get_type_name()} on this CPU")
    return compiled


def _model(case: Case) -> Any:
    """A graph of the one operator."""
    width, kv_width = case.num_heads * case.head_dim, case.num_kv_heads * case.head_dim
    any_cache = openvino.PartialShape.dynamic(4)
    parameters = [
        _parameter("query", [-1, width], np.float32),
        _parameter("key", [-1, kv_width], np.float32),
        _parameter("value", [-1, kv_width], np.float32),
        *(_parameter(name, any_cache, openvino.Type.dynamic) for name in CACHES),
        _parameter("past_lens", [-1], np.int32),
        _parameter("subsequence_begins", [-1], np.int32),
        _parameter("block_indices", [-1], np.int32),
        _parameter("block_indices_begins", [-1], np.int32),
        _parameter("max_context_len", [], np.int32),
    ]
    *most, longest = (parameter.output(0) for parameter in parameters)
    inputs = [
        *most,
        _constant(case.scale, np.float32),
        _constant(0, np.int32),  # sliding_window
        _constant([], np.float32),  # alibi_slopes
        longest,
        _constant([], np.int32),  # score_aggregation_window
        _constant([], np.int32),  # rotated_block_indices
        _constant(np.zeros((0, 0)), np.int32),  # rotation_deltas
        _constant(np.zeros((0, 0)), np.float32),  # rotation_trig_lut
        _constant([], np.float32),  # xattention_threshold
        _constant(0, np.int32),  # xattention_block_size
        _constant(0, np.int32),  # xattention_stride
        _constant([], np.float32),  # sinks
        _constant(0, np.int32),  # adaptive_rkv_start_size
        *(_constant([], np.int32) for _ in range(4)),  # adaptive_rkv_*, token_type_ids
        _constant([], np.uint8),  # qq_bias
        _constant([], np.int32),  # qq_bias_begins
    ]
    operator = PagedAttention(inputs)
    sizes = {
        "num_k_heads": case.num_kv_heads,
        "num_v_heads": case.num_kv_heads,
        "k_head_size": case.head_dim,
        "v_head_size": case.head_dim,
    }
    info = operator.get_rt_info()
    for name, size in sizes.items():
        info[name] = size
    return openvino.Model([operator.output(0)], parameters, "attention")


def _parameter(name: str, shape: Any, kind: Any) -> Any:
    parameter = opset13.parameter(openvino.PartialShape(shape), kind, name=name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _constant(value: Any, kind: Any) -> Any:
    return opset13.constant(np.array(value, kind)).output(0)
