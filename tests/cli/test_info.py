"""`kvcore info`."""

from __future__ import annotations

import json
import subprocess
import sys

from click.testing import CliRunner

import kvcore
from kvcore.cli.app import app


def test_json_tells_what_the_library_tells():
    result = CliRunner().invoke(app, ["info", "--json"])
    facts = json.loads(result.stdout)
    assert facts["version"] == kvcore.__version__
    assert facts["isa"] == kvcore.get_isa()
    assert facts["isa"] in facts["available_isas"] == list(kvcore.available_isas())
    assert facts["cpu_features"] == list(kvcore.cpu_features())
    assert facts["threads"] == kvcore.get_num_threads()
    assert facts["formats"]["bf16"] == {
        "kind": "float",
        "element_bits": 16,
        "element_metadata_bits": 0,
        "row_metadata_bytes": 0,
    }
    available = {name for name, state in facts["backends"].items() if state == "available"}
    assert available == set(kvcore.available_backends())
    assert set(facts["backends"]) == {"cpu", "cuda"}
    assert facts["models"]["smollm2"].startswith("SmolLM2")


def test_claimed_features_are_told(monkeypatch):
    monkeypatch.setenv("KVCORE_CPU_FEATURES", "+sse4_2")
    assert "claimed  +sse4_2 (" in CliRunner().invoke(app, ["info"]).stdout
    monkeypatch.delenv("KVCORE_CPU_FEATURES")
    assert "claimed" not in CliRunner().invoke(app, ["info"]).stdout


def test_text_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "kvcore", "info"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names[:2] == ["kvcore", "python"]
    assert {"backend", "isa", "cpu", "threads", "format", "model"} <= set(names)
