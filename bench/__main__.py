"""python -m bench: measures the machine, then append and attend beside the peers.

`python -m bench curves` draws time against context, `python -m bench profile` measures floors,
`python -m bench dots` compares two instructions for a prefill of bf16, and
`python -m bench predict` holds the planner's prediction against the time measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import kvcore
from bench import control, curves, dots, peers, predict, profile, report
from bench.arguments import names, positive
from bench.cases import CASES, KINDS, expand
from bench.formats import DEFAULT_FORMATS, parse
from bench.machine import Pinning, affinity, describe, l3_bytes, out_dir
from bench.roof import Limits, Roof
from bench.suite import Row, Settings, load_peers, run_case

QUICK_CASES = ("decode-4k", "decode-smollm2", "append-128")
QUICK_FORMATS = ("fp32", "bf16")
QUICK_PEERS = ("numpy", "torch")


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["curves"]:
        return curves.main(argv[1:])
    if argv[:1] == ["profile"]:
        return profile.main(argv[1:])
    if argv[:1] == ["dots"]:
        return dots.main(argv[1:])
    if argv[:1] == ["predict"]:
        return predict.main(argv[1:])
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
        for kv_format in arguments.formats or DEFAULT_FORMATS[CASES[name].kind]:
            result = run_case(CASES[name], kv_format, present, roof, settings)
            _print(report.case_lines(CASES[name], kv_format, result, limits[-1]))
            rows += result.rows
            absent |= {f"{peer} at {name}, {kv_format}": x for peer, x in result.absent.items()}
    _print(report.best_peer_lines(rows))
    costs = [] if arguments.no_control else control.run(20 if arguments.quick else 300)
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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--cases",
        type=names(CASES, KINDS),
        help=f"comma-separated; --list names them, and {', '.join(KINDS)} are all of a kind",
    )
    parser.add_argument(
        "--formats",
        type=parse,
        help="comma-separated; one for K and V, or both with a slash: rot8,chan4/rot4",
    )
    parser.add_argument(
        "--peers",
        type=names(peers.NAMES),
        help=f"of {','.join(peers.NAMES)}; default: all that are installed",
    )
    parser.add_argument("--threads", type=positive, help="default: what kvcore would use")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each peer, case and format (1)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: a file in bench/out")
    parser.add_argument("--quick", action="store_true", help="a smoke test of well under a minute")
    parser.add_argument("--no-control", action="store_true", help="leave out what the books cost")
    parser.add_argument("--list", action="store_true", help="list the cases")
    arguments = parser.parse_args(argv)
    arguments.cases = expand(arguments.cases or (QUICK_CASES if arguments.quick else CASES))
    if arguments.quick and not arguments.formats:
        arguments.formats = list(QUICK_FORMATS)
    arguments.peers = arguments.peers or list(QUICK_PEERS if arguments.quick else peers.NAMES)
    return arguments


def _limits(num_threads: int, quick: bool) -> list[Limits]:
    nbytes = 64 << 20 if quick else max(2 * l3_bytes(), 512 << 20)
    rounds = 3 if quick else 9
    limits = []
    for count in sorted({1, num_threads}):
        with Pinning(count):
            limits.append(Roof(count).limits(nbytes, rounds))
    return limits


def _print(lines: Sequence[str]) -> None:
    if lines:
        print("\n".join(lines), end="\n\n", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
