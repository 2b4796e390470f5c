"""The built-in models against what their publishers say of them."""

from __future__ import annotations

import pytest

import kvcore
from kvcore.planner import MODELS, Model, get_model

#: Parameters as the published checkpoints count them.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "gpt2": 124_439_808,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}

#: Billions of parameters that a token meets, as published, and how far that is rounded.
ACTIVE = {
    "mixtral-8x7b": (12.9, 0.2),
    "qwen3-30b-a3b": (3.3, 0.3),
    "qwen3-235b-a22b": (22, 0.6),
    "gpt-oss-20b": (3.6, 0.05),
    "gpt-oss-120b": (5.1, 0.05),
    "deepseek-v2": (21, 0.3),
    "deepseek-v3": (37, 0.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    assert get_model(name).parameters == PUBLISHED[name]


def test_deepseek_v3_is_as_large_as_published():
    assert get_model("deepseek-v3").parameters == pytest.approx(671e9, rel=1e-3)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    billions, tolerance = ACTIVE[name]
    assert get_model(name).active_parameters / 1e9 == pytest.approx(billions, abs=tolerance)


def test_a_dense_model_meets_all_but_the_embedding():
    model = get_model("llama-2-7b")
    assert model.parameters - model.active_parameters == 32000 * 4096
    tied = get_model("smollm2-135m")
    assert tied.active_parameters == tied.parameters


def test_guesses_are_marked():
    assert [name for name, model in MODELS.items() if model.assumed] == ["gpt-4-class"]
    assert "assumption" in get_model("gpt-4-class").source
    assert get_model("gpt-4-class").parameters == pytest.approx(1.8e12, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_cache(name):
    model = MODELS[name]
    spec = model.cache_spec()
    assert spec.num_layers == model.num_layers
    assert spec.bytes_per_token > 0
    assert model.source


def test_unknown_names_list_near_ones():
    with pytest.raises(kvcore.InvalidArgument, match=r"'llama3-8b' is unknown; .*llama-3-8b"):
        get_model("llama3-8b")
    with pytest.raises(kvcore.InvalidArgument, match="there are llama-2-7b"):
        get_model("zzzzzzzz")
    with pytest.raises(kvcore.InvalidType, match=r"^model: expected a name, got int"):
        get_model(7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("num_heads", 7),
        ("windows", ()),
        ("windows", (1, 2, 3)),
        ("dtype", "int8"),
    ],
)
def test_sizes_that_are_none(field, value):
    fields = {
        "name": "x", "num_layers": 2, "hidden_size": 8, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "intermediate_size": 8, "vocab_size": 8, "max_context": 8,
    }  # fmt: skip
    Model(**fields)
    with pytest.raises(kvcore.InvalidArgument, match=f"^{field}: expected"):
        Model(**{**fields, field: value})
