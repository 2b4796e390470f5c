"""GGUF files written here with known tensors, whole and broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcore.errors import ModelFileError
from kvcore.models import (
    DecoderWeights,
    FrequencyFactors,
    LinearScaling,
    ModelConfig,
    Rope,
    YarnScaling,
    load,
)
from kvcore.models.weights import RandomTensors, load_weights

gguf = pytest.importorskip("gguf")

MakeConfig = Callable[..., ModelConfig]


def random_weights(config: ModelConfig) -> DecoderWeights:
    return load_weights(config, RandomTensors(np.random.default_rng(1)), threads=1)


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The row order of llama.cpp: element i of a head's first half, then i of its second half."""
    order = [half * head_dim // 2 + i for i in range(head_dim // 2) for half in (0, 1)]
    heads = np.arange(0, len(rows), head_dim)
    return rows[(heads[:, None] + order).ravel()]


def tensors_of(config: ModelConfig, weights: DecoderWeights) -> dict[str, np.ndarray]:
    """GGUF names and contents, with q and k in llama.cpp's order where the family has it."""
    tensors = {"token_embd.weight": weights.embedding, "output_norm.weight": weights.norm}
    if not config.tied_head:
        tensors["output.weight"] = weights.head
    bounds = [config.q_size, config.q_size + config.kv_size]
    for i, layer in enumerate(weights.layers):
        for suffix, fused in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if fused is None:
                continue
            q, k, v = np.split(fused, bounds)
            if config.family == "llama":
                q, k = interleave(q, config.head_dim), interleave(k, config.head_dim)
            tensors |= {
                f"blk.{i}.attn_{n}.{suffix}": t for n, t in zip("qkv", (q, k, v), strict=True)
            }
        gate, up = np.split(layer.gate_up, 2)
        tensors |= {
            f"blk.{i}.attn_norm.weight": layer.attention_norm,
            f"blk.{i}.attn_output.weight": layer.output,
            f"blk.{i}.ffn_norm.weight": layer.mlp_norm,
            f"blk.{i}.ffn_gate.weight": gate,
            f"blk.{i}.ffn_up.weight": up,
            f"blk.{i}.ffn_down.weight": layer.down,
        }
        if config.qk_norm:
            tensors[f"blk.{i}.attn_q_norm.weight"] = layer.q_norm
            tensors[f"blk.{i}.attn_k_norm.weight"] = layer.k_norm
    return tensors


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    arch = config.family
    return {
        f"{arch}.block_count": config.num_layers,
        f"{arch}.context_length": config.max_context,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{arch}.rope.freq_base": float(config.rope.theta),
    }


def write(
    path: Path,
    arch: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    raw_types: dict[str, Any] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if value is None:
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        raw = (raw_types or {}).get(name)
        if raw is None:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_weights(got: DecoderWeights, expected: DecoderWeights) -> None:
    for name in ("embedding", "norm", "head"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    for a, b in zip(got.layers, expected.layers, strict=True):
        for name, array in vars(b).items():
            if array is None:
                assert getattr(a, name) is None, name
            else:
                np.testing.assert_array_equal(getattr(a, name), array, err_msg=name)


@pytest.mark.parametrize(
    ("family", "features"),
    [
        ("llama", {}),
        ("llama", {"tied_head": True}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "tied_head": True}),
    ],
)
def test_families(
    tmp_path: Path, tiny_config: MakeConfig, family: str, features: dict[str, Any]
) -> None:
    config = tiny_config(family=family, norm_eps=float(np.float32(1e-5)), **features)
    weights = random_weights(config)
    path = write(tmp_path / "m.gguf", family, metadata_of(config), tensors_of(config, weights))
    model = load(path)
    assert model.config == config
    assert_same_weights(model.decoder.weights, weights)
    assert (model.decoder.weights.head is model.decoder.weights.embedding) == config.tied_head


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantized_tensors(tmp_path: Path, tiny_config: MakeConfig, quantization: str) -> None:
    raw = gguf.GGMLQuantizationType[quantization]
    config = tiny_config(hidden_size=32, intermediate_size=64)
    weights = random_weights(config)
    tensors = tensors_of(config, weights)
    types = {name: raw for name, tensor in tensors.items() if tensor.ndim == 2}
    path = write(tmp_path / "m.gguf", "llama", metadata_of(config), tensors, types)
    down = load(path).decoder.weights.layers[1].down
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights.layers[1].down, raw), raw)
    np.testing.assert_array_equal(down, expected)
    assert not np.array_equal(down, weights.layers[1].down)


@pytest.mark.parametrize(
    ("metadata", "tensors", "scaling"),
    [
        ({"type": "linear", "factor": 4.0}, {}, LinearScaling(4.0)),
        ({"type": "none"}, {}, None),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {},
            YarnScaling(4.0, 64, attention_factor=0.1 * np.log(4.0) + 1),
        ),
        (
            {},
            {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)},
            FrequencyFactors(tuple(float(i) for i in range(1, 9))),
        ),
    ],
)
def test_rope_scaling(
    tmp_path: Path,
    tiny_config: MakeConfig,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    scaling: Any,
) -> None:
    config = tiny_config()
    entries = metadata_of(config) | {f"llama.rope.scaling.{k}": v for k, v in metadata.items()}
    contents = tensors_of(config, random_weights(config)) | tensors
    got = load(write(tmp_path / "m.gguf", "llama", entries, contents)).config.rope
    assert got == Rope(16, 10000.0, scaling)


@pytest.fixture
def whole(tmp_path: Path, tiny_config: MakeConfig) -> Path:
    config = tiny_config()
    tensors = tensors_of(config, random_weights(config))
    return write(tmp_path / "whole.gguf", "llama", metadata_of(config), tensors)


def test_truncated_anywhere(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    cuts = {0, 1, 3, 4, 7, 8, 20, 24, 30, len(data) - 1, *range(40, len(data), len(data) // 60)}
    for cut in sorted(cuts):
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:cut])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            load(path)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_may_be_wrong(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    # Metadata and the list of tensors come first; any bits make valid weights behind them.
    header = content.index(b"blk.1.ffn_up.weight")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path = whole.with_name("flipped.gguf")
    path.write_bytes(content)
    try:
        load(path)
    except ModelFileError as error:
        assert "flipped.gguf" in str(error)


def test_corrupt_counts_end_quickly(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    for offset in (8, 16, 24):  # tensors, metadata entries, length of the first key
        broken = data.copy()
        broken[offset : offset + 8] = (2**62).to_bytes(8, "little")
        path = tmp_path / "corrupt.gguf"
        path.write_bytes(broken)
        with pytest.raises(ModelFileError, match=r"corrupt\.gguf"):
            load(path)


@pytest.mark.parametrize("content", [b"GGML" + bytes(100), b"x", b"PK\x03\x04" + bytes(64)])
def test_not_a_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="GGUF"):
        load(path)


@pytest.mark.parametrize(
    ("named", "arch", "metadata", "tensors"),
    [
        ("general.architecture", "mamba", {}, {}),
        ("llama.block_count", "llama", {"llama.block_count": None}, {}),
        ("llama.block_count", "llama", {"llama.block_count": "two"}, {}),
        ("blk.2.attn_norm.weight", "llama", {"llama.block_count": 3}, {}),
        ("num_heads", "llama", {"llama.attention.head_count_kv": 3}, {}),
        ("llama.attention.value_length", "llama", {"llama.attention.value_length": 8}, {}),
        ("llama.expert_count", "llama", {"llama.expert_count": 8}, {}),
        ("llama.rope.scaling.type", "llama", {"llama.rope.scaling.type": "longrope"}, {}),
        ("llama.rope.scaling.factor", "llama", {"llama.rope.scaling.type": "linear"}, {}),
        ("rope.dim", "llama", {"llama.rope.dimension_count": 8}, {}),
        ("rope", "llama", {"llama.rope.freq_base": -1.0}, {}),
        ("norm_eps", "llama", {"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}),
        ("rope_freqs.weight", "llama", {}, {"rope_freqs.weight": np.ones(3, np.float32)}),
        ("blk.1.ffn_up.weight", "llama", {}, {"blk.1.ffn_up.weight": None}),
        ("token_embd.weight", "llama", {}, {"token_embd.weight": None}),
        ("blk.0.ffn_norm.weight", "llama", {}, {"blk.0.ffn_norm.weight": np.ones(9, np.float32)}),
        ("blk.0.attn_q.weight", "llama", {}, {"blk.0.attn_q.weight": np.ones((64, 24), np.int32)}),
    ],
)
def test_bad_files_name_what_is_wrong(
    tmp_path: Path,
    tiny_config: MakeConfig,
    named: str,
    arch: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray | None],
) -> None:
    config = tiny_config()
    contents = tensors_of(config, random_weights(config)) | tensors
    present = {name: tensor for name, tensor in contents.items() if tensor is not None}
    path = write(tmp_path / "bad.gguf", arch, metadata_of(config) | metadata, present)
    with pytest.raises(ModelFileError, match=named) as raised:
        load(path)
    assert "bad.gguf" in str(raised.value)


def test_no_tokenizer(whole: Path) -> None:
    model = load(whole)
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.model"):
        _ = model.tokenizer
    assert model.eos_ids == frozenset()


def test_lying_sizes_do_not_allocate(tmp_path: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config()
    contents = tensors_of(config, random_weights(config))
    metadata = metadata_of(config) | {"llama.block_count": 2**31 - 1}
    path = write(tmp_path / "lies.gguf", "llama", metadata, contents)
    with pytest.raises(ModelFileError, match=r"lies\.gguf"):
        load(path)
