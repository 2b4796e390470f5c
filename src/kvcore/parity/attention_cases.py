"""Cases of `merge_states`, `append_kv`, `paged_attention` and `attention` on plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore import arrays
from kvcore.backend import AttendOptions
from kvcore.formats import get_format
from kvcore.parity import oracle
from kvcore.parity.array_case import ArrayCase, judge
from kvcore.parity.found import Found
from kvcore.parity.layouts import from_layout, to_layout
from kvcore.parity.subject import POISON, REFERENCE, Subject
from kvcore.parity.tolerances import RELATIVE, excess, tolerance
from kvcore.spec import CacheSpec

#: docs/numerics.md: of the largest abs(out_p), per element.
MERGE = 1e-6
HEADS, GROUP, DIM, BLOCK_SIZE, NUM_BLOCKS = 2, 2, 64, 16, 12
FORMAT_OF = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def merge_case(num_partials: int, head_dim: int) -> ArrayCase:
    """Partials of any weight, some of which saw nothing and hold anything."""

    def attempt(subject: Subject) -> Found:
        rng = np.random.default_rng(num_partials)
        outs = rng.standard_normal((num_partials, 7, 3, head_dim), np.float32)
        lses = rng.normal(0, 20, (num_partials, 7, 3)).astype(np.float32)
        lses[0, 0] = lses[:, 1] = -np.inf
        outs[0, 0] = outs[:, 1] = np.nan
        results = []
        for _ in range(2):
            pair = subject.operations.merge_states(subject.array(outs), subject.array(lses))
            results.append([subject.host(x) for x in pair])
        return judge(*results, worst=_merge_excess(results[0], outs, lses))

    return ArrayCase(f"ops/merge_states-{num_partials}x{head_dim}", attempt)


def _merge_excess(result: list[NDArray[Any]], outs: NDArray[Any], lses: NDArray[Any]) -> float:
    out, lse = result
    exact, exact_lse = oracle.merge(outs.astype(np.float64), lses.astype(np.float64))
    nothing = np.isneginf(exact_lse)
    if not np.array_equal(np.isneginf(lse), nothing):
        return np.inf
    largest = np.where(np.isneginf(lses)[..., None], 0, np.abs(outs)).max(axis=0)
    error = np.abs(out - exact) / np.where(largest == 0, 1, MERGE * largest)
    exact_lse = np.where(nothing, 0, exact_lse)
    lse_error = np.abs(np.where(nothing, 0, lse) - exact_lse)
    lse_error /= RELATIVE + 2.0**-23 * np.abs(exact_lse)
    return float(max(np.nan_to_num(x, nan=np.inf).max() for x in (error, lse_error)))


def paged_case(format: str, layout: str) -> ArrayCase:
    """Rows scattered by slots, some of them skipped, and attention by tables of one's own."""
    spec = CacheSpec(1, HEADS, DIM, k_format=format, v_format=format)
    # Block 11 is nobody's; beyond what a sequence has, a table may say anything.
    tables = np.array([[4, 0, 9, 2, 7], [5, 3, -1, -1, -1], [10, 99, -1, -1, -1]], np.int32)
    lens, counts = [75, 20, 1], [30, 1, 1]

    def attempt(subject: Subject) -> Found:
        rng = np.random.default_rng(3)
        k, v = (rng.standard_normal((sum(lens), HEADS, DIM), np.float32) for _ in range(2))
        q = rng.standard_normal((sum(counts), HEADS * GROUP, DIM), np.float32)
        slots = np.concatenate([
            tables[s, np.arange(n) // BLOCK_SIZE] * BLOCK_SIZE + np.arange(n) % BLOCK_SIZE
            for s, n in enumerate(lens)
        ])  # fmt: skip
        expected = _stored(REFERENCE, format, layout, k, v, slots)
        blocks = _stored(subject, format, layout, k, v, slots)
        starts = np.cumsum([0, *counts])
        results = []
        for _ in range(2):
            pair = subject.operations.paged_attention(
                subject.array(q), *blocks, tables, lens, starts, layout, AttendOptions(), True
            )
            results.append([subject.host(x) for x in pair])
        held_k, held_v = (_rounded(x, format) for x in (k, v))
        worst = _worst(subject, spec, results[0], q, held_k, held_v, counts, lens)
        stored = [subject.host(x) for x in blocks]
        return judge(*results, worst=worst, stored=(stored, expected))

    return ArrayCase(f"ops/paged_attention-{format}-{layout}", attempt)


def _stored(
    subject: Subject, format: str, layout: str, k: Any, v: Any, slots: NDArray[np.integer]
) -> tuple[Any, Any]:
    """Poisoned blocks with K and V in them; every fifth token comes in a second call."""
    shape = [NUM_BLOCKS, HEADS, BLOCK_SIZE] if layout == "HND" else [NUM_BLOCKS, BLOCK_SIZE, HEADS]
    dtype = get_format(format).storage_dtype
    poison = np.full((*shape, DIM * dtype.itemsize), POISON, np.uint8).view(dtype)
    k_blocks, v_blocks = subject.array(poison.copy()), subject.array(poison.copy())
    later = np.arange(len(slots)) % 5 == 0
    with subject.active():
        for skipped in (later, ~later):
            some = np.where(skipped, -1, slots).astype(np.int32)
            subject.operations.append_kv(
                subject.array(k), subject.array(v), k_blocks, v_blocks, some, layout
            )
    return k_blocks, v_blocks


def _rounded(rows: NDArray[np.float32], format: str) -> NDArray[Any]:
    codec = REFERENCE.operations
    code = codec.quantize(rows, format, None, None)
    return REFERENCE.host(codec.dequantize(code, format, None, None))


def attention_case(dtype: str, layout: str) -> ArrayCase:
    """Sequences whose keys outnumber their queries, or not."""
    spec = CacheSpec(1, HEADS, DIM, k_format=FORMAT_OF[dtype], v_format=FORMAT_OF[dtype])
    counts, lens = [20, 1, 7], [90, 33, 7]

    def attempt(subject: Subject) -> Found:
        rng = np.random.default_rng(4)
        number = arrays.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
        q, k, v = (
            rng.standard_normal((sum(sizes), heads, DIM), np.float32).astype(number)
            for sizes, heads in ((counts, HEADS * GROUP), (lens, HEADS), (lens, HEADS))
        )
        inputs = [
            subject.array(to_layout(x, layout, sizes))
            for x, sizes in ((q, counts), (k, lens), (v, lens))
        ]
        padded = layout in ("BSHD", "BHSD")
        cuts = [np.asarray(x if padded else np.cumsum([0, *x]), np.int32) for x in (counts, lens)]
        results = []
        for _ in range(2):
            out, lse = subject.operations.attention(
                inputs[0], inputs[1], inputs[2], cuts[0], cuts[1], layout, AttendOptions(), True,
                None,
            )  # fmt: skip
            results.append([from_layout(subject.host(out), layout, counts), subject.host(lse)])
        return judge(*results, worst=_worst(subject, spec, results[0], q, k, v, counts, lens))

    return ArrayCase(f"ops/attention-{dtype}-{layout}", attempt)


def _worst(
    subject: Subject,
    spec: CacheSpec,
    result: list[NDArray[Any]],
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    counts: list[int],
    lens: list[int],
) -> float:
    """The largest excess over ragged sequences, the last tokens of which attend."""
    (out, lse), worst, first, stop = result, 0.0, 0, 0
    for num_new, length in zip(counts, lens, strict=True):
        rows, held = slice(first, first + num_new), slice(stop, stop + length)
        sight = oracle.visible_tokens(length - num_new, num_new, length)
        reference = oracle.attention(q[rows], k[held], v[held], *sight)
        allowed = tolerance(subject, spec.layers[0], num_new, GROUP, exact=False)
        worst = max(worst, excess(out[rows], lse[rows], reference, allowed))
        first, stop = rows.stop, held.stop
    return worst
