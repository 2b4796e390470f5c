"""The parts of bench.gpu_report that need no GPU, and the others over stand-ins."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bench import gpu_report
from bench.cases import Case, decode
from bench.gpu import graphs, kvcore_tasks, parts, peers, table, targets
from bench.gpu import model as language
from bench.gpu.kvcore_tasks import CacheTask
from bench.gpu.targets import Target

import kvcore
from byte_model import make_model
from kvcore import backend as registry
from kvcore.cpu_backend import CpuBackend

ROOT = Path(__file__).parents[1]
SMALL = Target(decode("small", [90, 90, 90], num_heads=4, num_kv_heads=2, head_dim=64), "bf16")


class TestTargets:
    def test_bytes_of_a_decode_are_what_it_reads(self):
        target = next(t for t in targets.ALL if t.name == "decode-64x8k bf16")
        assert target.nbytes == 64 * 8192 * 8 * 128 * 2 * 2

    def test_an_append_reads_its_input_too(self):
        target = next(t for t in targets.ALL if t.name == "append-8k bf16")
        assert target.nbytes == 2 * 8192 * 8 * 128 * 2 * 2

    def test_quantized_rows_are_fewer_bytes(self):
        sizes = {t.kv_format: t.nbytes for t in targets.DECODE if t.case.name == "decode-64x8k"}
        assert sizes["rot4"] < sizes["rot8"] < sizes["bf16"]

    def test_flops_of_a_causal_prefill(self):
        target = targets.PREFILL[0]
        assert target.case.flops == 4 * 32 * 128 * 8192 * 8193 // 2

    def test_layers_go_beyond_the_cache(self):
        for target in targets.ALL:
            layers = target.layers_beyond(50 << 20)
            assert layers * target.nbytes >= 8 * (50 << 20)
            assert layers == 1 or (layers - 1) * target.nbytes < 8 * (50 << 20)

    def test_small_ones_take_the_same_kernels(self):
        for target in targets.ALL:
            small = targets.small(target)
            case = small.case
            assert len(case.new) == 1 and sum(case.seq_lens) <= 512
            assert (case.new == (1,)) == (case.kind == "decode")
            assert small.kv_format == target.kv_format and case.num_heads == target.case.num_heads

    def test_names_differ_and_quick_ones_exist(self):
        names = [target.name for target in targets.ALL]
        assert len(set(names)) == len(names) and set(targets.QUICK) < set(names)
        quick = [t.name for kind in ("decode", "prefill", "append")
                 for t in targets.of_kind(kind, quick=True)]  # fmt: skip
        assert quick == list(targets.QUICK)

    def test_peers_are_asked_for_what_they_have(self):
        comparable = {t.name for t in targets.ALL if peers.is_comparable(t)}
        assert "decode-64x8k bf16" in comparable and "prefill-8k fp16" in comparable
        assert not {"decode-64x8k rot8", "prefill-chunk bf16", "append-8k bf16"} & comparable


def timing(who, name, seconds):
    return {"part": "decode", "kind": "timing", "who": who, "name": name, "seconds": seconds}


COPY = {"part": "roof", "kind": "copy", "bytes_per_second": 2e12}
MATMUL = {"part": "roof", "kind": "matmul", "flops_per_second": 6e14}


class TestTable:
    def test_shares_aims_and_peers(self):
        target = targets.DECODE[0]
        own = target.nbytes / 1.9e12  # 95 % of the copy
        records = [
            COPY, timing("kvcore", target.name, own),
            timing("torch-flash", target.name, 2 * own), timing("flashinfer", target.name, own / 2),
        ]  # fmt: skip
        (line,) = table.lines_of(records)
        assert line.share == pytest.approx(0.95) and line.passes
        assert line.peer == "flashinfer" and line.ratio == pytest.approx(0.5)
        text = "\n".join(table.render(records))
        assert "95.0%" in text and " met" in text and "copy: 2000 GB/s" in text

    def test_what_misses_its_aim(self):
        target = targets.DECODE[0]
        records = [COPY, timing("kvcore", target.name, target.nbytes / 1.7e12)]
        (line,) = table.lines_of(records)
        assert line.passes is False
        assert "MISSED" in "\n".join(table.render(records))

    def test_a_prefill_is_held_against_its_flops(self):
        target = targets.PREFILL[0]
        records = [MATMUL, timing("kvcore", target.name, target.case.flops / 3.3e14)]
        (line,) = table.lines_of(records)
        assert line.passes and line.share is None
        assert "55.0%" in "\n".join(table.render(records))

    def test_without_a_roof_nothing_is_claimed(self):
        (line,) = table.lines_of([timing("kvcore", targets.DECODE[0].name, 1.0)])
        assert line.share is None and line.passes is None

    def test_a_model_is_held_against_the_cpu(self):
        tie = {"position": 3, "chosen": 17, "other": 5, "margin": 0.0004}
        found = {"kind": "agreement", "model": "m", "format": "fp32", "tokens": 8, "aim": 1e-3,
                 "largest": 2e-5, "ties": []}  # fmt: skip
        close, off = "\n".join(table.render([found])), {**found, "largest": 0.02, "ties": [tie]}
        assert "within 2e-05 of the CPU's (aim 0.001, met); 0 of 8 greedy tokens differ" in close
        text = "\n".join(table.render([off, {**off, "format": "bf16", "aim": None}]))
        assert "(aim 0.001, MISSED)" in text and "within 0.02 of the CPU's; 1 of 8" in text
        assert "at near ties (3: 17 or 5, 0.0004)" in text

    def test_failures_are_told(self):
        records = [
            {"part": "parity", "kind": "parity", "case": "ops/x", "passed": False,
             "message": "boom"},
            {"part": "decode", "kind": "failed", "name": "decode-1x32k bf16", "reason": "no"},
            {"part": "sanitizer", "kind": "sanitizer", "tool": "memcheck", "clean": False,
             "reason": "9 errors"},
        ]  # fmt: skip
        text = "\n".join(table.render(records))
        assert "parity: 0 of 1 cases passed" in text and "FAILED ops/x: boom" in text
        assert "failed: decode: decode-1x32k bf16: no" in text
        assert "compute-sanitizer memcheck: 9 errors" in text
        assert not table.passed(records)

    def test_what_passes(self):
        good = {"part": "parity", "kind": "parity", "case": "ops/x", "passed": True, "message": ""}
        peer = {"part": "flashinfer", "kind": "failed", "reason": "not installed"}
        assert table.passed([good, peer])
        assert not table.passed([peer])
        assert not table.passed([good, {"part": "decode", "kind": "failed", "reason": "no"}])


class TestCommand:
    def test_all_that_is_not_a_peers_fits_whatever_it_takes(self):
        own = [s for name, s in gpu_report.LIMITS.items() if name not in peers.PEERS]
        assert sum(s + gpu_report.GRACE_SECONDS for s in own) < gpu_report.SECONDS < 600
        assert list(gpu_report.LIMITS)[-len(peers.PEERS) :] == list(peers.PEERS)

    def test_every_limit_is_a_parts(self):
        assert {*parts.PARTS, "sanitizer"} == set(gpu_report.LIMITS)

    def test_what_does_not_fit_any_more_is_left_out(self, monkeypatch, tmp_path):
        given = []

        def run(name, seconds, quick):
            given.append((name, seconds))
            monkeypatch.setattr(gpu_report.time, "monotonic", lambda: clock() + 300 * len(given))
            return [{"part": name, "kind": "skipped", "reason": "x"}]

        clock = time.monotonic
        monkeypatch.setattr(gpu_report, "build", lambda: None)
        monkeypatch.setattr(gpu_report, "unavailable", lambda: None)
        monkeypatch.setattr(gpu_report, "run_part", run)
        file = tmp_path / "x.json"
        gpu_report.main(["--json", str(file), "--parts", "device,decode,prefill"])
        (_, first), (_, second), (_, third) = given
        assert first == gpu_report.LIMITS["device"] and second == gpu_report.LIMITS["decode"]
        assert third < 0
        assert len(json.loads(file.read_text())["records"]) == 3

    def test_without_time_a_part_does_not_begin(self):
        (record,) = gpu_report.run_part("decode", 1.0, quick=True)
        assert (record["kind"], record["reason"]) == ("skipped", "out of time")

    def test_what_was_found_is_written_before_the_next_part(self, monkeypatch, tmp_path):
        def run(name, seconds, quick):
            if name == "prefill":
                raise KeyboardInterrupt
            return [{"part": name, "kind": "copy"}]

        monkeypatch.setattr(gpu_report, "build", lambda: None)
        monkeypatch.setattr(gpu_report, "unavailable", lambda: None)
        monkeypatch.setattr(gpu_report, "run_part", run)
        file = tmp_path / "x.json"
        with pytest.raises(KeyboardInterrupt):
            gpu_report.main(["--json", str(file), "--parts", "roof,prefill"])
        assert json.loads(file.read_text())["records"] == [{"part": "roof", "kind": "copy"}]

    @pytest.mark.skipif("cuda" in kvcore.available_backends(), reason="there is a device")
    @pytest.mark.parametrize("command", [["-m", "bench.gpu_report"], ["bench/gpu_report.py"]])
    def test_without_a_device_it_says_so(self, command):
        done = subprocess.run(
            [sys.executable, *command, "--quick"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.startswith("no report: ") and "cuda" in done.stderr.lower()
        assert "Traceback" not in done.stderr and not done.stdout

    def test_what_a_dying_part_had_found_is_kept(self, monkeypatch):
        script = (
            "import sys, pathlib, os; f = sys.argv[sys.argv.index('--to') + 1];"
            'pathlib.Path(f).write_text(\'{"kind": "copy", "x": 1}\\n{"kind": "mat\'); os.abort()'
        )
        finish = gpu_report.finish

        def dying(command, seconds):
            return finish([command[0], "-c", script, *command[3:]], seconds)

        monkeypatch.setattr(gpu_report, "finish", dying)
        records = gpu_report.run_part("roof", 20, quick=True)
        assert records[0] == {"part": "roof", "kind": "copy", "x": 1}
        assert records[1]["kind"] == "failed" and len(records) == 2

    def test_a_part_that_hangs_is_stopped(self):
        child = "import time; time.sleep(60)"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        begin = time.monotonic()
        script = f"print('so far', flush=True); {parent}"
        done = gpu_report.finish([sys.executable, "-c", script], 2)
        assert done.reason == "stopped after 2 s" and time.monotonic() - begin < 20
        assert done.code is None and done.log == ["so far"]

    def test_the_file_is_named_for_the_device(self, tmp_path):
        record = {"part": "device", "kind": "device", "name": "NVIDIA H100 80GB HBM3"}
        assert gpu_report.file_name([record]).endswith("-nvidia-h100-80gb-hbm3.json")
        path = tmp_path / "results" / "x.json"
        gpu_report.write(path, [record], quick=True, seconds=1.25)
        written = json.loads(path.read_text())
        assert written == {"quick": True, "seconds": 1.2, "records": [record]}

    def test_a_missing_sanitizer_is_skipped(self, monkeypatch):
        monkeypatch.setattr(gpu_report.shutil, "which", lambda *_args, **_options: None)
        (record,) = gpu_report.sanitize(10)
        assert record["kind"] == "skipped"

    @pytest.mark.parametrize(
        ("script", "kind", "clean"),
        [
            ("exit 0", "sanitizer", True),
            ("echo '========= ERROR SUMMARY: 2 errors'; exit 9", "sanitizer", False),
            ("echo 'Device not supported' >&2; exit 255", "skipped", None),
        ],
    )
    def test_what_a_sanitizer_says(self, tmp_path, script, kind, clean):
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        record = gpu_report.sanitize_by(str(program), "memcheck", 20)
        assert (record["kind"], record.get("clean")) == (kind, clean)
        if clean is not True:
            assert record["reason"] and record["reason"] in record["log"]
        assert record["reason"] in "\n".join(table.render([record]))


# ---- the parts, with the CPU's backend for the GPU's and a stand-in for CuPy


class Stream:
    graph_runs = 0

    def __init__(self, non_blocking=False):
        self.captured = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def synchronize(self):
        assert self.captured is None, "a capture must not wait"

    def begin_capture(self):
        self.captured = SimpleNamespace(launch=lambda stream: None)

    def end_capture(self):
        graph, self.captured = self.captured, None
        return graph


class Event:
    def record(self, stream=None):
        self.time = time.perf_counter()


@pytest.fixture
def cupy(monkeypatch):
    """NumPy with those of CuPy's functions that the parts use."""
    stream = Stream()
    properties = {"l2CacheSize": 100, "name": b"Stand-in", "major": 9, "minor": 0,
                  "multiProcessorCount": 1, "totalGlobalMem": 1 << 30}  # fmt: skip
    runtime = SimpleNamespace(
        getDevice=lambda: 0, getDeviceProperties=lambda number: properties,
        driverGetVersion=lambda: 1, runtimeGetVersion=lambda: 1,
    )  # fmt: skip
    cuda = SimpleNamespace(
        Stream=lambda non_blocking: stream, get_current_stream=lambda: stream, Event=Event,
        get_elapsed_time=lambda a, b: 1e3 * max(b.time - a.time, 1e-9), runtime=runtime,
    )  # fmt: skip
    names = ("asarray", "empty_like", "copyto")
    module = SimpleNamespace(cuda=cuda, __version__="0", **{n: getattr(np, n) for n in names})

    def matmul(a, b, out):  # as CuPy has it, which calls no cuBLAS in a capture
        if stream.captured is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is unsupported")
        return np.matmul(a, b, out=out)

    module.matmul = matmul
    monkeypatch.setitem(sys.modules, "cupy", module)
    backend = CpuBackend()
    backend.name = "cuda"
    monkeypatch.setitem(registry._loaded, "cuda", backend)
    monkeypatch.setattr(targets, "QUICK", ("small bf16", "small rot4", "p fp16", "a chan4/rot4"))
    monkeypatch.setattr(targets, "ALL", (
        SMALL,
        Target(SMALL.case, "rot4", share=0.5),
        Target(Case("p", "prefill", (40,), (30,), 4, 2, 64), "fp16", tflops=1),
        Target(Case("a", "append", (0,), (64,), 4, 2, 64), "chan4/rot4", share=0.5),
    ))  # fmt: skip
    monkeypatch.setattr(kvcore_tasks, "RANDOM_VALUES", 1 << 10)
    monkeypatch.setattr(parts, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(parts, "MATMUL_SIZE", 16)
    return module


@pytest.mark.parametrize(
    "name", ["device", "compile", "roof", "decode", "prefill", "append", "overhead"]
)
def test_a_part_runs(cupy, tmp_path, name):
    file = tmp_path / "records"
    parts.PARTS[name](parts.Part(file, 60, quick=True))
    lines = file.read_text().splitlines() if file.exists() else []
    records = [{"part": name, **r} for r in gpu_report.parsed(lines)]
    assert not [record for record in records if record["kind"] in ("failed", "skipped")]
    expected = {"compile": 0, "decode": 2, "prefill": 1, "append": 1, "roof": 2}.get(name, 1)
    assert len(records) == expected
    assert all(record.get("seconds", 1) > 0 for record in records)
    table.render(records)


def test_parity_is_a_part(cupy, tmp_path, monkeypatch):
    from kvcore import parity

    chosen = parity.select_cases(["decode/fp16"])
    monkeypatch.setattr(parity, "select_cases", lambda select: chosen)
    file = tmp_path / "records"
    parts.parity(parts.Part(file, 60, quick=True))
    (record,) = gpu_report.parsed(file.read_text().splitlines())
    assert record["kind"] == "parity" and record["passed"] and record["case"] == "decode/fp16"


def test_errors_that_are_no_numbers_are_no_json():
    record = {"case": "x", "worst": float("nan"), "seconds": float("inf"), "passed": False, "n": 1}
    assert parts._finite(record) == {**record, "worst": None, "seconds": None}


def test_a_model_is_a_part(cupy, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "load", lambda _name, **place: make_model(head_dim=64, **place))
    file = tmp_path / "records"
    parts.model(parts.Part(file, 60, quick=False))
    records = gpu_report.parsed(file.read_text().splitlines())
    assert [record["kind"] for record in records] == ["agreement"] * 4 + ["generation"] * 2
    assert all(r["largest"] == 0 and not r["ties"] for r in records[:4])  # the same device twice
    assert all(r["decode_tokens_per_second"] > 0 for r in records[4:])
    table.render([{"part": "model", **record} for record in records])


def test_a_model_that_is_not_installed_is_skipped(cupy, tmp_path, monkeypatch):
    def load(_name, **_place):
        raise kvcore.MissingExtra("pip install it")

    monkeypatch.setattr(language, "load", load)
    file = tmp_path / "records"
    parts.model(parts.Part(file, 60, quick=True))
    (record,) = gpu_report.parsed(file.read_text().splitlines())
    assert (record["kind"], record["reason"]) == ("skipped", "pip install it")


def test_a_peer_that_is_not_installed_is_skipped_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    file = tmp_path / "records"
    parts.PARTS["flashinfer"](parts.Part(file, 60, quick=True))
    (record,) = gpu_report.parsed(file.read_text().splitlines())
    assert record["kind"] == "skipped" and "flashinfer" in record["reason"]


def test_processes_share_the_work(tmp_path):
    shares = [parts.Part(tmp_path / "x", 1, True, i, 3).own(range(10)) for i in range(3)]
    assert sorted(n for share in shares for n in share) == list(range(10))


def test_time_that_is_over_and_errors_leave_the_rest(tmp_path):
    file = tmp_path / "records"
    part = parts.Part(file, 60, quick=True)

    def attempt(target):
        if target is targets.ALL[0]:
            raise RuntimeError("boom\nand more")

    part.each(targets.ALL[:2], attempt)
    parts.Part(file, -1, quick=True).each(targets.ALL[2:3], attempt)
    first, second = gpu_report.parsed(file.read_text().splitlines())
    assert first == {"kind": "failed", "name": targets.ALL[0].name, "reason": "RuntimeError: boom"}
    assert second["kind"] == "skipped"


def test_a_task_computes_what_its_case_says(cupy):
    task = CacheTask(SMALL, 2, np)
    assert [len(sequence) for sequence in task._sequences] == [89, 89, 89]
    with task.step() as step:
        task.prepare(step)
        task.attend(step)
        out = task.rows(3, 4, 1)
        expected = step.attend(1, task.rows(3, 4))
        assert np.array_equal(out.view(np.uint16), expected.view(np.uint16))
    assert task.cache.stats().in_use == 6  # two blocks each, and the step is undone
    with task.step() as step:
        task.append(step)


def test_a_summary_is_of_one_call():
    found = graphs.summary([4.0, 2.0, 6.0], 2)
    assert found == {"seconds": 2.0, "best": 1.0, "worst": 3.0, "replays": 3}
