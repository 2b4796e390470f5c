"""GGUF files written here with known tensors, whole and broken."""

from __future__ import annotations

import math
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
from kvcore.models.families import FAMILIES
from kvcore.models.weights import RandomTensors, load_weights
from tiny_families import GPT2

gguf = pytest.importorskip("gguf")

MakeConfig = Callable[..., ModelConfig]


GEMMA: dict[str, Any] = {
    "post_norms": True,
    "activation": "gelu_tanh",
    "embedding_scale": math.sqrt(24),
    "attention_scale": 0.25,
    "tied_head": True,
}


def random_weights(config: ModelConfig) -> DecoderWeights:
    return load_weights(
        config, FAMILIES[config.family], RandomTensors(np.random.default_rng(1)), threads=1
    )


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The row order of llama.cpp: element i of a head's first half, then i of its second half."""
    order = [half * head_dim // 2 + i for i in range(head_dim // 2) for half in (0, 1)]
    heads = np.arange(0, len(rows), head_dim)
    return rows[(heads[:, None] + order).ravel()]


def tensors_of(config: ModelConfig, weights: DecoderWeights) -> dict[str, np.ndarray]:
    """GGUF names and contents, with q and k in llama.cpp's order where the family has it."""
    tensors = {
        "token_embd.weight": weights.embedding,
        **norm_of(config, "output_norm", weights.norm),
    }
    if not config.tied_head:
        tensors["output.weight"] = weights.head
    if weights.positions is not None:
        tensors["position_embd.weight"] = weights.positions
    fused = config.family in ("phi3", "gpt2")
    bounds = [config.q_size, config.q_size + config.kv_size]
    for i, layer in enumerate(weights.layers):
        at = f"blk.{i}."
        for suffix, qkv in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if qkv is None:
                continue
            if fused:
                tensors[f"{at}attn_qkv.{suffix}"] = qkv
                continue
            q, k, v = np.split(qkv, bounds)
            if config.family == "llama":
                q, k = interleave(q, config.head_dim), interleave(k, config.head_dim)
            tensors |= {f"{at}attn_{n}.{suffix}": t for n, t in zip("qkv", (q, k, v), strict=True)}
        if fused:
            tensors[at + "ffn_up.weight"] = layer.gate_up
        else:
            tensors[at + "ffn_gate.weight"], tensors[at + "ffn_up.weight"] = np.split(
                layer.gate_up, 2
            )
        tensors |= norm_of(config, at + "attn_norm", layer.attention_norm)
        tensors |= norm_of(config, at + "ffn_norm", layer.mlp_norm)
        others = {
            "attn_output.weight": layer.output,
            "attn_output.bias": layer.output_bias,
            "ffn_up.bias": layer.gate_up_bias,
            "ffn_down.weight": layer.down,
            "ffn_down.bias": layer.down_bias,
            "attn_q_norm.weight": layer.q_norm,
            "attn_k_norm.weight": layer.k_norm,
            "post_attention_norm.weight": layer.attention_post_norm,
            "post_ffw_norm.weight": layer.mlp_post_norm,
        }
        tensors |= {at + name: array for name, array in others.items() if array is not None}
    return tensors


def norm_of(config: ModelConfig, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    if config.norm == "rms":
        return {f"{name}.weight": array}
    return {f"{name}.weight": array[0], f"{name}.bias": array[1]}


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    arch = arch_of(config)
    metadata: dict[str, Any] = {
        f"{arch}.block_count": config.num_layers,
        f"{arch}.context_length": config.max_context,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
    }
    window = next((w for w in config.windows if w is not None), None)
    others = {
        "attention.layer_norm_epsilon"
        if config.norm == "layer"
        else ("attention.layer_norm_rms_epsilon"): float(config.norm_eps),
        "rope.freq_base": config.rope and float(config.rope.theta),
        "rope.dimension_count": config.rope and config.rope.dim,
        "attention.sliding_window": window,
        "attn_logit_softcapping": config.score_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    return metadata | {f"{arch}.{key}": value for key, value in others.items()}


def arch_of(config: ModelConfig) -> str:
    return "gemma3" if config.family == "gemma3_text" else config.family


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
    for name in ("embedding", "norm", "head", "positions"):
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
        ("llama", {"windows": (20,)}),
        ("gemma2", GEMMA | {"windows": (20, None), "score_softcap": 50.0, "logit_softcap": 30.0}),
        ("gemma2", GEMMA | {"num_layers": 46, "attention_scale": 6**-0.5}),
        (
            "gemma3_text",
            GEMMA
            | {
                "windows": (*(20,) * 5, None),
                "num_layers": 7,
                "qk_norm": True,
                "rope": Rope(16, 1e6),
                "local_rope": Rope(16, 1e4),
            },
        ),
        ("phi3", {"rope": Rope(12, 10000.0)}),
        ("gpt2", GPT2),
    ],
)
def test_families(
    tmp_path: Path, tiny_config: MakeConfig, family: str, features: dict[str, Any]
) -> None:
    config = tiny_config(family=family, norm_eps=float(np.float32(1e-5)), **features)
    weights = random_weights(config)
    contents = tensors_of(config, weights)
    path = write(tmp_path / "m.gguf", arch_of(config), metadata_of(config), contents)
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


@pytest.mark.parametrize(("max_context", "divisor"), [(None, 3.0), (64, 3.0), (32, 2.0)])
def test_long_rope_is_chosen_by_the_context(
    tmp_path: Path, tiny_config: MakeConfig, max_context: int | None, divisor: float
) -> None:
    config = tiny_config(family="phi3")
    scaling = {"original_context_length": 32, "attn_factor": 1.25}
    entries = metadata_of(config) | {f"phi3.rope.scaling.{k}": v for k, v in scaling.items()}
    contents = tensors_of(config, random_weights(config)) | {
        f"rope_factors_{name}.weight": np.full(8, value, np.float32)
        for name, value in (("long", 3.0), ("short", 2.0))
    }
    path = write(tmp_path / "m.gguf", "phi3", entries, contents)
    got = load(path, max_context=max_context).config
    assert got.rope == Rope(16, 10000.0, FrequencyFactors((divisor,) * 8, 1.25))
    assert got.max_context == (max_context or 128)


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
