"""`kvcore eval` with a small random model in place of SmolLM2."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from kvcore.cli.app import app
from kvcore.evaluation import Calibration


@pytest.fixture
def run(tiny_model, monkeypatch):
    monkeypatch.setattr("kvcore.cli.evaluate.load", lambda *_args, **_options: tiny_model)
    return lambda *arguments: CliRunner().invoke(app, ["eval", *arguments])


SMALL = ("--length", "80", "--recall-length", "20")


def test_table_json_and_picture(run, tmp_path):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    result = run(
        "--formats", "bf16,fp16/fp32", *SMALL, "--json", str(numbers), "--plot", str(picture)
    )
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1].strip() for line in result.stdout.splitlines() if "|" in line]
    assert rows[0] == "K/V" and rows[2:] == ["fp32/fp32", "bf16/bf16", "fp16/fp32"]
    assert "4 texts of 80 tokens" in result.stdout
    data = json.loads(numbers.read_text())
    assert [r["case"]["name"] for r in data["results"]] == ["bf16/bf16", "fp16/fp32"]
    assert data["results"][0]["kl"] > data["results"][1]["kl"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_alone_on_stdout(run):
    result = run("--formats", "bf16", *SMALL, "--json", "-")
    assert json.loads(result.stdout)["length"] == 80


def test_own_texts(run, tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("Some words that are a text, and then some more. " * 4)
    files = [str(tmp_path / name) for name in ("one.txt", "two.txt")]
    options = ("--formats", "bf16", *SMALL, "--json", "-")
    result = run("--texts", files[0], "--texts", files[1], *options)
    assert list(json.loads(result.stdout)["reference"]["texts"]) == ["one.txt", "two.txt"]


def test_calibrate_writes_what_a_spec_takes(run, tmp_path, tiny_model):
    path = str(tmp_path / "tiny.npz")
    result = run("--calibrate", path, "--length", "60")
    assert result.exit_code == 0, result.output
    assert "2 layers, 2 heads of 8, from 180 tokens" in result.stdout
    read = Calibration.load(path)
    assert read.key_bias.shape == (2, 2, 8) and read.num_tokens == 180
    assert (read.key_scales > 0).all() and np.isfinite(read.value_scales).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "bf17"], "formats: expected one of"),
        (["--formats", "bf16", "--length", "600"], "length: expected 2 to 499, got 600"),
        (["--formats", "bf16", "--texts", "nowhere.txt"], "texts: expected a readable text file"),
        (["--formats", "bf16", "--calibration", "nowhere.npz"], "calibration: expected a file"),
        (["--json", "/nowhere/x.json"], "json: expected a file in an existing folder"),
        (["--plot", "/nowhere/x.png"], "plot: expected a picture's file"),
        (["--plot", "picture.txt"], "plot: expected a picture's file"),
        (["--raw", "some"], "Invalid value for '--raw'"),
    ],
)
def test_what_the_caller_can_mend(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
