"""Bugs planted into the kernels are found by short cases on the emulator in check mode.

A mutant is a piece of a source and what stands there instead. Each is compiled and must make its
case fail: by what the emulator finds, or by results that are not the CPU's. One that passes says
that nothing guards this line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import kvcore
from cuda_emulator.runtime import EmulatedRuntime, EmulationError
from kvcore import backend, ops
from kvcore_gpu import sources
from kvcore_gpu.backend import CudaBackend
from support import BFLOAT16

HEADS, HEAD_DIM, BLOCK_SIZE = 2, 64, 64


class Runtime(EmulatedRuntime):
    """Where blocks begin as NaN: whatever is read of slots that nobody wrote shows."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.empty(shape, dtype) if len(shape) > 1 else super().zeros(shape, dtype)


# ---- cases: what a cache or an operation gives, to be compared with the CPU's


@dataclass(frozen=True)
class Played:
    """A cache of one layer that goes through steps of two sequences, and attends in some.

    Attributes:
        steps: new tokens of each sequence; the last ones attend.
        group: query heads of a KV head.
        attending: how many of the steps attend.
        out_error, lse_error: as docs/numerics_gpu.md has them for scores and values of about 1.
    """

    k_format: str
    v_format: str
    dtype: Any
    group: int
    steps: tuple[tuple[int, int], ...]
    attending: int
    out_error: float
    lse_error: float

    def play(self, name: str) -> list[Any]:
        rng = np.random.default_rng(11)
        spec = kvcore.CacheSpec(
            1, HEADS, HEAD_DIM, block_size=BLOCK_SIZE, k_format=self.k_format,
            v_format=self.v_format, raw_first=4, raw_last=32,
        )  # fmt: skip
        cache = kvcore.KVCache(spec, num_blocks=48, backend=name)
        pair = [cache.sequence(), cache.sequence()]
        found: list[Any] = []
        for i, counts in enumerate(self.steps):
            total, attends = sum(counts), i >= len(self.steps) - self.attending
            k, v = (rng.standard_normal((total, HEADS, HEAD_DIM)).astype(self.dtype) for _ in "kv")
            q = rng.standard_normal((total, HEADS * self.group, HEAD_DIM)).astype(self.dtype)
            with cache.step(list(zip(pair, counts, strict=True))) as step:
                step.append(0, k, v)
                if attends:
                    out, lse = step.attend(0, q, return_lse=True)
                    found += [(np.asarray(out, np.float32), self.out_error)]
                    found += [(np.asarray(lse, np.float32), self.lse_error)]
        # A fork shares blocks, and copies one before it writes there.
        fork = pair[1].fork()
        with cache.step([(fork, 1)]) as step:
            step.append(0, k[:1], v[:1])
        for sequence in (*pair, fork):
            found += [(np.asarray(rows), 0.0) for rows in sequence.read(0)]
        return found


@dataclass(frozen=True)
class Merged:
    """merge_states over partials of which some saw nothing."""

    def play(self, name: str) -> list[Any]:
        rng = np.random.default_rng(12)
        outs = rng.standard_normal((3, 9, 2, 40)).astype(np.float32)
        lses = rng.standard_normal((3, 9, 2)).astype(np.float32)
        lses[1, ::2], outs[1, ::2] = -np.inf, np.nan
        if name == "cuda":
            made = backend.get_backend("cuda").merge_states(outs, lses)
        else:
            made = ops.merge_states(outs, lses)
        return [(np.asarray(part), 1e-5) for part in made]


PROMPT = (560, 21)
FP16 = Played("fp16", "fp16", np.float16, 4, (PROMPT, (1, 1), (1, 2)), 2, 2e-3, 1e-4)
FP32 = Played("fp32", "fp32", np.float32, 1, (PROMPT, (1, 1), (1, 2)), 2, 2e-6, 2e-6)
# The first sequence comes to the end of a group; the second leaves a block with encoded rows partly
# filled, which the fork copies.
ROT = Played("rot8", "rot4", np.float32, 4, ((191, 126), (1, 1)), 1, 2e-3, 1e-3)
CHAN = Played("chan4", "int8", np.float32, 4, ((191, 126), (1, 1)), 1, 2e-3, 1e-3)
# Prompts of more rows than decode takes, the second behind stored keys.
LONG = Played("fp16", "fp16", np.float16, 4, ((70, 40), (75, 21)), 2, 4e-3, 4e-4)
LONG_ROT = Played("rot8", "rot4", BFLOAT16, 4, ((97, 30), (67, 21)), 1, 1e-2, 2e-3)
# A prompt's end whose keys are read in two parts.
PARTS = Played("fp16", "fp16", np.float16, 4, ((2000, 40), (50, 21)), 1, 4e-3, 4e-4)
MERGE = Merged()
CASES = {
    "long": LONG,
    "long_rot": LONG_ROT,
    "parts": PARTS,
    "fp16": FP16,
    "fp32": FP32,
    "rot": ROT,
    "chan": CHAN,
    "merge": MERGE,
}

# ---- mutants


@dataclass(frozen=True)
class Mutant:
    what: str
    source: str
    old: str
    new: str
    case: Any


MUTANTS = [
    Mutant("decode does not wait for its copies", "decode.cu",
           "cp_async_wait<STAGES - 1>();", "", FP16),
    Mutant("decode waits for one tile too few", "decode.cu",
           "cp_async_wait<STAGES - 1>();", "cp_async_wait<STAGES>();", FP16),
    Mutant("decode reads what other lanes copied without a sync", "decode.cu",
           "cp_async_wait<STAGES - 1>();\n        sync_warp();",
           "cp_async_wait<STAGES - 1>();", FP16),
    Mutant("decode copies over what other lanes read", "decode.cu",
           "state);\n        sync_warp();\n        last", "state);\n        last", FP16),
    Mutant("decode puts sums where other warps have tiles", "decode.cu",
           "sync_threads(); /* sums lie where the ring was */", "", FP16),
    Mutant("decode reads other warps' sums without a barrier", "decode.cu",
           "store_warp(shared, state);\n        sync_threads();",
           "store_warp(shared, state);", FP16),
    Mutant("copies and fragments disagree on the swizzle", "decode_ring.cuh",
           "cp_async16(chunk_of<CHUNKS>(tile, row, column),",
           "cp_async16(tile + 16 * (row * TILE_PITCH<CHUNKS> + column),", FP16),
    Mutant("decode takes the next block of the table", "decode_place.cuh",
           "table[first + (u32)(j >> block_size_log2)]",
           "table[first + (u32)(j >> block_size_log2) + 1]", FP16),
    Mutant("a row sees one key too many", "sight.cuh",
           "sight.end = sight.position + 1;\n#if", "sight.end = sight.position + 2;\n#if", FP16),
    Mutant("a row sees one key too few", "sight.cuh",
           "sight.end = sight.position + 1;\n#if", "sight.end = sight.position;\n#if", FP16),
    Mutant("the softmax forgets its last maximum", "decode.cu",
           "state.l[half] *= keep[half];", "", FP16),
    Mutant("the counter is left as it is", "partials.cuh",
           "p.counters[work.index] = 0;", ";", FP16),
    Mutant("a block counts before its writes are fenced", "partials.cuh",
           "if (blocks > 1)\n        thread_fence();\n", "", FP16),
    Mutant("one thread counts while others still write", "partials.cuh",
           "thread_fence();\n    sync_threads();", "thread_fence();", FP16),
    Mutant("the merge leaves a split out", "partials.cuh",
           "if (split + j < end)", "if (split + j + 1 < end)", FP16),
    Mutant("the merge weighs splits upside down", "partials.cuh",
           "exp2_approx(state.m - top)", "exp2_approx(top - state.m)", FP16),
    Mutant("partials of neighbouring rows overlap", "partials.cuh",
           "* (p.num_splits + 1) + part", "* p.num_splits + part", ROT),
    Mutant("simt reads other warps' sums without a barrier", "simt.cu",
           "rows[r]);\n    sync_threads();", "rows[r]);", FP32),
    Mutant("simt forgets its last maximum", "simt.cu", "o * keep);", "o);", FP32),
    Mutant("simt loads over the key that it works on", "simt.cu",
           "const Stream<Keys, Values, RAW> now = next;",
           "const Stream<Keys, Values, RAW> &now = next;", FP32),
    Mutant("prefill does not wait for its copies", "prefill.cu",
           "cp_async_wait<0>();\n        if (parted", "if (parted", LONG),
    Mutant("prefill reads what other threads copied without a barrier", "prefill.cu",
           "sync_threads(); /* this stage is there", "/* this stage is there", LONG),
    Mutant("prefill copies over the stage that others read", "prefill.cu",
           "load_tile(p, shared, i & 1,", "load_tile(p, shared, i + 1 & 1,", LONG),
    Mutant("prefill takes the blocks of another tile", "prefill_load.cuh",
           "pass.blocks[stage][is_raw][run]", "pass.blocks[stage ^ 1][is_raw][run]", LONG),
    Mutant("prefill leaves the last rows out", "prefill_place.cuh",
           "cut.tiles = tiles;", "cut.tiles = tiles - 1;", LONG),
    Mutant("prefill masks nothing", "prefill_tile.cuh", "if (masked)", "if (false)", LONG),
    Mutant("prefill takes raw blocks for as long as others", "prefill_load.cuh",
           "IS_QUANTIZED ? 1 << RAW_BLOCK_LOG2 : 1", "1", LONG_ROT),
    Mutant("prefill forgets a sum when a maximum grows", "prefill_tile.cuh",
           "state.l[t][half] *= factors[t][half];", "", LONG),
    Mutant("prefill multiplies before codes are expanded", "prefill.cu",
           "range_of(pass.wanted, first));\n            sync_threads();",
           "range_of(pass.wanted, first));", LONG_ROT),
    Mutant("prefill puts sums where others still read tiles", "prefill.cu",
           "sync_threads(); /* nobody reads a tile", "/* nobody reads a tile", LONG_ROT),
    Mutant("prefill leaves values' scales out", "prefill_tile.cuh",
           "weights[0] * value_scales[key]", "weights[0]", LONG_ROT),
    Mutant("prefill leaves values rotated", "prefill_rows.cuh",
           "undo_transform<V_FORMAT, HEAD_DIM_V>(p, head, o);", ";", LONG_ROT),
    Mutant("prefill's parts have the same keys", "prefill.cu",
           "wanted.end = min(wanted.end, (place.part + 1) * keys);", "", PARTS),
    Mutant("prefill's merge leaves a part out", "prefill_parts.cuh",
           "part < count;", "part + 1 < count;", PARTS),
    Mutant("prefill's tiles share their parts", "prefill_place.cuh",
           "+ tile * cut.parts", "+ tile", PARTS),
    Mutant("keys' scales are left out", "decode_keys.cuh",
           "scales[0] = u32_as_float(pair << 16);", "scales[0] = 1.0f;", ROT),
    Mutant("the query is not rotated", "queries.cuh",
           "if constexpr (IS_ROTATED<FORMAT>)\n        rotate_row<DIM>(x);", "", ROT),
    Mutant("raw rows begin one token late", "sight.cuh",
           "(seq.stored + token + 1) & -", "(seq.stored + token) & -", ROT),
    Mutant("raw rows are read encoded too", "key_bits.cuh",
           "low_bits<Bits>(seq.raw_first - first) |", "", ROT),
    Mutant("decode does not wait for raw rows", "decode.cu",
           "copy_raw_tile(p, work, stage, j);\n        cp_async_wait<0>();",
           "copy_raw_tile(p, work, stage, j);", ROT),
    Mutant("decode copies raw rows over what other lanes read", "decode.cu",
           "true, state);\n        sync_warp();", "true, state);", ROT),
    Mutant("a channel's minimum and step change places", "decode_keys.cuh",
           "hfma2(code[0], step.x, minimum.x)", "hfma2(code[0], minimum.x, step.x)", CHAN),
    Mutant("append reads a row before its lanes have copied it", "rows.cuh",
           "copy_bytes<2 * D, 16>(stage, from);\n    sync_warp();",
           "copy_bytes<2 * D, 16>(stage, from);", ROT),
    Mutant("append puts a raw row one slot further", "append.cu",
           "head, raw_slot % GROUP_TOKENS)", "head, (raw_slot + 1) % GROUP_TOKENS)", ROT),
    Mutant("a group is sealed into the one before", "append.cu",
           "const s32 start = column * GROUP_TOKENS, size",
           "const s32 start = (column - 1) * GROUP_TOKENS, size", CHAN),
    Mutant("a copied block lacks its metadata", "copy_blocks.cu",
           "to + p.blocks.metadata_offset, from + p.blocks.metadata_offset",
           "to, from", ROT),
    Mutant("a copied group lacks its last rows", "copy_blocks.cu",
           "num_rows = (num_rows + GROUP_TOKENS - 1) / GROUP_TOKENS * GROUP_TOKENS;", "", CHAN),
    Mutant("a partial that saw nothing takes part", "merge_states.cu",
           "if (p.lses[at] != minus_infinity)", "", MERGE),
    Mutant("merge_states takes another row's lse", "merge_states.cu",
           "total += weight(p.lses[i * p.num_rows + row], base);",
           "total += weight(p.lses[i * p.num_rows + row - row % 2], base);", MERGE),
]  # fmt: skip


def play(monkeypatch: pytest.MonkeyPatch, case: Any, runtime: EmulatedRuntime) -> None:
    """Plays a case on both backends, the GPU's twice, and compares."""
    monkeypatch.setitem(backend._loaded, "cuda", CudaBackend(runtime))
    ours, theirs, again = (case.play(name) for name in ("cpu", "cuda", "cuda"))
    for (mine, error), (other, _), (same, _) in zip(ours, theirs, again, strict=True):
        np.testing.assert_allclose(other, mine, rtol=0, atol=error)
        np.testing.assert_array_equal(same, other)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_pass(monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    play(monkeypatch, case, Runtime(check=True, order="random"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_finds(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    text = sources.read(mutant.source)
    assert text is not None and text.count(mutant.old) == 1, (
        "the source has changed: mend the table"
    )
    changed = {mutant.source: text.replace(mutant.old, mutant.new)}
    with pytest.raises((EmulationError, AssertionError)):
        play(monkeypatch, mutant.case, Runtime(check=True, order="random", changed=changed))
