"""Models from a GGUF file, read through the `gguf` package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kvcore.errors import ModelFileError
from kvcore.models.config import ModelConfig
from kvcore.models.files import Fields, require
from kvcore.models.gguf_config import ARCHITECTURES, read_config
from kvcore.models.tensors import FloatArray, Tensor, Tensors, layer_norm, rms_norm


@cache
def _reader_class() -> Any:
    gguf = require("gguf")

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """A GGUFReader that refuses to read beyond the end of its file.

        The base class slices a memory map, and a slice beyond the end is silently short: a
        truncated file would read as empty values, and a corrupt count as an endless loop.
        np.frombuffer checks, and is several times as fast.
        """

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            order = self.byte_order if override_order is None else override_order
            kind = np.dtype(dtype).newbyteorder(order)
            return np.frombuffer(self.data, kind, int(count), int(offset))

    return Reader


class GGUFFile:
    """An open GGUF file: its metadata and tensors.

    Args:
        path: the file.

    Raises:
        ModelFileError: if it is missing, truncated or no GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.errstate(over="ignore"):
                self._reader = _reader_class()(path)
        except OSError as error:
            raise ModelFileError(f"{path}: a readable file expected: {error}") from error
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise ModelFileError(f"{path}: a GGUF file expected: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.metadata = _Metadata(path, self._reader.fields)
        fields = Fields(path, self.metadata)
        self.architecture = fields.typed("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            expected = f"one of {', '.join(ARCHITECTURES)}"
            raise fields.error("general.architecture", expected, repr(self.architecture))

    def config(self, max_context: int | None = None) -> ModelConfig:
        """The architecture that the metadata and the tensors declare.

        Args:
            max_context: fewer tokens than the model's own maximum.

        Raises:
            ModelFileError: for a missing or mistyped key or a feature that the decoder does not
                have; the message names the key.
        """
        return read_config(Fields(self.path, self.metadata), self.vectors, self.shapes, max_context)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, rows first."""
        return {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def vectors(self, name: str) -> tuple[float, ...]:
        """The values of a tensor of one axis."""
        return tuple(float(x) for x in self._tensors[name].data)

    def read(self, tensor: Tensor, out: FloatArray) -> None:
        """Fills `out` with a tensor, dequantised."""
        gguf = require("gguf")
        if tensor.name not in self._tensors:
            raise ModelFileError(f"{self.path}: tensor {tensor.name}: expected, but it is missing")
        found = self._tensors[tensor.name]
        shape = self.shapes[tensor.name]
        if shape != tensor.shape:
            raise ModelFileError(
                f"{self.path}: tensor {tensor.name}: shape {tensor.shape} expected, got {shape}"
            )
        try:
            values = gguf.quants.dequantize(found.data, found.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ModelFileError(
                f"{self.path}: tensor {tensor.name}: a type that the gguf package decodes "
                f"expected, got {found.tensor_type.name}"
            ) from error
        out[...] = tensor.pick(values)

    def outer(self, config: ModelConfig) -> Tensors:
        """See `Checkpoint`."""
        shape = (config.vocab_size, config.hidden_size)
        tensors = {
            "embedding": [Tensor("token_embd.weight", shape)],
            "norm": _norm(config, "output_norm"),
        }
        if not config.tied_head:
            tensors["head"] = [Tensor("output.weight", shape)]
        if config.learned_positions is not None:
            positions = (config.learned_positions, config.hidden_size)
            tensors["positions"] = [Tensor("position_embd.weight", positions)]
        return tensors

    def layer(self, config: ModelConfig, index: int) -> Tensors:
        """See `Checkpoint`."""
        at = f"blk.{index}."
        hidden, size = config.hidden_size, config.intermediate_size
        norms = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
        if config.post_norms:
            norms |= {
                "attention_post_norm": "post_attention_norm",
                "mlp_post_norm": "post_ffw_norm",
            }
        tensors = {field: _norm(config, at + name) for field, name in norms.items()}
        tensors["qkv"] = self._qkv(config, at, ".weight", hidden)
        tensors["output"] = [Tensor(at + "attn_output.weight", (hidden, config.q_size))]
        gate_up = {"ffn_gate": size, "ffn_up": size}
        if at + "ffn_gate.weight" not in self.shapes and config.family in ("phi3", "gpt2"):
            gate_up = {"ffn_up": 2 * size if config.gated else size}
        tensors["gate_up"] = [
            Tensor(f"{at}{name}.weight", (rows, hidden)) for name, rows in gate_up.items()
        ]
        tensors["down"] = [Tensor(at + "ffn_down.weight", (hidden, size))]
        if config.qkv_bias:
            tensors["qkv_bias"] = self._qkv(config, at, ".bias")
        if config.output_bias:
            tensors["output_bias"] = [Tensor(at + "attn_output.bias", (hidden,))]
        if config.mlp_bias:
            tensors["gate_up_bias"] = [
                Tensor(f"{at}{name}.bias", (rows,)) for name, rows in gate_up.items()
            ]
            tensors["down_bias"] = [Tensor(at + "ffn_down.bias", (hidden,))]
        if config.qk_norm:
            tensors["q_norm"] = [rms_norm(at + "attn_q_norm.weight", config.head_dim)]
            tensors["k_norm"] = [rms_norm(at + "attn_k_norm.weight", config.head_dim)]
        return tensors

    def _qkv(self, config: ModelConfig, at: str, suffix: str, *columns: int) -> list[Tensor]:
        """Queries, keys and values, together or one by one."""
        q_size, kv_size = config.q_size, config.kv_size
        if at + "attn_qkv" + suffix in self.shapes:
            return [Tensor(at + "attn_qkv" + suffix, (q_size + 2 * kv_size, *columns))]

        def split_halves(values: FloatArray) -> FloatArray:
            """Undoes llama.cpp's order of rows, where those that turn together are neighbours."""
            by_pair = values.reshape(-1, config.head_dim // 2, 2, *columns)
            return np.reshape(by_pair.swapaxes(1, 2), values.shape)

        rows = {"attn_q": q_size, "attn_k": kv_size, "attn_v": kv_size}
        return [
            Tensor(at + name + suffix, (count, *columns), split_halves)
            if config.family == "llama" and name != "attn_v"
            else Tensor(at + name + suffix, (count, *columns))
            for name, count in rows.items()
        ]


def _norm(config: ModelConfig, name: str) -> list[Tensor]:
    if config.norm == "layer":
        return layer_norm(name, config.hidden_size)
    return [rms_norm(name + ".weight", config.hidden_size)]


class _Metadata(Mapping[str, Any]):
    """The metadata of a reader as plain Python values, decoded when asked for."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self._path = path
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        field = self._fields[key]
        try:
            return field.contents()
        except (ValueError, IndexError) as error:
            raise ModelFileError(f"{self._path}: {key}: a value expected: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)
