"""python -m bench dots: a prefill of bf16 caches by dot products of bf16 pairs, and by FMAs.

Both run in turns, between loops of either instruction on registers. Needs the ISA "avx512_bf16";
where a hypervisor hides the feature, KVCORE_CPU_FEATURES=+avx512_bf16. Prints rows of a table in
README.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import ml_dtypes
import numpy as np

import kvcore
from bench.arguments import names, positive
from bench.cases import CASES, Case
from bench.machine import affinity
from bench.roof import Roof

HEADER = (
    "| case | fma GFLOP/s | dot GFLOP/s | avx512 ms | of fma | "
    "avx512_bf16 ms | of dot | with float32 q ms | of dot |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
PREFILLS = [name for name, case in CASES.items() if case.kind == "prefill"]
PROBE_FLOPS = 5e9


class Prefill:
    """A step of the case over a bf16 cache, with everything appended."""

    def __init__(self, case: Case) -> None:
        [stored], [new] = case.stored, case.new
        rng = np.random.default_rng(0)
        blocks = -(-(stored + new) // case.block_size)
        cache = kvcore.KVCache(case.spec("bf16"), num_blocks=blocks)
        k, v = rng.standard_normal((2, stored + new, case.num_kv_heads, case.head_dim), np.float32)
        sequence = cache.sequence()
        if stored:
            with cache.step([(sequence, stored)]) as step:
                step.append(0, k[:stored], v[:stored])
        self._step = cache.step([(sequence, new)])
        self._step.append(0, k[stored:], v[stored:])
        q = rng.standard_normal((new, case.num_heads, case.head_dim), np.float32)
        self._q = {"float32": q, "bfloat16": q.astype(ml_dtypes.bfloat16)}

    def seconds(self, isa: str, q_dtype: str) -> float:
        kvcore.set_isa(isa)
        start = time.perf_counter()
        self._step.attend(0, self._q[q_dtype])
        return time.perf_counter() - start


def measure(case: Case, roof: Roof, seconds: float) -> str:
    """The case's row of the table: medians of interleaved rounds, shares of the same rounds."""
    prefill = Prefill(case)
    samples: dict[str, Callable[[], float]] = {
        "fma": lambda: roof.compute(PROBE_FLOPS).seconds,
        "avx512": lambda: prefill.seconds("avx512", "bfloat16"),
        "dot": lambda: roof.compute_dots(PROBE_FLOPS).seconds,
        "bf16": lambda: prefill.seconds("avx512_bf16", "bfloat16"),
        "terms": lambda: prefill.seconds("avx512_bf16", "float32"),
    }
    rounds = [{name: take() for name, take in samples.items()}]  # memory, threads, pages
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 4:
        rounds.append({name: take() for name, take in samples.items()})
    rounds = rounds[1:]

    def ms(name: str) -> str:
        return f"{median(r[name] for r in rounds) * 1e3:.0f}"

    def rate(name: str) -> str:
        return f"{PROBE_FLOPS / median(r[name] for r in rounds) / 1e9:.0f}"

    def share(name: str, peak: str) -> str:
        return f"{median(r[peak] / r[name] for r in rounds) * case.flops / PROBE_FLOPS:.0%}"

    cells = [case.name, rate("fma"), rate("dot"), ms("avx512"), share("avx512", "fma")]
    cells += [ms("bf16"), share("bf16", "dot"), ms("terms"), share("terms", "dot")]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench dots", description=__doc__)
    parser.add_argument("--cases", type=names(PREFILLS), default=PREFILLS)
    parser.add_argument("--threads", type=positive, help="default: what kvcore would use")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case (10)")
    arguments = parser.parse_args(argv)
    if "avx512_bf16" not in kvcore.available_isas():
        print('the ISA "avx512_bf16" is not available: see KVCORE_CPU_FEATURES in kvcore.h')
        return 1
    affinity()  # looks once, before any thread is pinned
    threads = arguments.threads or kvcore.get_num_threads()
    kvcore.set_num_threads(threads)
    print(HEADER)
    for name in arguments.cases:
        print(measure(CASES[name], Roof(threads), arguments.seconds), flush=True)
    return 0
