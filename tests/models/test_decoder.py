"""The decoder over a cache against the same decoder recomputed without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvcore
from kvcore.errors import InvalidArgument
from kvcore.models import LinearScaling, Model, ModelConfig, Rope, YarnScaling
from tiny_families import FAMILIES

MakeConfig = Callable[..., ModelConfig]

# Random weights of this size give logits of about 1 to 10; fp32 rounding stays far below.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

FEATURES: list[dict[str, Any]] = [
    {},
    {"tied_head": True, "num_kv_heads": 1},
    {"num_kv_heads": 4, "rope": Rope(16, 10000.0, LinearScaling(2.0))},
    {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    {"qk_norm": True, "rope": Rope(16, 5e5, YarnScaling(4.0, 32, attention_factor=1.1))},
    {"num_layers": 1, "head_dim": 32, "rope": Rope(32, 10000.0)},
    *FAMILIES.values(),
]
NAMES = [features.get("family", "llama") for features in FEATURES]


def make_cache(model: Model, k_format: str = "fp32", v_format: str = "fp32") -> kvcore.KVCache:
    spec = model.cache_spec(block_size=16, k_format=k_format, v_format=v_format)
    return kvcore.KVCache(spec, num_blocks=64)


@pytest.mark.parametrize("features", FEATURES, ids=NAMES)
def test_ragged_chunks_and_decodes_equal_recomputation(
    tiny_config: MakeConfig, features: dict[str, Any]
) -> None:
    model = Model.random(tiny_config(**features), seed=7)
    rng = np.random.default_rng(11)
    texts = [rng.integers(0, 50, n) for n in (70, 23, 41)]
    full = [model.decoder.forward_full(text) for text in texts]
    cache = make_cache(model)
    sequences = [cache.sequence() for _ in texts]
    # Chunks above and below FEW_ROWS, and steps that mix prompts with single tokens.
    for counts in ([40, 5, 0], [1, 17, 20], [1, 0, 20], [28, 1, 1]):
        chosen = [i for i, count in enumerate(counts) if count]
        starts = [len(sequences[i]) for i in chosen]
        parts = [
            texts[i][start : start + counts[i]] for i, start in zip(chosen, starts, strict=True)
        ]
        entries = [(sequences[i], counts[i]) for i in chosen]
        with cache.step(entries) as step:
            logits = model.decoder.forward(step, np.concatenate(parts), logits="all")
        expected = [
            full[i][start : start + counts[i]] for i, start in zip(chosen, starts, strict=True)
        ]
        np.testing.assert_allclose(logits, np.concatenate(expected), **TOLERANCE)
    assert [len(sequence) for sequence in sequences] == [70, 23, 41]
    assert float(np.ptp(full[0])) > 1  # the comparison would be idle on flat logits


@pytest.mark.parametrize("family", [{}, FAMILIES["gemma2"], FAMILIES["deepseek_v3"]])
def test_last_and_none_agree_with_all(tiny_config: MakeConfig, family: dict[str, Any]) -> None:
    model = Model.random(tiny_config(**family), seed=3)
    ids = np.random.default_rng(2).integers(0, 50, 30)
    results = {}
    for logits in ("all", "last", "none"):
        cache = make_cache(model)
        a, b = cache.sequence(), cache.sequence()
        with cache.step([(a, 19), (b, 11)]) as step:
            results[logits] = model.decoder.forward(step, ids, logits=logits)
        with cache.step([(a, 1), (b, 1)]) as step:
            results[logits, "next"] = model.decoder.forward(step, [4, 5])
    assert results["none"] is None
    assert results["all"].shape == (30, 50)
    np.testing.assert_allclose(results["last"], results["all"][[18, 29]], **TOLERANCE)
    for logits in ("last", "none"):
        np.testing.assert_array_equal(results[logits, "next"], results["all", "next"])


def test_forward_full_last(tiny_config: MakeConfig) -> None:
    model = Model.random(tiny_config(), seed=3)
    ids = [1, 2, 3, 4]
    last = model.decoder.forward_full(ids, logits="last")
    np.testing.assert_allclose(last, model.decoder.forward_full(ids)[-1:], **TOLERANCE)


@pytest.mark.parametrize("features", [{}, *FAMILIES.values()], ids=["llama", *FAMILIES])
def test_decode_bits_do_not_depend_on_the_batch(
    tiny_config: MakeConfig, features: dict[str, Any]
) -> None:
    model = Model.random(tiny_config(**features), seed=5)
    prompts = [np.arange(n) for n in (3, 9, 5)]

    def decode(members: list[int]) -> dict[int, Any]:
        cache = make_cache(model)
        sequences = [cache.sequence() for _ in members]
        for sequence, member in zip(sequences, members, strict=True):
            with cache.step([(sequence, len(prompts[member]))]) as step:
                model.decoder.forward(step, prompts[member])
        with cache.step([(sequence, 1) for sequence in sequences]) as step:
            logits = model.decoder.forward(step, [member + 1 for member in members])
        return dict(zip(members, logits, strict=True))

    together = decode([0, 1, 2])
    for member in range(3):
        np.testing.assert_array_equal(decode([member])[member], together[member])


def test_bad_arguments_change_nothing(tiny_config: MakeConfig) -> None:
    model = Model.random(tiny_config(max_context=20), seed=1)
    cache = make_cache(model)
    a = cache.sequence()
    cases: list[tuple[int, Any, str, str]] = [
        (2, [1, 50], "last", "tokens.*49.*50"),
        (2, [-1, 0], "last", "tokens.*-1"),
        (2, [1, 2, 3], "last", "tokens.*2.*3"),
        (2, [[1, 2]], "last", "tokens.*one-dimensional"),
        (2, [1.0, 2.0], "last", "tokens.*float64"),
        (2, [1, 2], "some", "logits.*some"),
        (21, list(range(21)), "last", "max_context.*20.*21"),
    ]
    for count, tokens, logits, message in cases:
        with (
            pytest.raises(InvalidArgument, match=message),
            cache.step([(a, count)]) as step,
        ):
            model.decoder.forward(step, tokens, logits=logits)
        assert len(a) == 0
        cache.check()
    with cache.step([(a, 2)]) as step:
        assert model.decoder.forward(step, [1, 2]).shape == (1, 50)
    for tokens in ([], [50], list(range(21))):
        with pytest.raises(InvalidArgument, match="tokens"):
            model.decoder.forward_full(tokens)
    with pytest.raises(InvalidArgument, match="logits"):
        model.decoder.forward_full([1], logits="none")


def test_model_describes_itself(tiny_config: MakeConfig) -> None:
    model = Model.random(tiny_config(), seed=1)
    assert "llama" in repr(model) and "2 layers" in repr(model)
    spec = model.cache_spec(k_format="fp16", v_format="bf16")
    assert (spec.num_layers, spec.layers[0].head_dim, spec.layers[0].num_kv_heads) == (2, 16, 2)
    assert model.decoder.weights.num_parameters * 4 == model.decoder.weights.nbytes


def test_same_seed_same_model(tiny_config: MakeConfig) -> None:
    a, b = (Model.random(tiny_config(), seed=4).decoder.forward_full([1, 2]) for _ in range(2))
    np.testing.assert_array_equal(a, b)
