"""python -m bench: measures the machine, then append and attend beside the peers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import kvcore
from bench import control, peers, report
from bench.cases import CASES, FORMATS
from bench.machine import Pinning, affinity, describe, l3_bytes, out_dir
from bench.roof import Limits, Roof
from bench.suite import Row, Settings, load_peers, run_case

QUICK_CASES = ("decode-4k", "decode-smollm2", "append-128")
QUICK_FORMATS = ("fp32", "bf16")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.list:
        for case in CASES.values():
            print(f"{case.name:<16}{case.description}")
        return 0
    # Both look at the process's CPUs once: before any thread is pinned.
    cpus, default_threads = affinity(), kvcore.get_num_threads()
    num_threads = arguments.threads or default_threads
    if num_threads > len(cpus):
        print(f"{num_threads} threads on {len(cpus)} CPUs: they will wait for each other")
    present, absent = load_peers(arguments.peers)
    for name, reason in absent.items():
        print(f"without {name}: {reason}")
    hardware = describe()
    limits = _limits(num_threads, arguments.quick)
    _print(report.machine_lines(hardware, limits, num_threads))
    settings = (
        Settings.quick(num_threads)
        if arguments.quick
        else Settings.full(num_threads, arguments.seconds)
    )
    rows: list[Row] = []
    roof = Roof(num_threads)
    for name in arguments.cases:
        for kv_format in arguments.formats:
            new_rows = run_case(CASES[name], kv_format, present, roof, settings)
            _print(report.case_lines(CASES[name], kv_format, new_rows))
            rows += new_rows
    costs = control.run(20 if arguments.quick else 300)
    _print(report.control_lines(costs))
    if arguments.quick:
        print("quick: data comes from the CPU's caches and few steps are timed; do not quote these")
    path = arguments.json or out_dir() / time.strftime("%Y%m%d-%H%M%S.json")
    report.write_json(
        path,
        hardware=hardware,
        num_threads=num_threads,
        quick=arguments.quick,
        limits=limits,
        rows=rows,
        costs=costs,
        absent=absent,
    )
    print(f"written: {path}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--cases", type=_names(CASES), help="comma-separated; --list names them")
    parser.add_argument("--formats", type=_names(FORMATS), help=f"of {','.join(FORMATS)}")
    parser.add_argument(
        "--peers", type=_names(peers.NAMES), default=list(peers.NAMES), help="default: all"
    )
    parser.add_argument("--threads", type=_positive, help="default: what kvcore would use")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each peer, case and format (1)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: a file in bench/out")
    parser.add_argument("--quick", action="store_true", help="a smoke test of well under a minute")
    parser.add_argument("--list", action="store_true", help="list the cases")
    arguments = parser.parse_args(argv)
    arguments.cases = arguments.cases or list(QUICK_CASES if arguments.quick else CASES)
    arguments.formats = arguments.formats or list(QUICK_FORMATS if arguments.quick else FORMATS)
    return arguments


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"one or more of {', '.join(known)} expected, got {', '.join(unknown)}"
            )
        return names

    return parse


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 expected, got {value}")
    return value


def _limits(num_threads: int, quick: bool) -> list[Limits]:
    nbytes = 64 << 20 if quick else max(2 * l3_bytes(), 512 << 20)
    rounds = 3 if quick else 9
    limits = []
    for count in sorted({1, num_threads}):
        with Pinning(count):
            limits.append(Roof(count).limits(nbytes, rounds))
    return limits


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines), end="\n\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
