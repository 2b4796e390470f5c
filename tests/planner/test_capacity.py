"""What fits, against hand arithmetic."""

from __future__ import annotations

import pytest

import kvcore
from kvcore.planner import (
    get_device,
    get_model,
    kv_room,
    longest_context,
    most_sequences,
    waste,
)

DEVICES = {"rtx-4090": 24, "a100-40": 40, "a100-80": 80, "h100": 80, "h100-96": 96}  # GiB

#: Parameters and bytes of a token in 16 bits, by hand: 2 * layers * KV heads * 128 * 2.
MODELS = {
    "llama-2-7b": (6_738_415_616, 2 * 32 * 32 * 128 * 2),
    "llama-2-13b": (13_015_864_320, 2 * 40 * 40 * 128 * 2),
    "llama-2-70b": (68_976_648_192, 2 * 80 * 8 * 128 * 2),
    "llama-3-8b": (8_030_261_248, 2 * 32 * 8 * 128 * 2),
    "gpt-4-class": (1_781_210_886_144, 2 * 120 * 8 * 128 * 2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_longest_contexts_by_hand(model, device):
    parameters, per_token = MODELS[model]
    room = DEVICES[device] * 2**30 * 9 // 10 - 2 * parameters
    blocks = max(0, room // (64 * per_token))
    shape = get_model(model)
    assert longest_context(shape, get_device(device), shape.cache_spec("fp16")) == 64 * blocks


def test_the_table_of_longest_contexts():
    """In tokens, a tenth of the memory left free; 0: the weights alone do not fit."""
    table = {
        "llama-2-7b": (18_496, 48_000, 121_728, 121_728, 151_232),
        "llama-2-13b": (0, 15_360, 62_592, 62_592, 81_408),
        "llama-2-70b": (0, 0, 0, 0, 0),
        "llama-3-8b": (54_400, 172_352, 467_264, 467_264, 585_216),
        "mistral-7b": (None,) * 5,
        "gpt-4-class": (0, 0, 0, 0, 0),
    }
    for name, row in table.items():
        model = get_model(name)
        spec = model.cache_spec("fp16")
        assert tuple(longest_context(model, get_device(d), spec) for d in DEVICES) == row


def test_llama_2_on_an_h100_reaches_121_thousand_tokens():
    model = get_model("llama-2-7b")
    tokens = longest_context(model, get_device("h100"), model.cache_spec("fp16"))
    assert tokens // 1000 == 121


def test_a_longer_context_does_not_fit():
    model, device = get_model("gemma-3-4b"), get_device("rtx-4090")
    spec = model.cache_spec("rot8")
    longest = longest_context(model, device, spec, batch=3)
    assert most_sequences(model, device, spec, longest) >= 3
    assert most_sequences(model, device, spec, longest + 64) < 3


def test_several_devices_hold_more():
    model, device = get_model("llama-2-70b"), get_device("h100")
    spec = model.cache_spec("fp16")
    assert longest_context(model, device, spec, num_devices=2) > 0
    assert kv_room(model, device, num_devices=2) == 2 * 80 * 2**30 * 9 // 10 - 2 * model.parameters


def test_most_sequences_in_whole_blocks():
    model, device = get_model("llama-2-7b"), get_device("h100")
    spec = model.cache_spec("fp16")
    room = kv_room(model, device)
    assert most_sequences(model, device, spec, 4096) == room // 2**31
    assert most_sequences(model, device, spec, 4097) == room // (2**31 + 64 * 524_288)


def test_waste_of_preallocation():
    found = waste((100, 200, 4000), 4096, block_size=64)
    assert found.tokens == 4300
    assert found.contiguous_slots == 3 * 4096
    assert found.paged_slots == 128 + 256 + 4032
    assert found.contiguous_waste == pytest.approx(1 - 4300 / 12288)
    assert found.paged_waste == pytest.approx(1 - 4300 / 4416)


@pytest.mark.parametrize("reserve", [-0.1, 1, 2])
def test_a_reserve_that_is_none(reserve):
    with pytest.raises(kvcore.InvalidArgument, match=r"^reserve: expected at least 0 and below 1"):
        kv_room(get_model("gpt2"), get_device("h100"), reserve)


def test_a_text_longer_than_the_longest():
    with pytest.raises(kvcore.InvalidArgument, match=r"^lengths: expected 1 to 64, got 65"):
        waste((65,), 64)
