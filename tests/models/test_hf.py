"""Hugging Face directories written here with known tensors, whole and broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcore.errors import ModelFileError
from kvcore.models import load

safetensors = pytest.importorskip("safetensors.numpy")
ml_dtypes = pytest.importorskip("ml_dtypes")

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 30,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (30, 24),
        "model.norm.weight": (24,),
        "lm_head.weight": (30, 24),
    }
    for i in range(2):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (24,),
            f"model.layers.{i}.post_attention_layernorm.weight": (24,),
            f"model.layers.{i}.self_attn.q_proj.weight": (24, 24),
            f"model.layers.{i}.self_attn.k_proj.weight": (8, 24),
            f"model.layers.{i}.self_attn.v_proj.weight": (8, 24),
            f"model.layers.{i}.self_attn.o_proj.weight": (24, 24),
            f"model.layers.{i}.mlp.gate_proj.weight": (40, 24),
            f"model.layers.{i}.mlp.up_proj.weight": (40, 24),
            f"model.layers.{i}.mlp.down_proj.weight": (24, 40),
        }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(directory: Path, contents: dict[str, np.ndarray], config: Any = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config or CONFIG))
    safetensors.save_file(contents, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_are_fused_and_converted(tmp_path: Path, dtype: Any) -> None:
    contents = tensors(dtype)
    weights = load(write(tmp_path, contents)).decoder.weights
    at = "model.layers.1."
    qkv = [contents[at + f"self_attn.{x}_proj.weight"] for x in "qkv"]
    np.testing.assert_array_equal(weights.layers[1].qkv, np.concatenate(qkv).astype(np.float32))
    gate_up = [contents[at + f"mlp.{x}_proj.weight"] for x in ("gate", "up")]
    np.testing.assert_array_equal(
        weights.layers[1].gate_up, np.concatenate(gate_up).astype(np.float32)
    )
    np.testing.assert_array_equal(weights.head, contents["lm_head.weight"].astype(np.float32))
    assert weights.embedding.dtype == np.float32
    assert weights.nbytes == 4 * sum(tensor.size for tensor in contents.values())


def test_shards(tmp_path: Path) -> None:
    contents = tensors()
    write(tmp_path, contents)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(contents)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        safetensors.save_file({name: contents[name] for name in members}, tmp_path / file)
    index = {name: file for file, members in shards.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = load(tmp_path).decoder.weights
    np.testing.assert_array_equal(weights.norm, contents["model.norm.weight"])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"b\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "["])
def test_bad_index(tmp_path: Path, index: str) -> None:
    write(tmp_path, tensors())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelFileError, match=r"index\.json"):
        load(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    contents = tensors()
    del contents["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelFileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(write(tmp_path, contents))


def test_names_of_a_model_without_its_head(tmp_path: Path) -> None:
    contents = tensors()
    del contents["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in contents.items()}
    weights = load(write(tmp_path, bare, CONFIG | {"tie_word_embeddings": True})).decoder.weights
    np.testing.assert_array_equal(weights.embedding, contents["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        weights.layers[1].down, contents["model.layers.1.mlp.down_proj.weight"]
    )


def test_wrong_shape_and_dtype(tmp_path: Path) -> None:
    contents = tensors()
    contents["model.norm.weight"] = np.ones(23, np.float32)
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight.*\(24,\).*\(23,\)"):
        load(write(tmp_path, contents))
    contents["model.norm.weight"] = np.ones(24, np.int8)
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight.*I8"):
        load(write(tmp_path, contents))


def test_truncated(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    for cut in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(ModelFileError, match=r"model\.safetensors"):
            load(tmp_path)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_may_be_wrong(tmp_path: Path, data: st.DataObject) -> None:
    write(tmp_path, tensors())
    name = data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    end = min(len(content), 2000)  # the header of the tensors; any bits make valid weights
    content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        load(tmp_path)
    except ModelFileError as error:
        assert str(tmp_path) in str(error)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        load(tmp_path)


def test_missing_and_broken_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        _ = load(tmp_path).tokenizer
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        _ = load(tmp_path).tokenizer


def test_lying_sizes_do_not_allocate(tmp_path: Path) -> None:
    write(tmp_path, tensors(), CONFIG | {"num_hidden_layers": 10**12})
    with pytest.raises(ModelFileError, match="memory"):
        load(tmp_path)


def test_unknown_path() -> None:
    with pytest.raises(ModelFileError, match="smollm2"):
        load("no-such-model")
