"""python -m bench.gpu_report: all that a machine with a GPU can tell, in under ten minutes.

Builds what is not built; runs the parity suite on the device, and a part of it under
compute-sanitizer where that is found; measures copies and matrix products; times decode, prefill
and append by replays of CUDA graphs over more memory than the second level cache holds; and the
same in PyTorch and FlashInfer where these are installed. Writes JSON under bench/results and a
table. Each part is a process of its own, so that what fails does not take the rest with it, and the
JSON is written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
#: Seconds that each part may take, in order; the first on a machine import from a cold disk. A part
#: gets some seconds more to end by itself.
LIMITS = {
    "device": 40,
    "compile": 60,
    "roof": 20,
    "parity": 120,
    "decode": 60,
    "prefill": 30,
    "append": 25,
    "overhead": 15,
    "model": 18,
    "sanitizer": 105,
    "torch-flash": 45,
    "torch-flash-rows": 20,
    "torch-cudnn": 25,
    "torch-cudnn-rows": 20,
    "torch-flex": 60,
    "flashinfer": 60,
}
#: Of all parts together, the building too: what does not fit any more is left out.
SECONDS = 560
#: Parts that compile many kernels, which several processes do at once.
SHARED_OUT = ("compile", "parity")
MOST_PROCESSES = 14
GRACE_SECONDS = 5
#: compute-sanitizer's tools. CuPy asks the driver things that it may refuse, which is no fault.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "synccheck": ()}
SANITIZED = ("decode/bf16", "prefill/bf16", "append/rot4")
#: What compute-sanitizer exits with where it found something.
FOUND = 9
LOG_LINES = 30


def main(argv: Sequence[str]) -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases; do not quote them")
    parser.add_argument("--parts", help=f"comma-separated, of {','.join(LIMITS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in bench/results")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="that it may take (default: %(default)s)"
    )
    given = parser.parse_args(argv)
    parts = given.parts.split(",") if given.parts else list(LIMITS)
    unknown = set(parts) - set(LIMITS)
    if unknown:
        parser.error(f"--parts: unknown: {', '.join(sorted(unknown))}")
    reason = build() or unavailable()
    if reason is not None:
        print(f"no report: {reason}", file=sys.stderr)
        return 1
    from bench.gpu import table

    records: list[dict[str, Any]] = []
    for name in parts:
        left = begin + given.seconds - time.monotonic() - GRACE_SECONDS
        print(f"{time.monotonic() - begin:4.0f} s: {name}", flush=True)
        records += run_part(name, min(LIMITS[name], left), given.quick)
        path = given.json or RESULTS / file_name(records)
        write(path, records, given.quick, time.monotonic() - begin)
    print("\n".join(["", *table.render(records)]))
    if given.quick:
        print("quick: few cases and replays; do not quote these")
    print(f"written: {path}")
    return 0 if table.passed(records) else 1


def build() -> str | None:
    """Builds the extensions in place, as far as they are missing or old; the reason why that failed
    and there are none."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    probe = [sys.executable, "-c", "import kvcore"]
    if subprocess.run(probe, cwd=ROOT, env=environment(), capture_output=True).returncode == 0:
        return None
    return "\n".join(["kvcore cannot be built:", *end_of(done.stdout + done.stderr)])


def unavailable() -> str | None:
    """Why there is no device; None where there is one."""
    code = (
        "import kvcore, sys\n"
        "try: kvcore.get_backend('cuda')\n"
        "except kvcore.BackendUnavailable as error: sys.exit(str(error))"
    )
    done = finish([sys.executable, "-c", code], LIMITS["device"])
    if not done.reason:
        return None
    return "\n".join(done.log) or done.reason


def run_part(name: str, seconds: float, quick: bool) -> list[dict[str, Any]]:
    """What a part found, however it ended."""
    if seconds < GRACE_SECONDS:
        return [{"part": name, "kind": "skipped", "reason": "out of time"}]
    if name == "sanitizer":
        return sanitize(seconds)
    processes = 1
    if name in SHARED_OUT:
        processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
    with ThreadPoolExecutor(processes) as pool:
        shares = pool.map(
            lambda share: run_share(name, seconds, quick, share, processes), range(processes)
        )
        return [record for found in shares for record in found]


def run_share(
    name: str, seconds: float, quick: bool, share: int, shares: int
) -> list[dict[str, Any]]:
    """What one of the processes of a part found."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        command = [sys.executable, "-m", "bench.gpu.parts", name, "--to", str(file)]
        command += ["--seconds", str(seconds), "--share", str(share), "--shares", str(shares)]
        done = finish(command + ["--quick"] * quick, seconds + GRACE_SECONDS)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [{"part": name, **record} for record in parsed(lines)]
    if done.reason:
        records.append({"part": name, "kind": "failed", "reason": done.reason, "log": done.log})
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


def sanitize(seconds: float) -> list[dict[str, Any]]:
    """Some cases of the parity suite under compute-sanitizer's tools."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:"
                           "/usr/local/cuda/bin")  # fmt: skip
    if program is None:
        reason = "compute-sanitizer was not found"
        return [{"part": "sanitizer", "kind": "skipped", "reason": reason}]
    return [sanitize_by(program, tool, seconds / len(TOOLS)) for tool in TOOLS]


def sanitize_by(program: str, tool: str, seconds: float) -> dict[str, Any]:
    """What one tool says. A tool that does not get to the end says nothing, as where it refuses the
    device."""
    code = (
        "from kvcore import parity; import sys; "
        f"found = parity.run('cuda', select={list(SANITIZED)!r}); "
        "print(*[result.message for result in found if not result.passed], file=sys.stderr); "
        "sys.exit(not all(result.passed for result in found))"
    )
    command = [program, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-c", code]
    done = finish(command, seconds)
    record = {"part": "sanitizer", "tool": tool, "name": tool, "reason": done.reason}
    if done.reason:
        record["log"] = done.log
    if done.code not in (0, FOUND):
        return {**record, "kind": "skipped"}
    return {**record, "kind": "sanitizer", "clean": done.code == 0}


@dataclass(frozen=True)
class Finished:
    """How a command ended.

    Attributes:
        code: its exit code; None where it was stopped or did not start.
        reason: what went wrong, in a line; empty where nothing did.
        log: the end of what it printed.
    """

    code: int | None
    reason: str
    log: list[str]


def finish(command: Sequence[str], seconds: float) -> Finished:
    """Runs a command to its end, or stops it with all that it has started."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Finished(None, str(error), [])
    in_time = True
    try:
        printed, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    if not in_time:
        printed, complaints = process.communicate()
        return Finished(None, f"stopped after {seconds:.0f} s", end_of(printed + complaints))
    reason = ""
    if process.returncode:
        reason = last_line(complaints or printed) or f"exit code {process.returncode}"
    return Finished(process.returncode, reason, end_of(printed + complaints))


def end_of(text: str) -> list[str]:
    return [line[:400] for line in text.strip().splitlines()[-LOG_LINES:]]


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
