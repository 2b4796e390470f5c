"""--backend and --device, with a stand-in for CUDA's arrays."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

import kvcore
from byte_model import make_model
from kvcore.cli.app import app
from kvcore.models import generate
from strict_arrays import DEVICE, StrictBackend

PLACE = ["--backend", "cuda", "--device", str(DEVICE)]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setitem(kvcore.backend._loaded, "cuda", StrictBackend())

    def load(_model, backend="cpu", *, device=None, **_options):
        return make_model(head_dim=64, backend=backend, device=device)

    for command in ("generate", "demo", "evaluate"):
        monkeypatch.setattr(f"kvcore.cli.{command}.load", load)

    def invoke(*arguments):
        return CliRunner().invoke(app, arguments)

    return invoke


@pytest.mark.parametrize(
    "size", [(), ("--num-blocks", "3"), ("--memory", "1MiB")], ids=["texts", "blocks", "memory"]
)
def test_generate(run, size):
    result = run("generate", "hello", "--max-tokens", "9", *size, *PLACE)
    model = make_model(head_dim=64, backend="cuda", device=DEVICE)
    assert result.stdout == generate(model, ["hello"], max_tokens=9)[0].text + "\n"
    assert result.exit_code == 0


def test_demo(run):
    result = run("demo", "--max-tokens", "20", *PLACE)
    assert result.exit_code == 0, result.output
    assert f"; device {DEVICE}\n" in result.stdout
    assert "the same tokens" in result.stdout
    assert re.search(r"GB/s, by the maximum of each array\): a token is", result.stdout)


def test_eval(run):
    options = ["--length", "60", "--recall-length", "20", "--json", "-", "--raw", "without"]
    found, expected = (
        json.loads(run("eval", "--formats", "rot8+bias/rot8", *options, *place).stdout)
        for place in (PLACE, [])
    )
    assert found["device"] == f"device {DEVICE}"
    for name in ("kl", "perplexity", "error_mean"):
        ours, theirs = (data["results"][0][name] for data in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-2)


def test_info(run):
    assert f"device   device {DEVICE}\n" in run("info", *PLACE).stdout
    assert f"device   {kvcore.get_backend('cpu').describe(None)}\n" in run("info").stdout


@pytest.mark.parametrize("command", [("generate", "x"), ("demo",), ("eval",), ("info",)])
def test_what_is_not_there_is_one_line(run, command):
    for place, message in [
        (["--device", "0"], "error: device: expected None"),
        (["--backend", "tpu"], "error: Invalid value for '--backend'"),
        (["--device", "-1"], "error: Invalid value for '--device'"),
    ]:
        result = run(*command, *place)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(message)
