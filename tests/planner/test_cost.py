"""Operations, bytes and bounds, against counting and hand arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

import kvcore
from kvcore.planner import (
    DEVICES,
    MODELS,
    Cost,
    decode_attention,
    decode_step,
    get_device,
    get_model,
    prefill,
)
from kvcore.planner.cost import experts_met, visible_pairs


@pytest.mark.parametrize("name", MODELS)
def test_decode_attention_is_bound_by_bandwidth(name):
    model = MODELS[name]
    cost = decode_attention(model, model.cache_spec(), 8192)
    assert cost.bound(get_device("h100")) == "bandwidth"
    assert 0 < cost.intensity < get_device("h100").ridge


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "gpt-oss-20b"])
def test_intensity_is_the_group_s_size_in_sixteen_bits(name):
    """4 D operations a head and key, 4 D bytes a KV head and key."""
    model = MODELS[name]
    cost = decode_attention(model, model.cache_spec(), 131072)
    assert cost.intensity == pytest.approx(model.group_size, rel=0.01)


def test_a_latent_is_read_once_for_128_heads():
    model = get_model("deepseek-v3")
    cost = decode_attention(model, model.cache_spec(), 131072)
    assert cost.intensity == pytest.approx(2 * 128 * (576 + 512) / (2 * 576), rel=0.03)


def test_decode_attention_by_hand():
    model = get_model("llama-3-8b")
    cost = decode_attention(model, model.cache_spec(), 1000, batch=3)
    assert cost.flops == 3 * 32 * 4 * 32 * 128 * 1000
    rows = 32 * 32 * 2 * 128 * 2
    assert cost.nbytes == 3 * (1001 * 131072 + rows)


def test_windows_bound_what_is_read():
    model = replace(get_model("llama-3-8b"), windows=(512,))
    spec = model.cache_spec()
    assert decode_attention(model, spec, 512) == decode_attention(model, spec, 100_000)


@pytest.mark.parametrize(("length", "window"), [(1, None), (10, None), (10, 3), (10, 10), (7, 1)])
def test_pairs_are_those_that_are_seen(length, window):
    seen = sum(min(i + 1, window or length) for i in range(length))
    assert visible_pairs(length, window) == seen


def test_weights_are_read_once_whatever_the_batch():
    model = get_model("llama-2-7b")
    one, many = (decode_step(model, model.cache_spec(), 100, b).weights for b in (1, 64))
    assert many.flops == 64 * one.flops == 64 * 2 * model.active_parameters
    assert one.nbytes == pytest.approx(2 * model.active_parameters, rel=0.001)
    assert many.nbytes == pytest.approx(one.nbytes, rel=0.01)


def test_experts_that_a_batch_meets():
    assert experts_met(8, 2, 1) == pytest.approx(2)
    assert experts_met(8, 2, 2) == pytest.approx(2 + 2 * 6 / 8)
    assert experts_met(8, 2, 1000) == pytest.approx(8)
    model = get_model("mixtral-8x7b")
    one, many = (decode_step(model, model.cache_spec(), 100, b).weights for b in (1, 1000))
    assert one.nbytes == pytest.approx(2 * model.active_parameters, rel=0.001)
    assert many.nbytes == pytest.approx(2 * model.parameters, rel=0.02)


def test_a_prefill_in_chunks_computes_the_same_and_reads_more():
    model = get_model("llama-3-8b")
    spec = model.cache_spec()
    whole, chunked = prefill(model, spec, 8192), prefill(model, spec, 8192, chunk=512)
    assert chunked.attention.flops == whole.attention.flops
    assert chunked.attention.nbytes > whole.attention.nbytes
    assert chunked.weights.nbytes > whole.weights.nbytes
    assert whole.attention.flops == 32 * 4 * 32 * 128 * 8192 * 8193 / 2
    head = 128256 * 4096
    assert whole.weights.flops == 2 * (8192 * (model.active_parameters - head) + head)


def test_a_long_prefill_is_bound_by_arithmetic_and_a_decode_is_not():
    model, device = get_model("llama-3-8b"), get_device("h100")
    assert prefill(model, model.cache_spec(), 8192).weights.bound(device) == "arithmetic"
    assert decode_step(model, model.cache_spec(), 8192).weights.bound(device) == "bandwidth"


def test_time_is_the_larger_of_reading_and_computing():
    device = get_device("a100-80")
    assert Cost(312e12, 1).seconds(device) == pytest.approx(1)
    assert Cost(1, 2039e9).seconds(device) == pytest.approx(1)
    step = decode_step(get_model("gpt2"), get_model("gpt2").cache_spec(), 1000, 4)
    parts = step.weights.seconds(device) + step.attention.seconds(device)
    assert step.seconds(device) == parts
    assert step.tokens_per_second(device) == pytest.approx(4 / parts)


@pytest.mark.parametrize("name", DEVICES)
def test_devices_are_whole(name):
    device = DEVICES[name]
    assert device.source
    assert 50 < device.ridge < 500
    assert device.memory > device.l2 > device.shared_memory
    assert device.fp8_flops is None or device.fp8_flops > device.fp16_flops


def test_unknown_devices_list_near_ones():
    with pytest.raises(kvcore.InvalidArgument, match=r"^device: 'h1000' is unknown; .*h100"):
        get_device("h1000")
    assert get_device("H100-80") is get_device("h100")


def test_a_device_without_memory():
    with pytest.raises(kvcore.InvalidArgument, match=r"^memory: expected more than 0, got 0"):
        replace(get_device("h100"), memory=0)
