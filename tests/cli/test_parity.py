"""`kvcore parity`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import kvcore
from kvcore import backend as registry
from kvcore.cli.app import app
from kvcore.cpu_backend import CpuBackend


def run(*arguments):
    return CliRunner().invoke(app, ["parity", *arguments])


def test_a_line_a_case_and_a_summary():
    result = run("--select", "decode/fp*", "--isa", "scalar")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["case", "error", "bits", "bytes", "s"]
    names = [line.split()[0] for line in lines[1:4]]
    assert names == ["decode/fp32", "decode/fp16", "decode/fp8_e4m3"]
    assert "cpu, scalar: 3 of 3 cases passed" in result.stdout


def test_every_instruction_set():
    result = run("--select", "append/fp32", "--isa", "all", "--json", "-")
    devices = [record["device"] for record in json.loads(result.stdout)]
    assert devices == list(kvcore.available_isas())


def test_json_beside_the_table(tmp_path):
    file = tmp_path / "results.json"
    result = run("--select", "quantize/rot4-128", "--json", str(file))
    assert "quantize/rot4-128" in result.stdout
    (record,) = json.loads(file.read_text())
    assert record["passed"] and record["same_bytes"] and record["backend"] == "cpu"


def test_a_failure_ends_with_1(monkeypatch):
    class Faulty(CpuBackend):
        def merge_states(self, outs, lses):
            raise RuntimeError("boom")

    monkeypatch.setitem(registry._loaded, "cpu", Faulty())
    result = CliRunner().invoke(app, ["parity", "--select", "ops/merge*"])
    assert result.exit_code == 1
    assert "FAILED: RuntimeError: boom" in result.stdout
    assert "0 of 3 cases passed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--select", "nothing-like-it"], "error: select: "),
        (["--isa", "mmx"], "error: name: "),
        (["--json", "/no/such/folder/x.json", "--select", "append/fp32"], "error: json: "),
    ],
)
def test_what_is_refused(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "kvcore", "parity", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(message) and not done.stdout


@pytest.mark.skipif("cuda" in kvcore.available_backends(), reason="the backend is here")
def test_a_backend_that_is_not_there_is_told_plainly():
    done = subprocess.run(
        [sys.executable, "-m", "kvcore", "parity", "--backend", "cuda"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "cuda" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
