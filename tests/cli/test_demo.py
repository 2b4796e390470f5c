"""`kvcore demo` with a small random model in place of SmolLM2."""

from __future__ import annotations

import re

from click.testing import CliRunner

from kvcore.cli.app import app


def test_the_demo_measures_what_it_prints(tiny_model, monkeypatch):
    monkeypatch.setattr("kvcore.cli.demo.load", lambda *_args, **_options: tiny_model)
    result = CliRunner().invoke(app, ["demo", "--max-tokens", "70"])
    assert result.exit_code == 0, result.output
    assert "prefill       47 tokens" in result.stdout
    assert "decode        69 tokens" in result.stdout
    assert "2 blocks in use at most" in result.stdout
    assert "the same tokens" in result.stdout
    rows = re.findall(r"^ +(\d+) +([\d.]+) ms +(\d+) ms", result.stdout, re.MULTILINE)
    assert [int(length) for length, *_ in rows] == [64, 128, 256, 512]
    assert re.search(r"A token reads 0 MB .* a token is [\d.]+ times that\.", result.stdout)


def test_models_with_windows_are_measured_too(windowed_model, monkeypatch):
    monkeypatch.setattr("kvcore.cli.demo.load", lambda *_args, **_options: windowed_model)
    result = CliRunner().invoke(app, ["demo", "--max-tokens", "70"])
    assert result.exit_code == 0, result.output
    assert "the same tokens" in result.stdout
