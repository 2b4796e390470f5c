"""`kvcore plan`."""

from __future__ import annotations

import csv
import io
import json

import pytest
from click.testing import CliRunner

from kvcore.cli.app import app
from kvcore.models import registry
from kvcore.planner import MODELS, plan


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


EXAMPLE = ("--model", "llama-3-8b", "--device", "h100", "--batch", "16", "--context", "32k",
           "--format", "int8")  # fmt: skip


def test_tables():
    result = run(*EXAMPLE, "--devices", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "  KV cache, 16 x 32,768 tokens  32.69 GiB   0.684" in lines
    assert "Each of 2 devices" in lines
    assert max(map(len, lines)) < 120


def test_what_a_cache_saves_with_its_formula():
    result = run("--model", "gpt2", "--context", "1124", "--device", "a100")
    lines = result.stdout.splitlines()
    start = lines.index("100 tokens generated after 1,024")
    table = {line[:29].strip(): line.split()[-1] for line in lines[start + 2 : start + 9]}
    assert float(table["all"]) == pytest.approx(91.9, abs=0.1)
    assert table["the same after the prompt"] == "1.07e+03"
    assert "n (n + 1) / 2 pairs" in " ".join(result.stdout.split())


def test_json_has_the_plan_s_numbers():
    data = json.loads(run(*EXAMPLE, "--json", "-").stdout)
    wanted = plan("llama-3-8b", "h100", 16, 32768, "int8")
    assert data["memory"]["kv"] == wanted.memory.kv
    assert data["cache"]["bytes_per_token"] == 32 * 2 * 8 * 130
    assert data["decode"]["attention"]["bound"] == "bandwidth"
    assert data["longest_context"] == wanted.longest_context
    assert data["strategies"][0]["name"] == "as it is"


def test_csv_has_plain_numbers():
    rows = list(csv.DictReader(io.StringIO(run(*EXAMPLE, "--csv", "-").stdout)))
    found = {(row["row"], row["column"]): row["value"] for row in rows}
    wanted = plan("llama-3-8b", "h100", 16, 32768, "int8")
    assert int(found["total", "bytes"]) == wanted.memory.total
    assert float(found["decode", "seconds at least"]) == wanted.decode.seconds(wanted.device)


def test_files(tmp_path):
    names = {"json": "a.json", "csv": "a.csv", "plot": "a.png", "html": "a.html"}
    options = [part for o, name in names.items() for part in (f"--{o}", str(tmp_path / name))]
    result = run("--model", "gemma-3-1b", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("What is planned")
    assert json.loads((tmp_path / "a.json").read_text())["model"]["name"] == "gemma-3-1b"
    assert (tmp_path / "a.csv").read_text().startswith("section,row,column,value\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("model", MODELS)
def test_every_model(model):
    result = run("--model", model, "--device", "h200", "--devices", "8", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"]["assumed"] == (model == "gpt-4-class")


def test_any_model_by_its_file():
    path = str(registry.locate("smollm2"))
    result = run("--config", path, "--context", "1k", "--json", "-")
    data = json.loads(result.stdout)
    assert data["model"]["parameters"] == 134_515_008
    assert data["memory"]["kv"] == 1024 * 23_040


def test_a_model_without_a_limit():
    result = run("--model", "mistral-7b", "--device", "h100")
    assert "no limit" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "llama3"), "model: 'llama3' is unknown; near it are llama-3-8b"),
        (("--device", "h1000"), "device: 'h1000' is unknown; near it are h100"),
        (("--context", "12q"), "expected a number like 32768, 32k or 1m, got '12q'"),
        (("--format", "int5"), "k_format: expected one of fp32"),
        (("--batch", "0"), "batch: expected at least 1, got 0"),
        (("--reserve", "1"), "reserve: expected at least 0 and below 1, got 1.0"),
        (("--block-size", "48"), "block_size: expected a power of two, got 48"),
        (("--config", "nowhere"), "there is no such file"),
        (("--json", "-", "--csv", "-"), "csv: expected a file, as json goes to stdout, got -"),
        (("--json", "no/folder.json"), "json: expected a file in an existing folder"),
        (("--plot", "picture.txt"), "plot: expected a picture's file"),
        (("--html", "no/page.html"), "html: expected a file in an existing folder"),
    ],
)
def test_mistakes(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_names():
    lines = run("--list").stdout.splitlines()
    assert lines[0].startswith("models: llama-2-7b, ")
    assert lines[1].endswith(", mi300x, cpu")
