"""What the parts found, as lines for people; nothing here needs a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu import targets

Record = Mapping[str, Any]

HEADER = (
    f"{'case':<28}{'ms':>10}{'GB/s':>9}{'of copy':>9}{'TFLOP/s':>9}{'of matmul':>10}{'aim':>8}"
    f"{'':>8}  {'best peer':<18}{'x kvcore':>9}"
)


@dataclass(frozen=True)
class Roof:
    """What the device was measured to do; None where that failed.

    Attributes:
        bytes_per_second: of a copy, bytes read and bytes written together.
        flops_per_second: of a product of float16 matrices.
    """

    bytes_per_second: float | None
    flops_per_second: float | None

    @classmethod
    def of(cls, records: Iterable[Record]) -> Roof:
        found = {record["kind"]: record for record in records}
        return cls(
            found.get("copy", {}).get("bytes_per_second"),
            found.get("matmul", {}).get("flops_per_second"),
        )


@dataclass(frozen=True)
class Line:
    """One target as it was measured.

    Attributes:
        target: what.
        seconds: of kvcore's call.
        share: of the copy bandwidth; None where the roof is not known.
        peer: the fastest other library's name, None where there is none.
        ratio: its time over kvcore's.
    """

    target: targets.Target
    seconds: float
    share: float | None
    peer: str | None
    ratio: float | None

    @property
    def bytes_per_second(self) -> float:
        return self.target.nbytes / self.seconds

    @property
    def flops_per_second(self) -> float:
        return self.target.case.flops / self.seconds

    @property
    def passes(self) -> bool | None:
        """Whether it reaches its aim; None where it has none, or no roof to be held against."""
        if self.target.tflops is not None:
            return self.flops_per_second >= self.target.tflops * 1e12
        if self.target.share is not None and self.share is not None:
            return self.share >= self.target.share
        return None


def lines_of(records: Sequence[Record]) -> list[Line]:
    """kvcore's timings beside the best of the others."""
    roof = Roof.of(records)
    timings: dict[str, dict[str, float]] = {}
    for record in records:
        if record["kind"] == "timing":
            timings.setdefault(record["name"], {})[record["who"]] = record["seconds"]
    found = []
    for target in targets.ALL:
        times = dict(timings.get(target.name, {}))
        own = times.pop("kvcore", None)
        if own is None:
            continue
        rate = roof.bytes_per_second
        share = None if rate is None else target.nbytes / own / rate
        best = min(times, key=times.__getitem__) if times else None
        ratio = None if best is None else times[best] / own
        found.append(Line(target, own, share, best, ratio))
    return found


def render(records: Sequence[Record]) -> list[str]:
    """The whole report."""
    roof = Roof.of(records)
    lines = [_device_line(record) for record in records if record["kind"] == "device"]
    lines += [*_roof_lines(roof), *_check_lines(records), ""]
    timed = lines_of(records)
    if timed:
        lines += [HEADER, *(_timing_line(line, roof) for line in timed), ""]
    lines += [_overhead_line(record) for record in records if record["kind"] == "overhead"]
    lines += [_agreement_line(record) for record in records if record["kind"] == "agreement"]
    lines += [_generation_line(record) for record in records if record["kind"] == "generation"]
    lines += [
        f"{record['kind']}: {record['part']}: {record.get('name', '')}: {record['reason']}"
        for record in records
        if record["kind"] in ("failed", "skipped")
    ]
    return lines


def _device_line(record: Record) -> str:
    return (
        f"{record['name']}, compute capability {record['compute']}, "
        f"{record['multiprocessors']} multiprocessors, L2 {record['l2_bytes'] >> 20} MiB, "
        f"{record['memory_bytes'] / 2**30:.0f} GiB; driver {record['driver']}, "
        f"CuPy {record['cupy']}, kvcore {record['kvcore']}"
    )


def _roof_lines(roof: Roof) -> list[str]:
    lines = []
    if roof.bytes_per_second is not None:
        lines.append(f"copy: {roof.bytes_per_second / 1e9:.0f} GB/s, read and written")
    if roof.flops_per_second is not None:
        lines.append(f"matmul, float16: {roof.flops_per_second / 1e12:.0f} TFLOP/s")
    return lines


def _check_lines(records: Sequence[Record]) -> list[str]:
    lines = []
    cases = [record for record in records if record["kind"] == "parity"]
    if cases:
        failed = [record for record in cases if not record["passed"]]
        lines.append(f"parity: {len(cases) - len(failed)} of {len(cases)} cases passed")
        lines += [f"  FAILED {record['case']}: {record['message']}" for record in failed]
    lines += [
        f"compute-sanitizer {record['tool']}: {'clean' if record['clean'] else record['reason']}"
        for record in records
        if record["kind"] == "sanitizer"
    ]
    return lines


def _timing_line(line: Line, roof: Roof) -> str:
    flops = line.flops_per_second
    text = f"{line.target.name:<28}{line.seconds * 1e3:>10.4f}"
    text += f"{line.bytes_per_second / 1e9:>9.0f}{_percent(line.share):>9}"
    if line.target.case.kind == "prefill":
        rate = roof.flops_per_second
        text += f"{flops / 1e12:>9.0f}{_percent(None if rate is None else flops / rate):>10}"
    else:
        text += f"{'':>19}"
    text += f"{_aim(line.target):>8}{_verdict(line.passes):>8}"
    if line.peer is not None and line.ratio is not None:
        text += f"  {line.peer:<18}{line.ratio:>9.2f}"
    return text.rstrip()


def _overhead_line(record: Record) -> str:
    layer, step = record["layer"] * 1e6, record["step"] * 1e6
    met = layer <= targets.STEP_MICROSECONDS
    return (
        f"Python: {layer:.1f} us for append and attend of a layer (aim "
        f"{targets.STEP_MICROSECONDS:.0f}, {_verdict(met)}), {step:.1f} us for a step around them"
    )


def _agreement_line(record: Record) -> str:
    """Near ties are shown one by one: the step, the two tokens, and the CPU's margin."""
    ties = [
        f"{tie['position']}: {tie['chosen']} or {tie['other']}, {tie['margin']:.2g}"
        for tie in record["ties"]
    ]
    aim = record["aim"]
    verdict = "" if aim is None else f" (aim {aim:g}, {_verdict(record['largest'] <= aim)})"
    return (
        f"{record['model']}, {record['format']} cache: logits within {record['largest']:.2g} of "
        f"the CPU's{verdict}; {len(ties)} of {record['tokens']} greedy tokens differ"
        + (f", at near ties ({'; '.join(ties)})" if ties else "")
    )


def _generation_line(record: Record) -> str:
    prefill, decode = record["prefill_tokens_per_second"], record["decode_tokens_per_second"]
    return (
        f"{record['model']}, batch {record['batch']}: {decode:.0f} tokens/s decoded, "
        f"{prefill:.0f} tokens/s of prompts"
    )


def _aim(target: targets.Target) -> str:
    if target.tflops is not None:
        return f"{target.tflops:.0f} T"
    return "" if target.share is None else f"{target.share:.0%}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _verdict(passes: bool | None) -> str:
    return "" if passes is None else "met" if passes else "MISSED"


def passed(records: Sequence[Record]) -> bool:
    """Whether the device keeps the contract, and every part of kvcore's own ran."""
    parity = [record["passed"] for record in records if record["kind"] == "parity"]
    sanitized = [record["clean"] for record in records if record["kind"] == "sanitizer"]
    own = ("roof", "parity", "decode", "prefill", "append", "overhead", "model")
    failed = [r for r in records if r["kind"] == "failed" and r["part"] in own]
    return bool(parity) and all(parity) and all(sanitized) and not failed
