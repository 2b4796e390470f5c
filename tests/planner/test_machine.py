"""The CPU at hand as a device: the figures are sane, and a plan takes them."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

import kvcore
from kvcore.cli.app import app
from kvcore.planner import Cost, StepCost, get_model, machine, plan


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Little work: the numbers mean little, too."""
    for name, value in {
        "READ_BYTES": 4 << 20, "MATRIX": 64, "MIN_ROUNDS": 2, "SECONDS": 0.0,
        "ATTENTION_BYTES": 1 << 20,
    }.items():  # fmt: skip
        monkeypatch.setattr(machine, name, value)


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("smollm2-135m", ("fp32",)),
        ("smollm2-135m", ("chan4", "rot4")),
        ("gpt-oss-20b", ("rot8",)),
        ("deepseek-v2-lite", ("bf16",)),
    ],
)
def test_measures_what_a_model_needs(name, formats):
    model = get_model(name)
    device = machine.measure_cpu(model, model.cache_spec(*formats))
    assert device.name == "cpu"
    assert 1e8 < device.bandwidth < 1e13
    assert 1e7 < device.fp16_flops < 1e15
    assert 0 < device.attention_share <= 1
    assert device.multiprocessors == kvcore.get_num_threads()
    assert kvcore.get_isa() in device.source
    found = plan(model, device, context=256, k_format=formats[0], v_format=formats[-1])
    assert found.decode.seconds(device) > 0


def test_attention_is_expected_to_take_what_it_took():
    model = get_model("gpt2")
    device = machine.measure_cpu(model, model.cache_spec("fp32"))
    step = StepCost(Cost(0, 0), Cost(0, device.bandwidth), 1, 1)
    assert step.attention_seconds(device) == pytest.approx(1 / device.attention_share)


def test_the_command_measures():
    result = CliRunner().invoke(app, ["plan", "--model", "gpt2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "measured: " in result.stdout
