"""Models from a Hugging Face directory: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from kvcore.errors import InvalidArgument, ModelFileError
from kvcore.models.config import ModelConfig
from kvcore.models.families import FAMILIES
from kvcore.models.files import Fields, require
from kvcore.models.tensors import FloatArray, Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or ModelFileError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"{file}: a readable file expected: {error.strerror}") from error
    except ValueError as error:
        raise ModelFileError(f"{file}: JSON expected: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{file}: a JSON object expected, got {type(value).__name__}")
    return value


def read_config(directory: Path, max_context: int | None = None) -> ModelConfig:
    """The architecture that config.json declares.

    Args:
        max_context: fewer tokens than the model's own maximum.

    Raises:
        ModelFileError: for a missing or mistyped key, an unknown model_type, or a feature that the
            decoder does not have; the message names the key.
    """
    fields = Fields(directory / CONFIG, read_json(directory / CONFIG))
    model_type = fields.typed("model_type", str)
    if model_type not in FAMILIES:
        raise fields.error("model_type", f"one of {', '.join(FAMILIES)}", repr(model_type))
    try:
        return ModelConfig(
            **FAMILIES[model_type].config(fields, max_context),
            bos_id=next(iter(_ids(fields, "bos_token_id")), None),
            eos_ids=_read_eos_ids(directory, fields),
        )
    except InvalidArgument as error:
        raise ModelFileError(f"{fields.file}: {error}") from error


def _ids(fields: Fields, key: str) -> list[int]:
    value = fields.get(key, [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in ids):
        raise fields.error(key, "a token id or a list of them", repr(value)[:80])
    return ids


def _read_eos_ids(directory: Path, fields: Fields) -> frozenset[int]:
    """The ends of text of config.json and of generation_config.json, which adds those of chats."""
    ids = set(_ids(fields, "eos_token_id"))
    file = directory / "generation_config.json"
    if file.exists():
        ids.update(_ids(Fields(file, read_json(file)), "eos_token_id"))
    return frozenset(ids)


class SafetensorsSource:
    """Tensors of model.safetensors, or of the shards that its index lists.

    A context manager: the files are open, mapped and read on demand, until it exits.
    """

    def __init__(self, directory: Path) -> None:
        self._safetensors = require("safetensors")
        self._directory = directory
        self._open_files = ExitStack()
        self._tensors: dict[str, tuple[Path, Any]] = {}
        try:
            for file in self._files():
                self._open(file)
        except BaseException:
            self._open_files.close()
            raise

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self._tensors.clear()
        self._open_files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, tensor: Tensor, out: FloatArray) -> None:
        """Fills `out` with a tensor, converted to float32."""
        name = tensor.name
        if name not in self._tensors:
            # Files of a model that was saved without its head lack the first part of names.
            name = name.partition(".")[2]
        if name not in self._tensors:
            raise ModelFileError(
                f"{self._directory}: tensor {tensor.name}: expected, but no file has it"
            )
        file, handle = self._tensors[name]
        part = handle.get_slice(name)
        dtype, shape = part.get_dtype(), tuple(part.get_shape())
        if dtype not in ("F32", "F16", "BF16"):
            raise ModelFileError(f"{file}: tensor {name}: F32, F16 or BF16 expected, got {dtype}")
        if shape != tensor.shape:
            raise ModelFileError(
                f"{file}: tensor {name}: shape {tensor.shape} expected, got {shape}"
            )
        if dtype == "BF16":
            require("ml_dtypes")  # NumPy has no bfloat16 of its own
        values = handle.get_tensor(name)
        # What is computed of a tensor is computed in float32, but most are only copied.
        out[...] = values if tensor.is_whole else tensor.pick(values.astype(np.float32))

    def _files(self) -> list[Path]:
        index = self._directory / INDEX
        if not index.exists():
            return [self._directory / WEIGHTS]
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
            raise ModelFileError(f"{index}: weight_map: an object of file names expected")
        return [self._directory / Path(name).name for name in sorted(set(shards.values()))]

    def _open(self, file: Path) -> None:
        if not file.is_file():
            raise ModelFileError(f"{file}: a safetensors file expected, but there is none")
        try:
            handle = self._open_files.enter_context(
                self._safetensors.safe_open(file, framework="np")
            )
            names = handle.keys()
        except (self._safetensors.SafetensorError, OSError) as error:
            raise ModelFileError(f"{file}: a safetensors file expected: {error}") from error
        self._tensors.update((name, (file, handle)) for name in names)
