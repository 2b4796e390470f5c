"""The decoder on a device whose arrays are not NumPy's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from bench.gpu.greedy import follow

import kvcore
from kvcore import units
from kvcore.errors import InvalidArgument
from kvcore.models import Device, Generator, Model, ModelConfig, SamplingParams, generate, load
from strict_arrays import (
    ATTRIBUTES,
    DEVICE,
    FUNCTIONS,
    METHODS,
    Leak,
    StrictArray,
    StrictBackend,
    StrictModule,
)
from tiny_families import FAMILIES

MakeConfig = Callable[..., ModelConfig]

BIASED: dict[str, Any] = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True}
CASES = {"llama": {}, "biased": BIASED, **FAMILIES}
PLACE: dict[str, Any] = {"backend": "cuda", "device": DEVICE}


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictBackend]:
    """A backend of strict arrays in CUDA's place."""
    backend = StrictBackend()
    monkeypatch.setitem(kvcore.backend._loaded, "cuda", backend)
    yield backend
    assert backend.xp.current == 0


def make_cache(model: Model) -> kvcore.KVCache:
    spec = model.cache_spec(block_size=16, k_format="fp32", v_format="fp32")
    return model.device.make_cache(spec, num_blocks=40)


def ragged_logits(model: Model) -> list[Any]:
    """Logits of prompts and single tokens in steps of few and many rows."""
    cache, ids = make_cache(model), np.random.default_rng(3).integers(0, 50, 60)
    a, b = cache.sequence(), cache.sequence()
    found = []
    for entries, logits in [
        ([(a, 30)], "last"),
        ([(a, 1), (b, 12)], "all"),
        ([(a, 20), (b, 5)], "none"),
        ([(a, 1), (b, 9)], "last"),
        ([(a, 1), (b, 1)], "last"),
    ]:
        count = sum(number for _, number in entries)
        with model.device.active(), cache.step(entries) as step:
            found.append(model.decoder.forward(step, ids[:count], logits=logits))
    return found


@pytest.mark.parametrize("features", CASES.values(), ids=CASES)
def test_no_host_array_meets_one_of_the_device(
    strict: StrictBackend, tiny_config: MakeConfig, features: dict[str, Any]
) -> None:
    config = tiny_config(**features)
    found = ragged_logits(Model.random(config, seed=7, **PLACE))
    expected = ragged_logits(Model.random(config, seed=7))
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert isinstance(ours, StrictArray)
        np.testing.assert_allclose(ours.host, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_greedy_tokens_differ_at_near_ties_only(
    strict: StrictBackend, tiny_config: MakeConfig, family: str
) -> None:
    config = tiny_config(**FAMILIES[family])
    models = Model.random(config, seed=2), Model.random(config, seed=2, **PLACE)
    found = follow(*models, [5, 6, 7], 60, k_format="bf16", v_format="bf16")
    assert len(set(found.tokens)) > 1
    assert found.largest < 1e-3 and all(tie.margin < 1e-3 for tie in found.ties)


def test_what_two_models_disagree_on_is_found(tiny_config: MakeConfig) -> None:
    model, other = (Model.random(tiny_config(), seed=2) for _ in range(2))
    chosen = follow(model, model, [5, 6, 7], 1).tokens[0]
    head = other.decoder.weights.head
    rival = (chosen + 1) % 50
    head[[chosen, rival]] = head[[rival, chosen]]
    found = follow(model, other, [5, 6, 7], 1)
    cache = make_cache(model)
    with cache.step([(cache.sequence(), 3)]) as step:
        (logits,) = model.decoder.forward(step, [5, 6, 7])
    [tie] = found.ties
    assert (tie.position, tie.chosen, tie.other) == (0, chosen, rival)
    assert tie.margin == pytest.approx(logits[chosen] - logits[rival], rel=1e-2)
    assert found.largest == pytest.approx(tie.margin, rel=1e-2)


def test_generation_on_a_device(strict: StrictBackend, tiny_config: MakeConfig) -> None:
    model = Model.random(tiny_config(), seed=2, **PLACE)
    prompts = [[5, 6, 7], list(range(40)), [9]]
    options: dict[str, Any] = {"max_tokens": 12, "prefill_budget": 16, "ignore_eos": True}
    for sampling in (None, SamplingParams(temperature=1, top_k=20, repetition_penalty=1.2, seed=3)):
        together = generate(model, prompts, sampling=sampling, **options)
        assert [len(completion.tokens) for completion in together] == [12] * 3
        for prompt, completion in zip(prompts, together, strict=True):
            alone = generate(model, [prompt], sampling=sampling, **options)
            assert alone[0].tokens == completion.tokens


def test_weights_are_those_of_the_seed_and_tied_ones_stay_one(
    strict: StrictBackend, tiny_config: MakeConfig
) -> None:
    config = tiny_config(**FAMILIES["gemma2"])
    here, there = (
        Model.random(config, seed=1).decoder,
        Model.random(config, seed=1, **PLACE).decoder,
    )
    for ours, theirs in zip(there.weights.arrays(), here.weights.arrays(), strict=True):
        np.testing.assert_array_equal(ours.host, theirs)
    assert there.weights.head is there.weights.embedding
    assert there.weights.nbytes == here.weights.nbytes
    np.testing.assert_array_equal(there.forward_full([1, 2, 3]), here.forward_full([1, 2, 3]))


def test_a_cache_of_another_device(strict: StrictBackend, tiny_config: MakeConfig) -> None:
    here = Model.random(tiny_config(), seed=1)
    there = Model.random(tiny_config(), seed=1, **PLACE)
    other = Device("cuda", DEVICE + 1)
    for model, place, names in [
        (here, there.device, "cpu expected.*cuda:1"),
        (there, here.device, "cuda:1 expected.*cpu"),
        (there, other, "cuda:1 expected.*cuda:2"),
    ]:
        cache = place.make_cache(model.cache_spec(), num_blocks=1)
        with pytest.raises(InvalidArgument, match=f"^cache: a cache on {names}"):
            Generator(model, cache)
        sequence = cache.sequence()
        with (
            place.active(),
            pytest.raises(InvalidArgument, match=f"^step: a cache on {names}"),
            cache.step([(sequence, 2)]) as step,
        ):
            model.decoder.forward(step, [1, 2])
        assert len(sequence) == 0


def test_memory_is_the_devices(strict: StrictBackend, tiny_config: MakeConfig) -> None:
    model = Model.random(tiny_config(), seed=1, **PLACE)
    nbytes = model.device.make_cache(model.cache_spec(), memory="auto").stats().bytes
    available = strict.available_memory(DEVICE)
    assert 0.9 * units.AUTO_SHARE * available < nbytes <= units.AUTO_SHARE * available


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InvalidArgument, match=r"^device: expected None.*got 0"):
        load("smollm2", device=0)
    with pytest.raises(InvalidArgument, match=r"^backend: expected one of cpu, cuda, got 'tpu'"):
        load("smollm2", backend="tpu")
    if "cuda" not in kvcore.available_backends():
        with pytest.raises(kvcore.BackendUnavailable, match="cuda"):
            load("smollm2", backend="cuda")


def test_what_a_device_lacks_is_told_before_weights_are_read(strict: StrictBackend) -> None:
    def matmul(*_: Any, **__: Any) -> Any:
        raise ImportError("libcublas.so: cannot open shared object file\nand more")

    strict.xp.matmul = matmul
    with pytest.raises(
        kvcore.BackendUnavailable,
        match=r'^backend "cuda": a matrix product failed: libcublas.so: .*kvcore\[models-cuda\]',
    ):
        load("smollm2", backend="cuda", device=DEVICE)


def test_the_stand_in_refuses_what_a_device_would() -> None:
    xp, ones = StrictModule(), np.ones(3, np.float32)
    with pytest.raises(Leak, match="than 0, the current"):
        xp.asarray(ones)
    with xp.device(DEVICE):
        x = xp.asarray(ones)
        leaks: list[Callable[[], Any]] = [
            lambda: np.asarray(x),
            lambda: np.sum(x),
            lambda: np.exp(x),
            lambda: x + ones,
            lambda: ones * x,
            lambda: xp.exp(ones),
            lambda: xp.exp(x, out=ones),
            lambda: x[ones.astype(int)],
            lambda: x[[0, 1]],
            lambda: x.__setitem__(0, ones),
            lambda: bool(x[0]),
            lambda: float(x[0]),
        ]
        for number, leak in enumerate(leaks):
            with pytest.raises(TypeError):
                leak()
                pytest.fail(f"leak {number} went through")
        with pytest.raises(AttributeError):
            xp.vecdot(x, x)
        with pytest.raises(AttributeError):
            x.tolist()
        x += 1
        np.testing.assert_array_equal(xp.asnumpy(2 / x[1:]), [1, 1])


def test_the_stand_in_has_nothing_that_cupy_lacks() -> None:
    cupy = pytest.importorskip("cupy")
    module = (*FUNCTIONS, "asarray", "asnumpy", "empty", "zeros", "float32", "inf", "ndarray")
    assert [name for name in module if not hasattr(cupy, name)] == []
    array = (*METHODS, *ATTRIBUTES, "T")
    assert [name for name in array if not hasattr(cupy.ndarray, name)] == []
