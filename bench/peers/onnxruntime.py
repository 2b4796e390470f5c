"""onnxruntime's com.microsoft.GroupQueryAttention, whose past and present share one buffer.

The operator also appends the step's own K and V. Sequences of different lengths lie in a buffer of
the longest; the operator reads as much of each as is valid. Its quantized caches have one symmetric
scale for each head and channel, fixed beforehand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from bench.cases import Case
from bench.formats import quantized_bits
from bench.measure import Cursor, Task
from bench.peers import Peer, PeerAbsent, Workload


class Types(NamedTuple):
    """Attributes:
    rows: of q, k, v and the output.
    cache: of what the cache stores.
    bits: of an element of a quantized cache, else None.
    """

    rows: type
    cache: type
    bits: int | None = None


FLOATS = {"fp32": Types(np.float32, np.float32), "fp16": Types(np.float16, np.float16)}
QUANTIZED = {8: Types(np.float32, np.int8, 8), 4: Types(np.float32, np.uint8, 4)}
SCALES = ("k_scale", "v_scale")


def prepare(workload: Workload) -> dict[str, Task]:
    """The task "onnxruntime". It has no bfloat16 on a CPU.

    Quantized formats stand for how many bits they have.
    """
    types = _types(workload.kv_format)
    if workload.case.kind == "append" or types is None:
        return {}
    return {"onnxruntime": AttendTask(workload, types)}


PEER = Peer(prepare)


def _types(kv_format: str) -> Types | None:
    bits = quantized_bits(kv_format)
    return QUANTIZED.get(bits) if bits else FLOATS.get(kv_format)


class AttendTask(Task):
    def __init__(self, workload: Workload, types: Types) -> None:
        case, dtype = workload.case, types.rows
        self._shape = (case.num_tokens, case.num_heads, case.head_dim)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = workload.num_threads
        self._session = _session(_model(case, types), options)
        tokens = (len(case.new), case.new[0], -1)
        new_k, new_v = workload.data.new(case)
        self._inputs = {
            "query": workload.data.q.reshape(tokens).astype(dtype),
            "key": new_k.reshape(tokens).astype(dtype),
            "value": new_v.reshape(tokens).astype(dtype),
            "last_position": np.array(case.seq_lens, np.int32) - 1,
            "longest": np.array([max(case.seq_lens)], np.int32),
        }
        k, v = (_padded(rows, case) for rows in (workload.data.k, workload.data.v))
        if types.bits:
            for name, rows in zip(SCALES, (k, v), strict=True):
                self._inputs[name] = _channel_scales(rows, types.bits)
            k = _quantized(k, self._inputs["k_scale"], types.bits)
            v = _quantized(v, self._inputs["v_scale"], types.bits)
        k, v = k.astype(types.cache, copy=False), v.astype(types.cache, copy=False)
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


def _session(model: bytes, options: Any) -> Any:
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        reason = str(error).strip().splitlines()[0]
        raise PeerAbsent(f"its operator does not take this: {reason[:200]}") from None


def _channel_scales(rows: np.ndarray, bits: int) -> np.ndarray:
    """For [S, H, m, D] one scale for each head and channel, [H * D]."""
    largest_level = (1 << (bits - 1)) - 1
    scales: np.ndarray = np.abs(rows).max(axis=(0, 2)).reshape(-1) / largest_level
    return scales


def _quantized(rows: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """[S, H, m, D] in 8 bits; or in 4, [S, H, m, D / 2], level + 8, the even element low."""
    levels = np.rint(rows / scales.reshape(1, rows.shape[1], 1, -1)).astype(np.int8)
    if bits == 8:
        return levels
    codes = (levels + 8).astype(np.uint8)
    packed: np.ndarray = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def _padded(sequences: list[np.ndarray], case: Case) -> np.ndarray:
    """[S, H, longest, D], zeros after the end of each sequence."""
    shape = (len(sequences), case.num_kv_heads, max(case.seq_lens), case.head_dim)
    padded = np.zeros(shape, np.float32)
    for s, rows in enumerate(sequences):
        padded[s, :, : len(rows)] = rows.transpose(1, 0, 2)
    return padded


def _model(case: Case, types: Types) -> bytes:
    """A graph of the one operator."""
    element, stored = (
        helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in (types.rows, types.cache)
    )

    def value(name: str, shape: list[Any], kind: int = element) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    stored_dim = case.head_dim // 2 if types.bits == 4 else case.head_dim
    rows, cache_shape = ["S", "n"], ["S", case.num_kv_heads, "m", stored_dim]
    kv_width, width = case.num_kv_heads * case.head_dim, case.num_heads * case.head_dim
    inputs = [
        value("query", [*rows, width]),
        value("key", [*rows, kv_width]),
        value("value", [*rows, kv_width]),
        value("past_key", cache_shape, stored),
        value("past_value", cache_shape, stored),
        value("last_position", ["S"], TensorProto.INT32),
        value("longest", [1], TensorProto.INT32),
    ]
    outputs = [
        value("present_key", cache_shape, stored),
        value("present_value", cache_shape, stored),
        value("output", [*rows, width]),
    ]
    names, options = [i.name for i in inputs], {}
    if types.bits:
        names += ["", "", "", "", "", *SCALES]  # between them: inputs that are not used
        inputs += [value(name, [kv_width], TensorProto.FLOAT) for name in SCALES]
        options = {f"{side}_quant_type": "PER_CHANNEL" for side in "kv"}
        options["kv_cache_bit_width"] = types.bits
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=case.num_heads,
        kv_num_heads=case.num_kv_heads,
        scale=case.scale,
        **options,
    )
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, outputs),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
    )
    serialized: bytes = model.SerializeToString()
    return serialized
