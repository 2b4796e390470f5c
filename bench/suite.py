"""One case in one format: prepares the peers, compares their answers, times them, makes rows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from bench import peers
from bench.cases import Case, Data
from bench.formats import max_error
from bench.machine import Pinning, l3_bytes
from bench.measure import Samples, Task, measure, ratio
from bench.peers import Peer, Workload
from bench.peers import kvcore as kvcore_peer
from bench.reference import Reference
from bench.roof import Roof

#: GB/s of two threads under which memory is called slow. On some machines the pages that a buffer
#: got decide between about 35 and 55 to 60, and what share of it a kernel can reach.
SLOW_GBS = 45.0


@dataclass(frozen=True)
class Row:
    """What one peer did.

    Attributes:
        ms, ms_p10: median and 10th percentile of a step.
        gbs: bytes of K and V that the step must touch over its time, 1e9 a second.
        gflops: for a prefill, visible flops over the time.
        mrows: for an append, 1e6 rows of K and V (of one token and head) over the time.
        floor_ms: what the machine's limit took in the same rounds: reading as many bytes, or for a
            prefill doing as many flops.
        regime: for a decode, "slow" or "fast" memory; see `SLOW_GBS`.
        share: the limit's time over this one's; see `measure.ratio`.
        times_kvcore: this peer's time over kvcore's, likewise.
        error: distance from the answer in float64, rms over rms; see `reference.py`.
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
    mrows: float | None
    floor_ms: float
    regime: str | None
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


class Result(NamedTuple):
    """Attributes:
    rows: of kvcore, of each peer and of the machine's limit ("roof").
    absent: peers that cannot do this case here, and why.
    """

    rows: list[Row]
    absent: dict[str, str]


def run_case(
    case: Case, kv_format: str, present: Mapping[str, Peer], roof: Roof, settings: Settings
) -> Result:
    """Measures kvcore beside the peers that are present.

    Raises:
        RuntimeError: kvcore's answer is wrong.
    """
    workload = Workload(
        case=case,
        kv_format=kv_format,
        data=Data.random(case),
        num_threads=settings.num_threads,
        cold_bytes=settings.cold_bytes,
    )
    # The peers would hold shared tokens once for each sequence: what decode-4k shows of them.
    beside = {} if case.shared else present
    tasks: dict[str, Task] = {}
    with Pinning(settings.num_threads) as pinning:
        try:
            tasks |= kvcore_peer.prepare(workload, roof)
            absent = _prepare(beside, workload, tasks, pinning)
            errors = _check(tasks, absent, workload, pinning)
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
    names = sorted(samples, key=lambda name: (name == "roof", not name.startswith("kvcore")))
    return Result([_row(workload, name, samples, errors.get(name)) for name in names], absent)


def load_peers(names: list[str]) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that are here, and for the others why not."""
    present, absent = {}, {}
    for name in names:
        try:
            present[name] = peers.load(name)
        except peers.PeerAbsent as reason:
            absent[name] = str(reason)
    return present, absent


def _prepare(
    present: Mapping[str, Peer], workload: Workload, tasks: dict[str, Task], pinning: Pinning
) -> dict[str, str]:
    """Adds the peers' tasks; returns the peers that cannot do the case, and why."""
    absent = {}
    for name, peer in present.items():
        with nullcontext() if peer.pinned else pinning.lifted():
            try:
                tasks |= peer.prepare(workload)
            except peers.PeerAbsent as reason:
                absent[name] = str(reason)
        pinning.place_new_threads()
    return absent


def _check(
    tasks: dict[str, Task], absent: dict[str, str], workload: Workload, pinning: Pinning
) -> dict[str, float]:
    """Each answer's distance from the true one; a peer whose answer is wrong takes no part."""
    if workload.case.kind == "append":
        return {}
    reference = Reference(workload.case, workload.data)
    errors = {}
    for name, task in list(tasks.items()):
        with nullcontext() if task.pinned else pinning.lifted():
            output = task.output()
        if output is None:
            continue
        own = name.startswith("kvcore")
        limit = max_error(workload.kv_format, peer=not own)
        errors[name] = reference.error(output)
        if errors[name] <= limit:
            continue
        wrong = f"its answer is wrong by {errors[name]:.1e} (rms over rms), at most {limit:.1e}"
        if own:
            raise RuntimeError(f"{name}, {workload.case.name} {workload.kv_format}: {wrong}")
        tasks.pop(name).close()
        absent[name] = wrong
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
        mrows=case.appended_rows / own.median / 1e6 if case.kind == "append" else None,
        floor_ms=roof.median * 1e3,
        regime=_regime(case, kv_bytes / roof.median / 1e9),
        share=ratio(roof, own),
        times_kvcore=ratio(own, samples["kvcore"]),
        error=error,
        steps=len(own.used),
        disturbed=len(own.disturbed),
        contended=own.is_contended,
        layers=workload.num_layers,
    )


def _regime(case: Case, read_gbs: float) -> str | None:
    if case.kind != "decode":
        return None
    return "slow" if read_gbs < SLOW_GBS else "fast"
