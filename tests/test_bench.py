"""The harness itself: what it counts, how it takes turns, and that it sees a wrong answer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bench.cases import CASES, FORMATS, Case, Data
from bench.machine import Pinning
from bench.measure import Cursor, Samples, Task, Timing, measure, ratio
from bench.roof import Roof
from bench.suite import Settings, load_peers, run_case

import kvcore

ROOT = Path(__file__).parents[1]
SMALL = [
    Case("ragged", "decode", (99, 16, 0), (1, 1, 1), num_heads=6, num_kv_heads=2, head_dim=16),
    Case("even", "decode", (69, 69), (1, 1), num_heads=4, num_kv_heads=4, head_dim=32),
    Case("whole", "prefill", (0,), (70,), num_heads=4, num_kv_heads=1, head_dim=24),
    Case("chunk", "prefill", (100,), (33,), num_heads=4, num_kv_heads=2, head_dim=16),
    Case("append", "append", (9, 9), (20, 20), num_kv_heads=2, head_dim=16),
]


@pytest.fixture(scope="module")
def roof():
    return Roof(1)


@pytest.fixture
def settings():
    yield Settings(1, seconds=0.01, min_rounds=2, max_rounds=2)
    kvcore.set_num_threads(0)


@pytest.mark.parametrize("case", [*SMALL, CASES["decode-ragged"]], ids=lambda case: case.name)
def test_bytes_and_flops_by_counting(case):
    pairs = sum(
        stored + i + 1
        for stored, new in zip(case.stored, case.new, strict=True)
        for i in range(new)
    )
    expected = 0 if case.kind == "append" else pairs * case.num_heads * case.head_dim * 2 * 2
    assert case.flops == expected
    data = Data.random(case)
    rows = data.new(case) if case.kind == "append" else (*data.k, *data.v)
    elements = sum(array.size for array in rows)
    assert case.kv_bytes("fp32") == 4 * elements
    assert case.kv_bytes("bf16") == case.kv_bytes("fp16") == 2 * elements
    assert data.q.shape == (case.query_starts[-1], case.num_heads, case.head_dim)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("peer", ["numpy", "torch"])
def test_peers_agree_and_every_task_gets_a_row(case, kv_format, peer, roof, settings):
    present, absent = load_peers([peer])
    if absent:
        pytest.skip(absent[peer])
    rows = {row.peer: row for row in run_case(case, kv_format, present, roof, settings)}
    assert {"kvcore", peer, "roof"} <= rows.keys()
    for row in rows.values():
        assert row.ms > 0 and row.gbs > 0 and row.layers == 2
        assert math.isclose(row.gbs * row.ms * 1e6, case.kv_bytes(kv_format))
        assert math.isclose(row.floor_ms, rows["roof"].ms)
    assert rows["kvcore"].times_kvcore == rows["roof"].share == 1.0
    assert (rows[peer].error is None) == (case.kind == "append")


def test_a_wrong_answer_is_an_error(roof, settings):
    class Wrong(Task):
        def run(self):
            pass

        def output(self):
            return np.zeros((1, 6, 16), np.float32)

    case = Case("one", "decode", (40,), (1,), num_heads=6, num_kv_heads=2, head_dim=16)
    with pytest.raises(RuntimeError, match="answers of wrong and kvcore differ"):
        run_case(case, "fp32", {"wrong": lambda _: {"wrong": Wrong()}}, roof, settings)


def test_tasks_take_turns_and_walk_the_layers():
    log = []

    class Logging(Task):
        def __init__(self, name):
            self.name, self.cursor = name, Cursor(3)

        def prepare(self):
            self.layer = self.cursor.next()

        def run(self):
            log.append((self.name, self.layer))

    tasks = {"a": Logging("a"), "b": Logging("b")}
    samples = measure(tasks, Pinning(1), seconds=0.0, min_rounds=4, max_rounds=4)
    for name in tasks:
        layers = [layer for who, layer in log if who == name]
        assert layers == [i % 3 for i in range(len(layers))]
        assert len(samples[name].rounds) == 4
    order = [who for i, (who, _) in enumerate(log) if i == 0 or log[i - 1][0] != who]
    # the warm-ups of a and b, then rounds a b, b a, a b, b a, of which neighbours melt together
    assert order == ["a", "b", "a", "b", "a", "b", "a"]


def test_disturbed_steps_are_left_out():
    samples = Samples()
    samples.add([Timing(1.0, 0.0)] * 4 + [Timing(9.0, 1.0)])
    assert samples.is_contended and sorted(samples.used) == [1.0, 1.0, 1.0, 1.0, 9.0]
    samples.add([Timing(2.0, 0.0)])
    assert not samples.is_contended and samples.median == 1.0 and samples.disturbed == [9.0]
    samples.add([Timing(9.0, 1.0)])
    assert samples.rounds[:2] == [1.0, 2.0] and math.isnan(samples.rounds[2])
    other = Samples(clean=[2.0] * 5, rounds=[3.0, 2.0, 5.0])
    assert ratio(other, samples) == 2.0  # two rounds in common: 10th percentiles, 2 and 1
    assert ratio(other, Samples(clean=[1.0] * 5, rounds=[1.0, 2.0, 1.0])) == 3.0


def test_the_probe_reads_and_computes(roof):
    array = np.ones(16 << 20, np.float32)
    gbs = array.nbytes / min(roof.read([array]).seconds for _ in range(3)) / 1e9
    assert 0.5 < gbs < 2000
    flops = 2e9
    gflops = flops / min(roof.compute(flops).seconds for _ in range(3)) / 1e9
    assert 0.5 < gflops < 2000


def test_command_writes_what_it_measured(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench", "--quick", "--peers", "numpy", "--json", str(path)]
    command += ["--cases", "decode-smollm2,append-1", "--formats", "fp16"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    content = json.loads(path.read_text())
    assert [(row["case"], row["peer"]) for row in content["rows"]] == [
        (case, peer)
        for case in ("decode-smollm2", "append-1")
        for peer in ("kvcore", "numpy", "roof")
    ]
    assert content["hardware"]["isa"] == kvcore.get_isa()
    assert content["hardware"]["versions"]["kvcore"] == kvcore.__version__
    assert all(x["read_gbs"] > 0 and x["fma_gflops"] > 0 for x in content["limits"])
    assert len(content["control"]) == 8 and all(cost["us"] > 0 for cost in content["control"])
    for name in ("decode-smollm2, fp16", "append-1, fp16", "step of 256 sequences"):
        assert name in result.stdout


def test_command_refuses_unknown_names():
    command = [sys.executable, "-m", "bench", "--cases", "decode-4k,nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 2 and "nonsense" in result.stderr
