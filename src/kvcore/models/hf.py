"""Models from a Hugging Face directory: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.errors import InvalidArgument, ModelFileError
from kvcore.models.config import ModelConfig
from kvcore.models.files import Fields, require
from kvcore.models.rope import (
    LinearScaling,
    Llama3Scaling,
    Rope,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Defaults:
    """What a config.json of a family leaves out means."""

    max_context: int
    tied_head: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    head_dim: int | None = None
    qk_norm: bool = False
    always_qkv_bias: bool = False


FAMILIES: Mapping[str, _Defaults] = {
    "llama": _Defaults(max_context=2048),
    "mistral": _Defaults(max_context=4096 * 32),
    "qwen2": _Defaults(max_context=32768, always_qkv_bias=True),
    "qwen3": _Defaults(max_context=32768, head_dim=128, qk_norm=True),
}

# Keys of config.json that change the arithmetic in ways that the decoder does not have, and the
# values that leave it alone.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "quantization_config": (),
}


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


def read_config(directory: Path) -> ModelConfig:
    """The architecture that config.json declares.

    Raises:
        ModelFileError: for a missing or mistyped key, an unknown model_type, or a feature that the
            decoder does not have; the message names the key.
    """
    fields = Fields(directory / CONFIG, read_json(directory / CONFIG))
    family = fields.typed("model_type", str)
    if family not in FAMILIES:
        raise fields.error("model_type", f"one of {', '.join(FAMILIES)}", repr(family))
    _refuse_unsupported(fields, family)
    defaults = FAMILIES[family]
    hidden, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    head_dim = fields.positive("head_dim", defaults.head_dim or max(hidden // heads, 1))
    attention_bias = fields.typed("attention_bias", bool, False)
    try:
        return ModelConfig(
            family=family,
            num_layers=fields.positive("num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=fields.positive("num_key_value_heads", heads),
            head_dim=head_dim,
            intermediate_size=fields.positive("intermediate_size"),
            vocab_size=fields.positive("vocab_size"),
            max_context=fields.positive("max_position_embeddings", defaults.max_context),
            norm_eps=fields.typed("rms_norm_eps", float, defaults.norm_eps),
            rope=_read_rope(fields, head_dim, defaults),
            qkv_bias=attention_bias or defaults.always_qkv_bias,
            output_bias=attention_bias and not defaults.always_qkv_bias,
            mlp_bias=fields.typed("mlp_bias", bool, False),
            qk_norm=defaults.qk_norm,
            tied_head=fields.typed("tie_word_embeddings", bool, defaults.tied_head),
            bos_id=next(iter(_ids(fields, "bos_token_id")), None),
            eos_ids=_read_eos_ids(directory, fields),
        )
    except InvalidArgument as error:
        raise ModelFileError(f"{fields.file}: {error}") from error


def _refuse_unsupported(fields: Fields, family: str) -> None:
    for key, neutral in _NEUTRAL.items():
        value = fields.get(key)
        if value is not None and value not in neutral:
            raise fields.error(key, "a model without this feature", repr(value)[:80])
    activation = fields.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.error("hidden_act", "silu", repr(activation))
    for layer_type in fields.get("layer_types", ()):
        if layer_type != "full_attention":
            raise fields.error("layer_types", "full_attention in every layer", repr(layer_type))
    # Qwen's configs carry a sliding_window that only counts when use_sliding_window says so.
    windowed = fields.get("use_sliding_window", family == "mistral")
    if windowed and fields.get("sliding_window") is not None:
        raise fields.error("sliding_window", "null", fields.get("sliding_window"))


def _read_rope(fields: Fields, head_dim: int, defaults: _Defaults) -> Rope:
    """Reads rope_parameters, or rope_theta and rope_scaling as they were called before."""
    for key in ("rope_parameters", "rope_scaling"):
        parameters = fields.get(key, {})
        if not isinstance(parameters, dict):
            raise fields.error(key, "an object", repr(parameters)[:80])
        if parameters:
            break
    rope = Fields(fields.file, parameters)
    theta = fields.typed("rope_theta", float, defaults.rope_theta)
    theta = rope.typed("rope_theta", float, theta)
    partial = rope.typed("partial_rotary_factor", float, 1.0)
    if partial != 1:
        raise rope.error("partial_rotary_factor", "1", partial)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(head_dim, theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise rope.error("rope_type", "default, linear, llama3 or yarn", repr(kind))
    factor = rope.typed("factor", float)
    if factor <= 0:
        raise rope.error("factor", "a positive number", factor)
    return Rope(head_dim, theta, _read_scaling(kind, factor, rope, fields))


def _read_scaling(kind: str, factor: float, rope: Fields, fields: Fields) -> RopeScaling:
    if kind == "linear":
        return LinearScaling(factor)
    original = rope.positive(
        "original_max_position_embeddings", fields.get("max_position_embeddings")
    )
    if kind == "llama3":
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=rope.typed("low_freq_factor", float),
            high_freq_factor=rope.typed("high_freq_factor", float),
            original_context=original,
        )
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        scales = (rope.get("mscale"), rope.get("mscale_all_dim"))
        attention_factor = yarn_attention_factor(factor, *scales)
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=rope.typed("beta_fast", float, 32.0),
        beta_slow=rope.typed("beta_slow", float, 1.0),
        attention_factor=float(attention_factor),
        truncate=rope.typed("truncate", bool, True),
    )


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

    def read(self, name: str, out: npt.NDArray[np.float32]) -> None:
        """Fills `out` with a tensor, converted to float32."""
        if name not in self._tensors:
            raise ModelFileError(f"{self._directory}: tensor {name}: expected, but no file has it")
        file, handle = self._tensors[name]
        part = handle.get_slice(name)
        dtype, shape = part.get_dtype(), tuple(part.get_shape())
        if dtype not in ("F32", "F16", "BF16"):
            raise ModelFileError(f"{file}: tensor {name}: F32, F16 or BF16 expected, got {dtype}")
        if shape != out.shape:
            raise ModelFileError(f"{file}: tensor {name}: shape {out.shape} expected, got {shape}")
        if dtype == "BF16":
            require("ml_dtypes")  # NumPy has no bfloat16 of its own
        out[...] = handle.get_tensor(name)

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
