"""python -m bench profile: floor and time of each case, and of the kernel where memory is no limit.

Prints the rows of the table in README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache

import kvcore
from bench.arguments import names, positive
from bench.cases import CASES, KINDS, Case, decode, expand
from bench.formats import FLOATS, parse
from bench.machine import affinity, l2_bytes
from bench.report import megabytes
from bench.roof import Roof
from bench.suite import Row, Settings, run_case

HEADER = (
    "| case | format | work | floor ms | from L2 ms | reached ms | of limit |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


class Profile:
    """Measures cases, and for decodes their kernel over a cache that fits into L2."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._roof = settings, Roof(settings.num_threads)
        self._l2_gbs = cache(self._measure_l2_gbs)

    def line(self, case: Case, kv_format: str) -> str:
        """The case's row of the table."""
        row = self._row(case, kv_format, self._settings)
        work = f"{case.flops / 1e9:.3g} GFLOP" if row.gflops else megabytes(case, kv_format)
        cells = [case.name, kv_format, work, f"{row.floor_ms:.4g}", self._l2_ms(case, kv_format)]
        cells += [f"{row.ms:.4g}", f"{row.share:.0%}" + " contended" * row.contended]
        return f"| {' | '.join(cells)} |"

    def _l2_ms(self, case: Case, kv_format: str) -> str:
        """What the case would take at the speed of its kernel over cached data."""
        if case.kind != "decode" or case.shared:
            return ""
        group = case.num_heads // case.num_kv_heads
        gbs = self._l2_gbs(group, case.head_dim, kv_format)
        return f"{case.kv_bytes(kv_format) / gbs / 1e6:.4g}"

    def _measure_l2_gbs(self, group: int, head_dim: int, kv_format: str) -> float:
        """As many times what one thread does: cores share nothing up to L2.

        From the times at two lengths, so that what a call takes by itself falls out.
        """
        alone = Settings(1, seconds=self._settings.seconds)
        heads = {"num_heads": group, "num_kv_heads": 1, "head_dim": head_dim}
        # Two copies, and half of L2 for other things.
        tokens = l2_bytes() // 4 // decode("", [1], **heads).row_bytes(kv_format)
        short, long = (
            self._row(decode("cached", [n], **heads), kv_format, alone)
            for n in (tokens // 2, tokens)
        )
        gbs = (long.kv_bytes - short.kv_bytes) / (long.ms_p10 - short.ms_p10) / 1e6
        return self._settings.num_threads * gbs

    def _row(self, case: Case, kv_format: str, settings: Settings) -> Row:
        return run_case(case, kv_format, {}, self._roof, settings).rows[0]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench profile", description=__doc__)
    parser.add_argument("--cases", type=names(CASES, KINDS), default=list(CASES))
    parser.add_argument("--formats", type=parse, default=list(FLOATS))
    parser.add_argument("--threads", type=positive, help="default: what kvcore would use")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case and format (1)")
    arguments = parser.parse_args(argv)
    affinity()  # looks once, before any thread is pinned
    threads = arguments.threads or kvcore.get_num_threads()
    profile = Profile(Settings.full(threads, arguments.seconds))
    print(HEADER)
    for name in expand(arguments.cases):
        for kv_format in arguments.formats:
            print(profile.line(CASES[name], kv_format), flush=True)
    return 0
