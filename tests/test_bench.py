"""The harness itself: what it counts, how it takes turns, and that it sees a wrong answer."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench import curves, formats, report, suite
from bench.cases import CASES, KINDS, Case, Data
from bench.formats import FLOATS
from bench.machine import Pinning, affinity
from bench.measure import (
    MAX_SETTLE_SECONDS,
    Cursor,
    Samples,
    Task,
    Timing,
    measure,
    ratio,
    settle,
)
from bench.peers import NAMES, Peer, Workload
from bench.peers.kvcore import ReadTask
from bench.profile import HEADER, Profile
from bench.reference import Reference
from bench.roof import Limits, Roof
from bench.suite import Row, Settings, load_peers, run_case

import attention_oracle
import kvcore

ROOT = Path(__file__).parents[1]
SMALL = [
    Case("ragged", "decode", (99, 16, 0), (1, 1, 1), num_heads=6, num_kv_heads=2, head_dim=16),
    Case("even", "decode", (69, 69), (1, 1), num_heads=4, num_kv_heads=4, head_dim=32),
    Case("whole", "prefill", (0,), (70,), num_heads=4, num_kv_heads=1, head_dim=24),
    Case("chunk", "prefill", (100,), (33,), num_heads=4, num_kv_heads=2, head_dim=16),
    Case("append", "append", (9, 9), (20, 20), num_kv_heads=2, head_dim=16),
]
#: Of head sizes that all formats take.
QUANTIZED = [
    Case("decode", "decode", (199, 70), (1, 1), num_heads=4, num_kv_heads=2, head_dim=64),
    Case("prefill", "prefill", (100,), (90,), num_heads=4, num_kv_heads=2, head_dim=64),
    Case("append", "append", (63, 20), (1, 1), num_heads=4, num_kv_heads=2, head_dim=64),
]

#: Whether a peer takes part in a case.
OFFERS = {
    "numpy": lambda case, kv_format: kv_format in FLOATS,
    "torch": lambda case, kv_format: kv_format in FLOATS,
    "torch-matmul": lambda case, kv_format: case.kind == "decode" and kv_format in FLOATS,
    "torch-flex": lambda case, kv_format: case.kind != "append" and kv_format in FLOATS,
    "onnxruntime": lambda case, kv_format: case.kind != "append" and kv_format != "bf16",
    "openvino": lambda case, kv_format: case.kind != "append",
}


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
@pytest.mark.parametrize("kv_format", FLOATS)
@pytest.mark.parametrize("peer", ["numpy", "torch", "torch-matmul", "onnxruntime", "openvino"])
def test_peers_agree_and_every_task_gets_a_row(case, kv_format, peer, roof, settings):
    present, absent = load_peers([peer])
    if absent:
        pytest.skip(absent[peer])
    result = run_case(case, kv_format, present, roof, settings)
    if result.absent:
        pytest.skip(result.absent[peer])
    rows = {row.peer: row for row in result.rows}
    if not OFFERS[peer](case, kv_format):
        assert rows.keys() == {"kvcore", "roof"}
        return
    assert {"kvcore", peer, "roof"} <= rows.keys()
    for row in rows.values():
        assert row.ms > 0 and row.gbs > 0 and row.layers == 2
        assert math.isclose(row.gbs * row.ms * 1e6, case.kv_bytes(kv_format))
        assert math.isclose(row.floor_ms, rows["roof"].ms)
    assert rows["kvcore"].times_kvcore == rows["roof"].share == 1.0
    assert (rows[peer].error is None) == (case.kind == "append")


@pytest.mark.parametrize("case", QUANTIZED, ids=lambda case: case.name)
@pytest.mark.parametrize("kv_format", ["fp8_e4m3", "chan4/rot4"])
@pytest.mark.parametrize("peer", ["torch", "onnxruntime", "openvino"])
def test_peers_stand_beside_formats_of_as_many_bits(case, kv_format, peer, roof, settings):
    present, absent = load_peers([peer])
    if absent:
        pytest.skip(absent[peer])
    result = run_case(case, kv_format, present, roof, settings)
    rows = {row.peer: row for row in result.rows}
    beside = {"kvcore-bf16"} if case.kind != "append" else set()
    offered = {peer} if OFFERS[peer](case, kv_format) else set()
    assert rows.keys() == {"kvcore", "roof"} | beside | offered and not result.absent
    assert rows["kvcore"].kv_format == kv_format
    assert all((row.mrows is None) == (case.kind != "append") for row in result.rows)
    if case.kind != "append":
        rounded = rows["kvcore"].error
        assert rows["kvcore-bf16"].error < rounded < formats.max_error(kv_format)


@pytest.mark.slow  # compiles C++ for every case
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_flex_attention_agrees(case, roof, settings):
    test_peers_agree_and_every_task_gets_a_row(case, "fp32", "torch-flex", roof, settings)


@pytest.mark.parametrize("kv_format", [*kvcore.formats.FORMATS, "chan4/rot3", "bf16/rot8"])
def test_every_format_runs(kv_format, roof, settings):
    if kv_format in ("chan4", "chan2"):
        kv_format += "/rot4"
    result = run_case(QUANTIZED[0], kv_format, {}, roof, settings)
    assert 0 < result.rows[0].error < formats.max_error(kv_format)


def is_raw(i, j):
    """Whether token i of a sequence reads token j in bf16: DESIGN, raw rows."""
    return j < 4 or j >= 32 * ((i + 1) // 32) - 32


@pytest.mark.parametrize("case", [*QUANTIZED, replace(CASES["decode-shared"], head_dim=64)],
                         ids=lambda case: case.name)  # fmt: skip
def test_bytes_of_quantized_formats_by_counting(case):
    rows = {"row": set(), "channel": set(), "raw": set()}
    for s, (stored, seq_len) in enumerate(zip(case.stored, case.seq_lens, strict=True)):
        for i in range(stored, seq_len):
            if case.kind == "append":
                sealed = range(i - 31, i + 1) if i % 32 == 31 else ()
                touched = {"row": [i], "channel": sealed, "raw": [i]}
            else:
                encoded = [j for j in range(i + 1) if not is_raw(i, j)]
                raw = [j for j in range(i + 1) if is_raw(i, j)]
                touched = {"row": encoded, "channel": encoded, "raw": raw}
            for kind, tokens in touched.items():
                rows[kind] |= {(s if j >= case.shared else 0, j) for j in tokens}
    count = {kind: len(tokens) * case.num_kv_heads for kind, tokens in rows.items()}
    raw = count["raw"] * 2 * 64
    assert case.kv_bytes("rot8") == 2 * (count["row"] * 66 + raw)
    assert case.kv_bytes("int4") == 2 * (count["row"] * 40 + raw)
    assert case.kv_bytes("chan4/rot4") == count["channel"] * 40 + count["row"] * 34 + 2 * raw
    every = case.touched_tokens * case.num_kv_heads * 2 * 64
    assert case.kv_bytes("bf16/rot2") == every + count["row"] * 18 + raw


@pytest.mark.parametrize("case", [*QUANTIZED[::2], SMALL[0]], ids=lambda case: case.name)
@pytest.mark.parametrize("kv_format", ["fp32", "rot8"])
def test_the_floor_reads_what_the_case_counts(case, kv_format, roof, monkeypatch):
    workload = Workload(case, kv_format, Data.random(case), 1)
    layers = 2
    spec = case.spec(kv_format, layers)
    cache = kvcore.KVCache(spec, num_blocks=sum(-(-n // case.block_size) for n in case.seq_lens))
    task = ReadTask(roof, workload, cache, Cursor(layers))
    read = []
    monkeypatch.setattr(roof, "read", read.append)
    for _ in range(layers):
        task.prepare()
        task.run()
    assert [sum(array.nbytes for array in arrays) for arrays in read] == (
        [case.kv_bytes(kv_format)] * layers
    )
    starts = [arrays[0].ctypes.data for arrays in read]
    assert starts == [cache.blocks(layer)[0].ctypes.data for layer in range(layers)]


def test_formats_of_a_command_line():
    assert formats.parse("rot8,chan4/rot4,") == ["rot8", "chan4/rot4"]
    assert formats.parse("float16,fp8/float8_e4m3fn,bf16/bf16") == ["fp16", "fp8_e4m3", "bf16"]
    assert formats.parse("rot8/") == ["rot8"]
    for wrong, said in (("rot9", "rot9"), ("chan4", "chan4/rot4")):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            formats.parse(wrong)
    bits = {"int8_static": 8, "chan4/rot4": 4, "rot8/rot4": None, "bf16": None}
    assert {name: formats.quantized_bits(name) for name in bits} == bits
    assert set(formats.DEFAULT_FORMATS) == set(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_that_is_not_installed_says_so(name, monkeypatch):
    packages = ("threadpoolctl", "torch", "onnx", "onnxruntime", "openvino")
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    for module in [module for module in sys.modules if module.startswith("bench.peers.")]:
        monkeypatch.delitem(sys.modules, module)
    present, absent = load_peers([name])
    assert not present and "is not installed: pip install" in absent[name]


@pytest.mark.parametrize("case", SMALL[:4], ids=lambda case: case.name)
def test_reference_is_attention_by_the_formula(case):
    data = Data.random(case, seed=3)
    starts = case.query_starts
    exact = np.concatenate(
        [
            attention_oracle.attention(data.q[starts[s] : starts[s + 1]], k, v).out
            for s, (k, v) in enumerate(zip(data.k, data.v, strict=True))
        ]
    )
    reference = Reference(case, data)
    assert reference.error(exact) < 1e-12
    exact[-1, 0] *= 1.5
    assert reference.error(exact) > 1e-3


def test_shared_tokens_are_stored_and_counted_once(roof, settings):
    case = Case(
        "shared", "decode", (149, 149, 163), (1,) * 3, num_heads=4, num_kv_heads=2, head_dim=16,
        shared=130,
    )  # fmt: skip
    assert case.touched_tokens == 130 + 20 + 20 + 34
    assert case.flops == replace(case, shared=0).flops
    data = Data.random(case)
    assert all(np.array_equal(rows[:130], data.k[0][:130]) for rows in data.k)
    assert not np.array_equal(data.k[1][130:], data.k[0][130:])
    result = run_case(case, "fp32", {}, roof, settings)
    rows = {row.peer: row for row in result.rows}
    assert rows.keys() == {"kvcore", "kvcore-private", "roof"}
    assert rows["kvcore"].error == rows["kvcore-private"].error < 1e-6
    limits = Limits(1, read_gbs=10.0, l2_gbs=2.5 * rows["roof"].gbs, fma_gflops=1.0)
    gain = rows["kvcore-private"].times_kvcore
    line = report.case_lines(case, "fp32", result, limits)[-1]
    assert f"3 sequences that share gain {gain:.2f}x, " in line and "of the 2.50x" in line


def test_the_best_peer_is_the_fastest_one():
    def row(peer, times_kvcore, share, **changes):
        row = Row("c", "decode", "fp16", peer, 1, 1, 1, 1, None, None, 1, "slow", share,
                  times_kvcore, None, 9, 0, False, 2)  # fmt: skip
        return replace(row, **changes)

    rows = [row("kvcore", 1, 0.8), row("kvcore-private", 0.5, 0.9), row("a", 3.0, 0.2)]
    rows += [row("b", 2.5, 0.3, contended=True), row("roof", 0.8, 1.0)]
    (line,) = report.best_peer_lines(rows)[2:]
    assert line.split() == ["c", "fp16", "slow", "80.0%", "b", "30.0%", "2.50", "contended"]
    assert report.best_peer_lines([rows[0], rows[-1]]) == []
    bf16 = row("kvcore-bf16", 1.5, 0.4)
    (line,) = report.best_peer_lines([*rows, bf16])[2:]
    assert line.split()[-3:] == ["2.50", "1.50", "contended"]
    (line,) = report.best_peer_lines([rows[0], bf16])[2:]
    assert line.split() == ["c", "fp16", "slow", "80.0%", "1.50"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be pinned here")
@pytest.mark.skipif(len(affinity()) < 2, reason="one CPU")
def test_a_task_that_is_not_pinned_may_run_anywhere():
    seen = []

    class Looking(Task):
        def __init__(self, pinned):
            self.pinned = pinned

        def run(self):
            seen.append((self.pinned, len(os.sched_getaffinity(0))))

    with Pinning(2) as pinning:
        tasks = {"a": Looking(True), "b": Looking(False)}
        measure(tasks, pinning, seconds=0.0, min_rounds=2, max_rounds=2)
    assert set(seen) == {(True, 1), (False, len(affinity()))}
    assert os.sched_getaffinity(0) == set(affinity())


class Wrong(Task):
    def run(self):
        pass

    def output(self):
        return np.zeros((1, 6, 16), np.float32)


WRONG_CASE = Case("one", "decode", (40,), (1,), num_heads=6, num_kv_heads=2, head_dim=16)


def test_a_peer_with_a_wrong_answer_takes_no_part(roof, settings):
    result = run_case(WRONG_CASE, "fp32", {"p": Peer(lambda _: {"p": Wrong()})}, roof, settings)
    assert result.absent["p"].startswith("its answer is wrong by 1.0e+00")
    assert {row.peer for row in result.rows} == {"kvcore", "roof"}
    table = report.case_lines(WRONG_CASE, "fp32", result, Limits(1, 1.0, 1.0, 1.0))
    assert any("without p: its answer is wrong" in line for line in table)


def test_a_wrong_answer_of_kvcore_is_an_error(roof, settings, monkeypatch):
    monkeypatch.setattr(suite.kvcore_peer, "prepare", lambda *_: {"kvcore": Wrong()})
    with pytest.raises(RuntimeError, match="kvcore, one fp32: its answer is wrong"):
        run_case(WRONG_CASE, "fp32", {}, roof, settings)


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


def test_settling_waits_for_threads_that_spin():
    stop = time.perf_counter() + 0.08

    def spin():
        while time.perf_counter() < stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    settle()
    assert time.perf_counter() >= stop
    thread.join()
    start = time.perf_counter()
    settle()
    assert time.perf_counter() - start < MAX_SETTLE_SECONDS / 2


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
    command += ["--cases", "decode-smollm2,append-1", "--formats", "fp16,chan4/rot4"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    content = json.loads(path.read_text())
    assert [(row["case"], row["peer"]) for row in content["rows"]] == [
        *[("decode-smollm2", peer) for peer in ("kvcore", "numpy", "roof")],
        *[("decode-smollm2", peer) for peer in ("kvcore", "kvcore-bf16", "roof")],
        *[("append-1", peer) for peer in ("kvcore", "numpy", "roof")],
        *[("append-1", peer) for peer in ("kvcore", "roof")],
    ]
    assert content["hardware"]["isa"] == kvcore.get_isa()
    assert content["hardware"]["versions"]["kvcore"] == kvcore.__version__
    assert all(x["read_gbs"] > 0 and x["fma_gflops"] > 0 for x in content["limits"])
    assert len(content["control"]) == 14
    assert all(min(cost["python_us"], cost["c_us"]) > 0 for cost in content["control"])
    for name in ("decode-smollm2, chan4/rot4", "append-1, fp16", "256 sequences of 131072"):
        assert name in result.stdout


def test_command_refuses_unknown_names():
    command = [sys.executable, "-m", "bench", "--cases", "decode-4k,nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 2 and "nonsense" in result.stderr


def test_a_fit_explains_what_it_can():
    tokens = [512, 1024, 4096, 16384]
    coefficients, r_squared = curves.fit(tokens, [3 + 0.5 * n for n in tokens], 1)
    assert np.allclose(coefficients, [3, 0.5]) and math.isclose(r_squared, 1.0)
    coefficients, r_squared = curves.fit(tokens, [7 + n + 2 * n * n for n in tokens], 2)
    assert np.allclose(coefficients, [7, 1, 2]) and math.isclose(r_squared, 1.0)
    assert curves.fit(tokens, [7 + n + 2 * n * n for n in tokens], 1)[1] < 0.99


def test_curves_are_measured_and_drawn(roof, settings, tmp_path):
    pytest.importorskip("matplotlib")
    from bench import drawing

    measured = [
        curves.measure_curve("decode", kv_format, [64, 128, 256], roof, settings)
        for kv_format in ("fp32", "bf16")
    ]
    for curve, width in zip(measured, (4, 2), strict=True):
        assert [point.tokens for point in curve.points] == [64, 128, 256]
        for point in curve.points:
            nbytes = point.tokens * 8 * 128 * 2 * width
            assert math.isclose(point.floor_ms * curve.limit * 1e6, nbytes)
            assert point.ms > 0
        assert "of degree 1" in curves.lines(curve)[0]
    path = drawing.draw(measured, {"cpu": "a CPU", "isa": "scalar"}, 1, tmp_path / "decode.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_profile_compares_memory_with_the_caches(settings):
    measured = Profile(settings)
    cells = [cell.strip() for cell in measured.line(SMALL[1], "fp16").strip("|").split("|")]
    assert cells[:3] == ["even", "fp16", "0.0717 MB"]
    assert len(cells) == HEADER.split("\n")[0].count("|") - 1
    floor, from_l2, reached = map(float, cells[3:6])
    assert floor > 0 and reached > 0 and math.isfinite(from_l2)
    _, _, _, work, _, from_l2, *_ = measured.line(SMALL[3], "fp32").split("|")
    assert (work.strip(), from_l2.strip()) == (f"{SMALL[3].flops / 1e9:.3g} GFLOP", "")
