"""python -m bench.gpu.parts NAME --to FILE: one part of the report, as JSON lines.

Each part runs in a process of its own: after a fault of the device nothing else works in the
process that met it, and what a part had found by then is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import kvcore
from bench.gpu import graphs, peers, targets
from bench.gpu.kvcore_tasks import CacheTask, random_array

T = TypeVar("T")

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192


class Part:
    """Where a part writes what it finds, and how long it may take.

    Args:
        share, shares: this process does every `shares`-th piece of work from number `share` on.

    Attributes:
        quick: few cases, few replays.
    """

    def __init__(
        self, file: Path, seconds: float, quick: bool, share: int = 0, shares: int = 1
    ) -> None:
        self._file, self._end, self.quick = file, time.monotonic() + seconds, quick
        self._share, self._shares = share, shares

    def own(self, work: Sequence[T]) -> Sequence[T]:
        """What of `work` is this process's."""
        return work[self._share :: self._shares]

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end

    @property
    def repeats(self) -> int:
        return 10 if self.quick else 40

    def record(self, kind: str, **fields: Any) -> None:
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"kind": kind, **fields}) + "\n")

    def each(self, found: Sequence[targets.Target], attempt: Callable[[Any], Any]) -> None:
        """Tries each target while there is time; a failure is recorded and is not the last word."""
        for target in found:
            if self.is_over:
                self.record("skipped", name=target.name, reason="out of time")
                continue
            try:
                attempt(target)
            except Exception as error:  # whatever it is, the others may work
                self.record("failed", name=target.name, reason=_reason(error))


def device(part: Part) -> None:
    """What the machine is."""
    import cupy as cp

    number = cp.cuda.runtime.getDevice()
    facts = cp.cuda.runtime.getDeviceProperties(number)
    part.record(
        "device",
        name=facts["name"].decode(),
        compute=f"{facts['major']}.{facts['minor']}",
        multiprocessors=facts["multiProcessorCount"],
        l2_bytes=facts["l2CacheSize"],
        memory_bytes=facts["totalGlobalMem"],
        driver=cp.cuda.runtime.driverGetVersion(),
        runtime=cp.cuda.runtime.runtimeGetVersion(),
        cupy=cp.__version__,
        kvcore=kvcore.__version__,
    )


def parity(part: Part) -> None:
    """The contract on the device."""
    from kvcore import parity as suite

    subject = suite.Subject("cuda")
    name = subject.device
    cases = suite.select_cases(["decode/*", "prefill/*"] if part.quick else None)
    for case in part.own(cases):
        if part.is_over:
            part.record("skipped", name=case.name, reason="out of time")
            continue
        part.record("parity", **_finite(asdict(suite.try_case(case, subject, name))))


def compile_kernels(part: Part) -> None:
    """Small forms of what will be timed, so that its kernels are compiled by then."""
    import cupy as cp

    def attempt(target: targets.Target) -> None:
        with cp.cuda.Stream(non_blocking=True) as stream:
            task = CacheTask(targets.small(target), 1, cp)
            with task.step() as step:
                task.prepare(step)
                task.attend(step)
            stream.synchronize()

    kinds = ("decode", "prefill", "append")
    part.each(part.own([t for kind in kinds for t in targets.of_kind(kind, part.quick)]), attempt)


def roof(part: Part) -> None:
    """Bytes a second of a copy, read and written, and flops a second of a product."""
    import cupy as cp

    half = np.dtype(np.float16)
    with cp.cuda.Stream(non_blocking=True):
        source = random_array(cp, (COPY_BYTES // half.itemsize,), half, 0)
        target = cp.empty_like(source)
        seconds = graphs.cupy_seconds(cp, lambda: cp.copyto(target, source), part.repeats)
        found = graphs.summary(seconds, 1)
        part.record("copy", bytes_per_second=2 * COPY_BYTES / found["seconds"], **found)
        a, b = (random_array(cp, (MATMUL_SIZE, MATMUL_SIZE), half, i) for i in range(2))
        c = cp.empty_like(a)
        seconds = graphs.call_seconds(cp, lambda: cp.matmul(a, b, out=c), part.repeats)
        found = graphs.summary(seconds, 1)
        part.record("matmul", flops_per_second=2 * MATMUL_SIZE**3 / found["seconds"], **found)


def attends(kind: str) -> Callable[[Part], None]:
    """Attention of a kind of case."""

    def measure(part: Part) -> None:
        import cupy as cp

        l2_bytes = _l2_bytes(cp)

        def attempt(target: targets.Target) -> None:
            num_layers = target.layers_beyond(l2_bytes)
            with cp.cuda.Stream(non_blocking=True):
                task = CacheTask(target, num_layers, cp)
                with task.step() as step:
                    task.prepare(step)
                    seconds = graphs.cupy_seconds(cp, lambda: task.attend(step), part.repeats)
            _record(part, "kvcore", target, seconds, num_layers)

        part.each(list(targets.of_kind(kind, part.quick)), attempt)

    return measure


def append(part: Part) -> None:
    """Appends of many tokens."""
    import cupy as cp

    l2_bytes = _l2_bytes(cp)

    def attempt(target: targets.Target) -> None:
        num_layers = target.layers_beyond(l2_bytes)
        with cp.cuda.Stream(non_blocking=True):
            task = CacheTask(target, num_layers, cp)
            seconds = _append_seconds(cp, task, part.repeats)
        _record(part, "kvcore", target, seconds, num_layers)

    part.each(list(targets.of_kind("append", part.quick)), attempt)


def _append_seconds(cp: Any, task: CacheTask, repeats: int) -> list[float]:
    """A layer is appended once a step: the calls before the capture have steps of their own."""
    for _ in range(2):
        with task.step() as step:
            task.append(step)
    stream = cp.cuda.get_current_stream()
    stream.synchronize()
    with task.step() as step:
        stream.synchronize()
        stream.begin_capture()
        try:
            task.append(step)
        finally:
            graph = stream.end_capture()
        return graphs.replay_seconds(cp, graph, repeats)


def overhead(part: Part) -> None:
    """Microseconds of Python: append and attend of a layer, and a step around them."""
    import cupy as cp

    from bench.cases import decode

    target = targets.Target(decode("overhead", [256]), "bf16")
    num_layers, layer_times, step_times = 64, [], []
    with cp.cuda.Stream(non_blocking=True) as stream:
        task = CacheTask(target, num_layers, cp)
        for _ in range(50 if part.quick else 200):
            stream.synchronize()
            begin = time.perf_counter()
            with task.step() as step:
                opened = time.perf_counter()
                k, v = (task.rows(1, 8, i) for i in range(2))
                q, out = task.rows(1, 32), task.rows(1, 32, 1)
                for layer in range(num_layers):
                    step.append(layer, k, v)
                    step.attend(layer, q, out=out)
                closing = time.perf_counter()
            end = time.perf_counter()
            layer_times.append((closing - opened) / num_layers)
            step_times.append(opened - begin + end - closing)
    part.record(
        "overhead",
        layer=graphs.summary(layer_times, 1)["seconds"],
        step=graphs.summary(step_times, 1)["seconds"],
    )


def model(part: Part) -> None:
    """A language model, its logits held against the CPU's."""
    from kvcore.errors import MissingExtra

    try:
        from bench.gpu import model as language

        for kind, fields in language.records(part.quick):
            part.record(kind, **fields)
    except MissingExtra as error:
        part.record("skipped", name=language.NAME, reason=str(error))


def peer(name: str) -> Callable[[Part], None]:
    """Another library."""

    def measure(part: Part) -> None:
        missing = peers.missing(name)
        if missing is not None:
            part.record("skipped", name=name, reason=missing)
            return
        import torch

        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        part.record("version", name=name, torch=torch.__version__)

        def attempt(target: targets.Target) -> None:
            num_layers = target.layers_beyond(l2_bytes)
            run = peers.PEERS[name](target, num_layers)
            seconds = graphs.torch_seconds(torch, run, part.repeats)
            _record(part, name, target, seconds, num_layers)

        part.each([t for kind in ("decode", "prefill") for t in targets.of_kind(kind, part.quick)
                   if peers.is_comparable(t)], attempt)  # fmt: skip

    return measure


PARTS: dict[str, Callable[[Part], None]] = {
    "device": device,
    "compile": compile_kernels,
    "roof": roof,
    "parity": parity,
    "decode": attends("decode"),
    "prefill": attends("prefill"),
    "append": append,
    "overhead": overhead,
    "model": model,
    **{name: peer(name) for name in peers.PEERS},
}


def _record(
    part: Part, who: str, target: targets.Target, seconds: list[float], num_layers: int
) -> None:
    part.record(
        "timing", who=who, name=target.name, layers=num_layers, nbytes=target.nbytes,
        flops=target.case.flops, **graphs.summary(seconds, num_layers),
    )  # fmt: skip


def _l2_bytes(cp: Any) -> int:
    return int(cp.cuda.runtime.getDeviceProperties(cp.cuda.runtime.getDevice())["l2CacheSize"])


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """An error that is not finite is no JSON."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _reason(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:300]}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.parts", description=__doc__)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--to", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--shares", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(argv)
    part = Part(given.to, given.seconds, given.quick, given.share, given.shares)
    PARTS[given.name](part)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
