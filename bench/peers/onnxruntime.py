"""onnxruntime's com.microsoft.GroupQueryAttention, whose past and present share one buffer.

The operator also appends the step's own K and V. Sequences of different lengths lie in a buffer of
the longest; the operator reads as much of each as is valid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from bench.cases import Case
from bench.measure import Cursor, Task
from bench.peers import Peer, Workload

DTYPES = {"fp32": np.float32, "fp16": np.float16}


def prepare(workload: Workload) -> dict[str, Task]:
    """The task "onnxruntime". It has no bfloat16 on a CPU."""
    if workload.case.kind == "append" or workload.kv_format not in DTYPES:
        return {}
    return {"onnxruntime": AttendTask(workload)}


PEER = Peer(prepare)


class AttendTask(Task):
    def __init__(self, workload: Workload) -> None:
        case, dtype = workload.case, DTYPES[workload.kv_format]
        self._shape = (case.num_tokens, case.num_heads, case.head_dim)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = workload.num_threads
        self._session = onnxruntime.InferenceSession(
            _model(case, dtype), options, providers=["CPUExecutionProvider"]
        )
        tokens = (len(case.new), case.new[0], -1)
        new_k, new_v = workload.data.new(case)
        self._inputs = {
            "query": workload.data.q.reshape(tokens).astype(dtype),
            "key": new_k.reshape(tokens).astype(dtype),
            "value": new_v.reshape(tokens).astype(dtype),
            "last_position": np.array(case.seq_lens, np.int32) - 1,
            "longest": np.array([max(case.seq_lens)], np.int32),
        }
        k, v = (_padded(rows, case, dtype) for rows in (workload.data.k, workload.data.v))
        # NumPy's buffers, because they get large pages.
        self._caches = [(k.copy(), v.copy()) for _ in range(workload.num_layers)]
        self._bindings = [self._bind(k, v) for k, v in self._caches]
        self._cursor, self._layer = Cursor(workload.num_layers), 0

    def _bind(self, k: np.ndarray, v: np.ndarray) -> Any:
        binding = self._session.io_binding()
        for name, array in self._inputs.items():
            binding.bind_cpu_input(name, array)
        for name, array in (("key", k), ("value", v)):
            place = ("cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            binding.bind_input(f"past_{name}", *place)
            binding.bind_output(f"present_{name}", *place)
        binding.bind_output("output")
        return binding

    def prepare(self) -> None:
        self._layer = self._cursor.next()

    def run(self) -> None:
        self._session.run_with_iobinding(self._bindings[self._layer])

    def output(self) -> np.ndarray:
        self.run()
        out: np.ndarray = self._bindings[self._layer].get_outputs()[-1].numpy()
        return out.astype(np.float32).reshape(self._shape)


def _padded(sequences: list[np.ndarray], case: Case, dtype: type) -> np.ndarray:
    """[S, H, longest, D], zeros after the end of each sequence."""
    shape = (len(sequences), case.num_kv_heads, max(case.seq_lens), case.head_dim)
    padded = np.zeros(shape, dtype)
    for s, rows in enumerate(sequences):
        padded[s, :, : len(rows)] = rows.transpose(1, 0, 2)
    return padded


def _model(case: Case, dtype: type) -> bytes:
    """A graph of the one operator."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def value(name: str, shape: list[Any], kind: int = element) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    rows, cache_shape = ["S", "n"], ["S", case.num_kv_heads, "m", case.head_dim]
    kv_width, width = case.num_kv_heads * case.head_dim, case.num_heads * case.head_dim
    inputs = [
        value("query", [*rows, width]),
        value("key", [*rows, kv_width]),
        value("value", [*rows, kv_width]),
        value("past_key", cache_shape),
        value("past_value", cache_shape),
        value("last_position", ["S"], TensorProto.INT32),
        value("longest", [1], TensorProto.INT32),
    ]
    outputs = [
        value("present_key", cache_shape),
        value("present_value", cache_shape),
        value("output", [*rows, width]),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [i.name for i in inputs],
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=case.num_heads,
        kv_num_heads=case.num_kv_heads,
        scale=case.scale,
    )
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, outputs),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
    )
    serialized: bytes = model.SerializeToString()
    return serialized
