"""python -m bench.gpu_report: all that a machine with a GPU can tell, in under nine minutes.

Builds what is not built; runs the parity suite on the device, and a part of it under
compute-sanitizer where that is found; measures copies and matrix products; times decode, prefill
and append by replays of CUDA graphs over more memory than the second level cache holds; and the
same in PyTorch and FlashInfer where these are installed. Writes JSON under bench/results and a
table. Each part is a process of its own, so that what fails does not take the rest with it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
#: Seconds that each part may take, in order; together under nine minutes. A part gets some seconds
#: more to end by itself.
LIMITS = {
    "device": 15,
    "compile": 60,
    "roof": 15,
    "decode": 45,
    "prefill": 25,
    "append": 20,
    "overhead": 15,
    "model": 18,
    "parity": 80,
    "torch-flash": 20,
    "torch-flash-rows": 15,
    "torch-cudnn": 20,
    "torch-cudnn-rows": 15,
    "torch-flex": 25,
    "flashinfer": 25,
}
#: Parts that compile many kernels, which several processes do at once.
SHARED_OUT = ("compile", "parity")
MOST_PROCESSES = 8
SANITIZER_SECONDS = 25
GRACE_SECONDS = 5
TOOLS = ("memcheck", "racecheck")
SANITIZED = ("decode/bf16", "prefill/bf16", "append/rot4")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases; do not quote them")
    parser.add_argument("--parts", help=f"comma-separated, of {','.join([*LIMITS, 'sanitizer'])}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in bench/results")
    given = parser.parse_args(argv)
    parts = given.parts.split(",") if given.parts else [*LIMITS, "sanitizer"]
    unknown = set(parts) - {*LIMITS, "sanitizer"}
    if unknown:
        parser.error(f"--parts: unknown: {', '.join(sorted(unknown))}")
    reason = build() or unavailable()
    if reason is not None:
        print(f"no report: {reason}", file=sys.stderr)
        return 1
    begin = time.monotonic()
    records: list[dict[str, Any]] = []
    for name in parts:
        print(f"{name} ...", flush=True)
        records += sanitize() if name == "sanitizer" else run_part(name, given.quick)
    from bench.gpu import table

    print("\n".join(["", *table.render(records)]))
    if given.quick:
        print("quick: few cases and replays; do not quote these")
    path = given.json or RESULTS / file_name(records)
    write(path, records, given.quick, time.monotonic() - begin)
    print(f"written: {path}")
    return 0 if table.passed(records) else 1


def build() -> str | None:
    """Builds the extensions in place where they are missing; the reason why that failed."""
    probe = [sys.executable, "-c", "import kvcore"]
    if subprocess.run(probe, cwd=ROOT, env=environment(), capture_output=True).returncode == 0:
        return None
    print("building", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"kvcore cannot be built: {last_line(done.stderr)}"
    return None


def unavailable() -> str | None:
    """Why there is no device; None where there is one."""
    code = "import kvcore; kvcore.get_backend('cuda')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    return last_line(done.stderr).removeprefix("kvcore.errors.BackendUnavailable: ")


def run_part(name: str, quick: bool) -> list[dict[str, Any]]:
    """What a part found, however it ended."""
    processes = 1
    if name in SHARED_OUT:
        processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(processes) as pool:
        shares = pool.map(lambda i: run_share(name, quick, i, processes), range(processes))
        return [record for share in shares for record in share]


def run_share(name: str, quick: bool, share: int, shares: int) -> list[dict[str, Any]]:
    """What one of the processes of a part found."""
    limit = LIMITS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        command = [sys.executable, "-m", "bench.gpu.parts", name, "--to", str(file)]
        command += ["--seconds", str(limit), "--share", str(share), "--shares", str(shares)]
        reason = finish(command + ["--quick"] * quick, limit + GRACE_SECONDS)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [{"part": name, **record} for record in parsed(lines)]
    if reason is not None:
        records.append({"part": name, "kind": "failed", "reason": reason})
    return records


def parsed(lines: Sequence[str]) -> list[dict[str, Any]]:
    """JSON lines; one that a dying process left unfinished is dropped."""
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def sanitize() -> list[dict[str, Any]]:
    """Some cases of the parity suite under compute-sanitizer's tools."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:"
                           "/usr/local/cuda/bin")  # fmt: skip
    if program is None:
        reason = "compute-sanitizer was not found"
        return [{"part": "sanitizer", "kind": "skipped", "reason": reason}]
    records = []
    for tool in TOOLS:
        code = (
            "from kvcore import parity; import sys; "
            f"found = parity.run('cuda', select={list(SANITIZED)!r}); "
            "sys.exit(not all(result.passed for result in found))"
        )
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
        reason = finish(command, SANITIZER_SECONDS)
        records.append({
            "part": "sanitizer", "kind": "sanitizer", "tool": tool, "clean": reason is None,
            "reason": reason or "",
        })  # fmt: skip
    return records


def finish(command: Sequence[str], seconds: float) -> str | None:
    """Runs a command to its end; what went wrong."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), timeout=seconds, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    except OSError as error:
        return str(error)
    if done.returncode:
        return last_line(done.stderr or done.stdout) or f"exit code {done.returncode}"
    return None


def environment() -> dict[str, str]:
    """This process's, in which kvcore and bench are found in this folder."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:400] if lines else ""


def file_name(records: Sequence[dict[str, Any]]) -> str:
    """The day, and the device's name."""
    names = [record["name"] for record in records if record["kind"] == "device"]
    device = re.sub(r"[^a-z0-9]+", "-", (names[0] if names else "gpu").lower()).strip("-")
    return f"{time.strftime('%Y%m%d')}-{device}.json"


def write(path: Path, records: Sequence[dict[str, Any]], quick: bool, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"quick": quick, "seconds": round(seconds, 1), "records": list(records)}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # found as a script too
    sys.exit(main(sys.argv[1:]))
