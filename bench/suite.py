"""One case in one format: prepares the peers, compares their answers, times them, makes rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench import peers
from bench.cases import Case, Data
from bench.machine import Pinning, l3_bytes
from bench.measure import Samples, Task, measure, ratio
from bench.peers import Prepare, Workload
from bench.peers import kvcore as kvcore_peer
from bench.roof import Roof

#: How far a peer may lie from kvcore, rms over rms. Torch computes in the cache's dtype.
MAX_ERROR = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}

MAX_APPEND_LAYERS = 64


@dataclass(frozen=True)
class Row:
    """What one peer did.

    Attributes:
        ms, ms_p10: median and 10th percentile of a step.
        gbs: bytes of K and V that the step must touch over its time, 1e9 a second.
        gflops: for a prefill, visible flops over the time.
        floor_ms: what the machine's limit took in the same rounds: reading as many bytes, or for a
            prefill doing as many flops.
        share: the limit's time over this one's; see `measure.ratio`.
        times_kvcore: this peer's time over kvcore's, likewise.
        error: distance from kvcore's answer, rms over rms.
        steps, disturbed: timed steps, and those left out because others held the CPUs.
        contended: too few undisturbed steps, so that all count.
        layers: copies of the cache that the steps walked through.
    """

    case: str
    kind: str
    kv_format: str
    peer: str
    ms: float
    ms_p10: float
    kv_bytes: int
    gbs: float
    gflops: float | None
    floor_ms: float
    share: float
    times_kvcore: float
    error: float | None
    steps: int
    disturbed: int
    contended: bool
    layers: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        seconds: time for each peer at each case.
        cold_bytes: K and V that a peer walks through at least, so that they come from memory.
    """

    num_threads: int
    seconds: float = 1.0
    min_rounds: int = 5
    max_rounds: int = 60
    cold_bytes: int = 0

    @classmethod
    def full(cls, num_threads: int, seconds: float) -> Settings:
        return cls(num_threads, seconds, cold_bytes=2 * l3_bytes())

    @classmethod
    def quick(cls, num_threads: int) -> Settings:
        """For a smoke test: the numbers mean little."""
        return cls(num_threads, seconds=0.1, min_rounds=2, max_rounds=3)


def run_case(
    case: Case, kv_format: str, prepares: Mapping[str, Prepare], roof: Roof, settings: Settings
) -> list[Row]:
    """Rows of kvcore, of each peer and of the machine's limit ("roof").

    Raises:
        RuntimeError: a peer's answer is not kvcore's.
    """
    workload = Workload(
        case=case,
        kv_format=kv_format,
        data=Data.random(case),
        num_layers=_num_layers(case, kv_format, settings.cold_bytes),
        num_threads=settings.num_threads,
    )
    tasks: dict[str, Task] = {}
    with Pinning(settings.num_threads) as pinning:
        try:
            tasks |= kvcore_peer.prepare(workload, roof)
            for prepare in prepares.values():
                tasks |= prepare(workload)
                pinning.place_new_threads()
            errors = _compare(tasks, MAX_ERROR[kv_format], f"{case.name} {kv_format}")
            samples = measure(
                tasks,
                pinning,
                seconds=settings.seconds,
                min_rounds=settings.min_rounds,
                max_rounds=settings.max_rounds,
            )
        finally:
            for task in tasks.values():
                task.close()
    return [
        _row(workload, name, samples, errors.get(name))
        for name in sorted(samples, key=lambda name: (name == "roof", name != "kvcore"))
    ]


def load_peers(names: list[str]) -> tuple[dict[str, Prepare], dict[str, str]]:
    """The peers that are here, and for the others why not."""
    present, absent = {}, {}
    for name in names:
        try:
            present[name] = peers.load(name)
        except peers.PeerAbsent as reason:
            absent[name] = str(reason)
    return present, absent


def _num_layers(case: Case, kv_format: str, cold_bytes: int) -> int:
    layers = max(2, -(-cold_bytes // case.kv_bytes(kv_format)))
    return min(layers, MAX_APPEND_LAYERS) if case.kind == "append" else layers


def _compare(tasks: Mapping[str, Task], limit: float, what: str) -> dict[str, float]:
    """Each peer's distance from kvcore's answer."""
    reference = tasks["kvcore"].output()
    errors: dict[str, float] = {}
    for name, task in tasks.items():
        output = None if name == "kvcore" else task.output()
        if output is None or reference is None:
            continue
        errors[name] = float(np.linalg.norm(output - reference) / np.linalg.norm(reference))
        if not errors[name] <= limit:
            raise RuntimeError(
                f"{what}: the answers of {name} and kvcore differ by {errors[name]:.1e} (rms over "
                f"rms), at most {limit:.0e} expected"
            )
    return errors


def _row(workload: Workload, name: str, samples: Mapping[str, Samples], error: float | None) -> Row:
    case, own, roof = workload.case, samples[name], samples["roof"]
    kv_bytes = case.kv_bytes(workload.kv_format)
    return Row(
        case=case.name,
        kind=case.kind,
        kv_format=workload.kv_format,
        peer=name,
        ms=own.median * 1e3,
        ms_p10=own.quantile(0.1) * 1e3,
        kv_bytes=kv_bytes,
        gbs=kv_bytes / own.median / 1e9,
        gflops=case.flops / own.median / 1e9 if case.kind == "prefill" else None,
        floor_ms=roof.median * 1e3,
        share=ratio(roof, own),
        times_kvcore=ratio(own, samples["kvcore"]),
        error=error,
        steps=len(own.used),
        disturbed=len(own.disturbed),
        contended=own.is_contended,
        layers=workload.num_layers,
    )
