"""A plan as tables: one list of sections that the terminal, CSV and the page are made of."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import textwrap
from dataclasses import dataclass
from typing import Any

from kvcore.planner.answers import Plan
from kvcore.planner.cost import Cost
from kvcore.units import format_bytes

Cell = str | int | float | None
Rows = tuple[tuple[Cell, ...], ...]
LARGEST_WRITTEN_OUT = 10**13


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: what it tells.
        columns: their heads; bytes and seconds have their unit there.
        rows: as many cells each; None: there is no such number.
        note: how the numbers come to be.
    """

    title: str
    columns: tuple[str, ...]
    rows: Rows
    note: str = ""


def sections(plan: Plan) -> tuple[Section, ...]:
    """Every answer, the shortest first."""
    found = [
        _model(plan),
        _memory(plan),
        _capacity(plan),
        _costs(plan),
        _recompute(plan),
        _growth(plan),
        _layers(plan),
        _strategies(plan),
    ]
    if plan.splits:
        found.append(_splits(plan))
    return (*found, _offload(plan))


# ---- what is written


def text(plan: Plan) -> list[str]:
    """The tables for a terminal."""
    lines: list[str] = []
    for section in sections(plan):
        notes = textwrap.wrap(section.note, 90, initial_indent="  ", subsequent_indent="  ")
        lines += [section.title, *_aligned(section), *notes, ""]
    return lines[:-1]


def to_csv(plan: Plan) -> str:
    """One table of section, row and column, and the plain number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("section", "row", "column", "value"))
    for section in sections(plan):
        for row in section.rows:
            for column, cell in zip(section.columns[1:], row[1:], strict=True):
                writer.writerow((section.title, row[0], column, "" if cell is None else cell))
    return out.getvalue()


def to_json(plan: Plan) -> str:
    """Every number of the plan, bytes and seconds plain."""
    return json.dumps(to_dict(plan), indent=2)


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan's fields, and what follows from them."""
    device = plan.device
    fields = {
        field.name: _plain(getattr(plan, field.name))
        for field in dataclasses.fields(plan)
        if field.name != "spec"
    }
    fields["model"] |= {
        "parameters": plan.model.parameters,
        "active_parameters": plan.model.active_parameters,
        "weight_nbytes": plan.model.weight_nbytes,
    }
    fields["cache"] = {
        "bytes_per_token": plan.spec.bytes_per_token,
        "bits_per_element": plan.spec.bits_per_element(),
        "block_sizes": [pool.block_size for pool in plan.spec.pools],
    }
    fields["memory"] |= {"total": plan.memory.total, "kv_share": plan.memory.kv_share}
    fields["fits"] = plan.fits
    fields["waste"] |= {
        "contiguous_waste": plan.waste.contiguous_waste,
        "paged_waste": plan.waste.paged_waste,
    }
    for name, step in (("decode", plan.decode), ("prefill", plan.prefill)):
        for part in ("weights", "attention"):
            cost: Cost = getattr(step, part)
            fields[name][part] |= {
                "intensity": cost.intensity,
                "bound": cost.bound(device),
                "seconds": cost.seconds(device),
            }
        fields[name]["seconds"] = step.seconds(device)
        fields[name]["tokens_per_second"] = step.tokens_per_second(device)
    fields["recompute"] |= {
        "factor": plan.recompute.factor,
        "factor_after_prompt": plan.recompute.factor_after_prompt,
    }
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _aligned(section: Section) -> list[str]:
    rows = [section.columns, *([_shown(c, n) for c, n in zip(row, section.columns, strict=True)]
                               for row in section.rows)]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(section.columns))]
    return [
        "  " + "  ".join(_padded(cell, width, i) for i, (cell, width) in
                         enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip


def _padded(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def shown_rows(section: Section) -> list[list[str]]:
    """The rows as people read them."""
    return [
        [_shown(cell, name) for cell, name in zip(row, section.columns, strict=True)]
        for row in section.rows
    ]


def _shown(cell: Cell, column: str) -> str:
    """A number as people read it, by the unit in its column's head."""
    if cell is None:
        return "no limit" if "tokens" in column else "-"
    if isinstance(cell, str):
        return cell
    if "bytes" in column:
        return format_bytes(int(cell))
    if column.startswith("seconds"):
        return _seconds(float(cell))
    if isinstance(cell, int) and cell < LARGEST_WRITTEN_OUT:
        return f"{cell:,}"
    return f"{cell:.3g}" if abs(cell) < 1e5 else f"{cell:.3e}"


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


# ---- sections


def _model(plan: Plan) -> Section:
    model, device = plan.model, plan.device
    heads = f"{model.num_heads}/{model.num_kv_heads} heads of {model.head_dim}"
    if model.latent is not None:
        heads += f", latent of {model.latent.kv_rank} + {model.latent.rope_dim}"
    windows = sorted({w for w in model.layer_windows if w})
    with_window = sum(w is not None for w in model.layer_windows)
    rows: list[tuple[Cell, ...]] = [
        ("model", f"{model.name}{' (an assumption)' if model.assumed else ''}"),
        ("parameters", model.parameters),
        ("parameters a token meets", model.active_parameters),
        ("attention", f"{model.num_layers} layers, {heads}"),
        ("windows", f"{with_window} layers of {windows}" if windows else "none"),
        ("device", device.name),
        ("figures of the device", device.source),
        ("cache", f"{_formats(plan)}, blocks of {plan.spec.groups[0].block_size}"),
    ]
    return Section("What is planned", ("", "value"), tuple(rows))


def _formats(plan: Plan) -> str:
    layer = plan.spec.layers[0]
    return layer.k_format if layer.v_in_k else f"{layer.k_format}/{layer.v_format}"


def _memory(plan: Plan) -> Section:
    memory = plan.memory
    rows: Rows = (
        ("weights", memory.weights, memory.weights / memory.total),
        (f"activations, steps of {plan.chunk:,}", memory.activations,
         memory.activations / memory.total),
        (f"KV cache, {plan.batch:,} x {plan.context:,} tokens", memory.kv, memory.kv_share),
        ("total", memory.total, 1.0),
        ("KV cache of a token", plan.spec.bytes_per_token, None),
        ("room for the KV cache", plan.room, None),
        ("scores of a prefill, whole", plan.scores.whole, None),
        (f"scores in chunks of {plan.chunk:,}", plan.scores.chunked, None),
        ("scores, running softmax", plan.scores.online, None),
    )  # fmt: skip
    return Section("Memory", ("", "bytes", "share"), rows)


def _capacity(plan: Plan) -> Section:
    waste = plan.waste
    rows: Rows = (
        (f"longest context, {plan.batch:,} sequences", plan.longest_context),
        (f"most sequences of {plan.context:,}", plan.most_sequences),
        ("slots, paged", waste.paged_slots),
        ("slots, preallocated", waste.contiguous_slots),
        ("tokens in them", waste.tokens),
    )
    return Section(f"Capacity, {plan.reserve:.0%} left free", ("", "tokens"), rows)


def _costs(plan: Plan) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for name, step in (("decode", plan.decode), ("prefill", plan.prefill)):
        for part, cost in (("weights", step.weights), ("attention", step.attention)):
            seconds = cost.seconds(plan.device)
            if part == "attention":
                seconds = step.attention_seconds(plan.device)
            rows.append((f"{name}, {part}", cost.flops, cost.nbytes, cost.intensity,
                         cost.bound(plan.device), seconds, None))  # fmt: skip
        rows.append((name, step.total.flops, step.total.nbytes, step.total.intensity, "",
                     step.seconds(plan.device), step.tokens_per_second(plan.device)))  # fmt: skip
    columns = ("", "flops", "bytes", "flops a byte", "bound", "seconds at least", "a second")
    return Section(f"Steps at the roof, ridge {plan.device.ridge:.0f} flops a byte", columns,
                   tuple(rows))  # fmt: skip


def _recompute(plan: Plan) -> Section:
    found = plan.recompute
    counts = (
        ("projections", found.cached.projections, found.uncached.projections),
        ("scores and values", found.cached.scores, found.uncached.scores),
        ("MLP", found.cached.mlp, found.uncached.mlp),
        ("output head", found.cached.head, found.uncached.head),
        ("all", found.cached.total, found.uncached.total),
        ("tokens through the layers", found.cached_tokens, found.uncached_tokens),
        ("the same after the prompt", found.cached_tokens - found.prompt,
         found.uncached_tokens - found.prompt),
    )  # fmt: skip
    rows: Rows = tuple(
        (name, cached, uncached, uncached / cached if cached else None)
        for name, cached, uncached in counts
    )
    note = (
        "With P prompt tokens and G generated ones, n = P + G - 1 tokens pass through the layers "
        "with a cache, and P + (P + 1) + ... + n without. A token takes 2 flops a weight, and each "
        "pair of a query and a key that it sees 2 (D + Dv) a head and layer: n (n + 1) / 2 pairs "
        "with a cache, the sum of these over all n without, fewer where layers have windows."
    )
    title = f"{found.generated:,} tokens generated after {found.prompt:,}"
    return Section(title, ("flops", "with a cache", "without", "times"), rows, note)


def _growth(plan: Plan) -> Section:
    table = plan.growth
    columns = ("context", *(f"bytes, batch {batch:,}" for batch in table.batches))
    rows: Rows = tuple(
        (f"{length:,}", *(row[i] for row in table.nbytes)) for i, length in enumerate(table.lengths)
    )
    return Section("Growth of the KV cache", columns, rows)


def _layers(plan: Plan) -> Section:
    kinds: dict[tuple[int | None, int], list[int]] = {}
    for layer in plan.layer_bytes:
        kinds.setdefault((layer.window, layer.nbytes), []).append(layer.layer)
    rows: Rows = tuple(
        (
            f"{len(layers)} layers, window {window:,}" if window else f"{len(layers)} layers",
            nbytes,
            nbytes * len(layers),
        )
        for (window, nbytes), layers in kinds.items()
    )
    return Section("A token in the layers", ("", "bytes each", "bytes together"), rows)


def _strategies(plan: Plan) -> Section:
    rows: Rows = tuple((row.name, row.kind, row.nbytes, row.ratio) for row in plan.strategies)
    title = f"Other means, {plan.batch:,} x {plan.context:,} tokens"
    return Section(title, ("strategy", "changes", "bytes", "times smaller"), rows)


def _splits(plan: Plan) -> Section:
    link = plan.device.link_bandwidth
    rows = tuple(
        (split.kind, split.kv_nbytes, split.weight_nbytes, split.wire_nbytes,
         split.wire_seconds(link), split.replicas)
        for split in plan.splits
    )  # fmt: skip
    columns = ("split", "bytes of KV", "bytes of weights", "bytes sent a step", "seconds on a link",
               "copies of a KV head")  # fmt: skip
    return Section(f"Each of {plan.splits[0].num_devices} devices", columns, rows)


def _offload(plan: Plan) -> Section:
    found = plan.offload
    rows: Rows = (
        ("fetch from the host", found.nbytes, found.fetch_seconds),
        ("compute again", None, found.recompute_seconds),
    )
    title = f"A sequence of {found.length:,} tokens that left the device"
    return Section(title, ("", "bytes", "seconds at least"), rows)
