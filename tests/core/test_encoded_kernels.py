"""Attention over encoded rows in place: every format and ISA against float64 over decoded rows."""

from __future__ import annotations

import ctypes as ct
import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attention_oracle
from core.library import DTYPES, ISAS, OK, AttendOptions, Blocks, Step, lib, machine, rows_of

FLOATS = ["fp32", "fp16", "bf16"]
ROWS = ["int8", "int4", "fp8_e4m3", "int8_static", "rot8", "rot6", "rot4", "rot3", "rot2"]
CHANNELS = ["chan4", "chan2"]
INDEX = {name: i for i, name in enumerate([*FLOATS, *ROWS, *CHANNELS])}
GROUP = 32
#: docs/numerics.md, "Tolerances".
EXACT, BYTES = 2e-6, 2e-4


class Channels(ct.Structure):
    _fields_ = [("bias", ct.c_void_p), ("scales", ct.c_void_p)]


def channels_of(bias, scales) -> Channels:
    return Channels(
        None if bias is None else bias.ctypes.data, None if scales is None else scales.ctypes.data
    )


def encode(rows: np.ndarray, name: str, bias=None, scales=None) -> tuple[np.ndarray, np.ndarray]:
    """The codes and the metadata of a head's rows [m, D], a row each, or a group each."""
    m, dim = rows.shape
    blocks = Blocks()
    assert lib.kv_blocks_init(blocks, None, INDEX[name], 1, 1, GROUP, dim) == OK
    count = GROUP if name in CHANNELS else 1
    row_bytes, code_bytes = blocks.head_stride // GROUP, blocks.token_stride
    out = np.empty((m // count, count * row_bytes), np.uint8)
    whole = np.ascontiguousarray(rows[: m // count * count], np.float32)
    channels = channels_of(bias, scales)
    assert (
        lib.kv_quantize(
            whole.ctypes.data, 0, INDEX[name], len(whole), dim, ct.addressof(channels),
            out.ctypes.data,
        )
        == OK
    )  # fmt: skip
    return out[:, : count * code_bytes], out[:, count * code_bytes :]


def decode(codes: np.ndarray, metadata: np.ndarray, name: str, dim: int, bias, scales):
    count = GROUP if name in CHANNELS else 1
    both = np.ascontiguousarray(np.concatenate([codes, metadata], axis=1))
    out = np.empty((len(codes) * count, dim), np.float32)
    channels = channels_of(bias, scales)
    assert (
        lib.kv_dequantize(
            both.ctypes.data, INDEX[name], len(out), dim, ct.addressof(channels), 0,
            out.ctypes.data,
        )
        == OK
    )  # fmt: skip
    return out


@dataclass
class Side:
    """K or V of some sequences, in blocks full of garbage but for their rows.

    Attributes:
        rows: float32 [m, H, D] of each sequence.
        decoded, raw: what is stored of them, float32; NaN where a row is not stored encoded.
    """

    name: str
    rows: list[np.ndarray]
    block_size: int
    block_rows: list[np.ndarray]
    num_blocks: int
    raw_rows: list[np.ndarray] | None
    raw_first: int
    raw_last: int
    bias: np.ndarray | None = None
    scales: np.ndarray | None = None
    decoded: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        heads, dim = self.rows[0].shape[1:]
        self.blocks = Blocks()
        shape = (INDEX[self.name], self.num_blocks, heads, self.block_size, dim)
        assert lib.kv_blocks_init(self.blocks, None, *shape) == OK
        tile = self.blocks.head_stride
        self.data = np.full((self.num_blocks, heads, tile), 0xFF, np.uint8)  # scales: NaN
        self.blocks.data = self.data.ctypes.data
        if self.name in DTYPES:
            self._store_floats()
        else:
            for s in range(len(self.rows)):
                self._store_sequence(s)
        for name in ("bias", "scales"):
            if getattr(self, name) is not None:
                setattr(self.blocks, name, getattr(self, name).ctypes.data)
        if self.raw_rows is not None and self.name not in DTYPES:
            self._store_raw()

    def _store_floats(self) -> None:
        dtype = DTYPES[self.name]
        heads, dim = self.rows[0].shape[1:]
        view = self.data.reshape(-1).view(dtype).reshape(-1, heads, self.block_size, dim)
        for rows, blocks in zip(self.rows, self.block_rows, strict=True):
            for j, row in enumerate(rows):
                view[blocks[j // self.block_size], :, j % self.block_size] = row.astype(dtype)
            self.decoded.append(rows.astype(dtype).astype(np.float32))

    def _store_sequence(self, s: int) -> None:
        rows, blocks = self.rows[s], self.block_rows[s]
        count = GROUP if self.name in CHANNELS else 1
        decoded = np.full(rows.shape, np.nan, np.float32)
        for head in range(rows.shape[1]):
            known = [None if x is None else x[head] for x in (self.bias, self.scales)]
            codes, metadata = encode(rows[:, head], self.name, *known)
            decoded[: len(codes) * count, head] = decode(
                codes, metadata, self.name, rows.shape[2], *known
            )
            for i, (code, more) in enumerate(zip(codes, metadata, strict=True)):
                block, place = divmod(i * count, self.block_size)
                tile = self.data[blocks[block], head]
                at = place // count * len(code)
                tile[at : at + len(code)] = code
                at = self.blocks.metadata_offset + place // count * len(more)
                tile[at : at + len(more)] = more
        self.decoded.append(decoded)

    def _store_raw(self) -> None:
        bf16 = DTYPES["bf16"]
        heads, dim = self.rows[0].shape[1:]
        count = 1 + max(int(r.max(initial=0)) for r in self.raw_rows)
        self.raw_data = np.full((count, heads, GROUP, dim), np.nan, bf16)
        for rows, blocks in zip(self.rows, self.raw_rows, strict=True):
            for j, row in enumerate(rows):
                self.raw_data[blocks[j // GROUP], :, j % GROUP] = row.astype(bf16)
        self.raw_blocks = Blocks()
        assert lib.kv_blocks_init(self.raw_blocks, None, 2, count, heads, GROUP, dim) == OK
        self.raw_blocks.data = self.raw_data.ctypes.data
        self.blocks.raw = ct.addressof(self.raw_blocks)
        self.blocks.raw_first, self.blocks.raw_last = self.raw_first, self.raw_last

    def seen_from(self, s: int, position: int) -> np.ndarray:
        """Sequence s as a query stored at `position` reads it."""
        rows = self.decoded[s].copy()
        if self.raw_rows is not None and self.name not in DTYPES:
            j = np.arange(len(rows))
            start = (position + 1) // GROUP * GROUP - self.raw_last
            raw = (j < self.raw_first) | (j >= start)
            rows[raw] = self.rows[s][raw].astype(DTYPES["bf16"]).astype(np.float32)
        return rows


@dataclass
class Case:
    """Sequences of given (stored, new) lengths; raw rows where raw_last or raw_first says so."""

    k_name: str
    v_name: str
    lengths: list[tuple[int, int]] = field(default_factory=lambda: [(300, 1), (70, 1)])
    heads: int = 2
    group: int = 1
    dim: int = 64
    block_size: int = 64
    raw_first: int = 0
    raw_last: int = 0
    bias: bool = False
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        columns = [-(-(stored + new) // self.block_size) for stored, new in self.lengths]
        total = sum(columns) + 2
        starts = np.concatenate([[0], np.cumsum(columns)])
        ids = np.random.default_rng(self.block_size).permutation(total)
        block_rows = [ids[a:b].astype(np.int32) for a, b in itertools.pairwise(starts)]
        raw_rows, next_raw = None, 0
        if self.raw_first or self.raw_last:
            raw_rows = []
            for stored, new in self.lengths:
                n = -(-(stored + new) // GROUP)
                raw_rows.append(np.arange(next_raw, next_raw + n, dtype=np.int32))
                next_raw += n
        shapes = [(stored + new, self.heads, self.dim) for stored, new in self.lengths]
        outliers = np.exp(rng.standard_normal((self.heads, self.dim))).astype(np.float32)
        keys = [outliers * rng.standard_normal(s, np.float32) for s in shapes]
        values = [rng.standard_normal(s, np.float32) for s in shapes]
        bias = None
        if self.bias:
            bias = (4 * rng.standard_normal((self.heads, self.dim))).astype(np.float32)
            keys = [x + bias for x in keys]
        common = (self.block_size, block_rows, total, raw_rows, self.raw_first, self.raw_last)

        def scales(name: str, rows: list[np.ndarray]) -> np.ndarray | None:
            if name != "int8_static":
                return None
            return (np.abs(np.concatenate(rows)).max(0) / 127).astype(np.float32)

        self.k = Side(self.k_name, keys, *common, bias, scales(self.k_name, keys))
        self.v = Side(self.v_name, values, *common, None, scales(self.v_name, values))
        self.place(self.lengths, block_rows, raw_rows)
        shape = (sum(new for _, new in self.lengths), self.heads * self.group, self.dim)
        self.q = (self.spread * rng.standard_normal(shape)).astype(np.float32)
        self.scale = float(np.float32(self.dim**-0.5))

    def place(self, lengths, block_rows, raw_rows) -> None:
        counts, lens = [new for _, new in lengths], [stored + new for stored, new in lengths]
        self.step = Step(self.block_size, counts, lens, block_rows)
        if raw_rows is not None:
            self.raw_step = Step(GROUP, counts, lens, raw_rows)
            self.step.plan.raw = ct.addressof(self.raw_step.plan)

    def run(self, exact: int = 0, **given) -> tuple[np.ndarray, np.ndarray]:
        out = np.full(self.q.shape, 7, np.float32)
        lse = np.full(self.q.shape[:2], 7, np.float32)
        options = AttendOptions(ct.sizeof(AttendOptions), self.scale, exact)
        for name, value in given.items():
            pointer = isinstance(value, np.ndarray)
            setattr(options, name, value.ctypes.data if pointer else value)
        assert (
            lib.kv_attend(
                self.step.plan, rows_of(self.q), self.k.blocks, self.v.blocks, options,
                rows_of(out), lse.ctypes.data,
            )
            == OK
        )  # fmt: skip
        return out, lse

    def reference(self, **options) -> attention_oracle.Reference:
        """Query by query, as each reads its own rows."""
        masks = options.pop("masks", None)
        parts = []
        for s, (stored, new) in enumerate(self.lengths):
            for t in range(new):
                i, row = stored + t, self.step.query_starts[s] + t
                end = i + 1 if masks is None else stored + new
                sight = {} if masks is None else {"mask": masks[s][t : t + 1]}
                k, v = (side.seen_from(s, i)[:end] for side in (self.k, self.v))
                positions = [i] if masks is not None else None
                parts.append(
                    attention_oracle.attention(
                        self.q[row : row + 1], k, v, self.scale, positions=positions, **sight,
                        **options,
                    )
                )  # fmt: skip
        fields = ("out", "lse", "max_score", "max_terms", "mean_length")
        joined = {f: np.concatenate([getattr(p, f) for p in parts]) for f in fields}
        return attention_oracle.Reference(**joined)


def tolerance(isa: str, exact: bool) -> float:
    return BYTES if isa in ("avx512_vnni", "avx512_bf16") and not exact else EXACT


def check(case: Case, isa: str, exact: int = 0, **given) -> None:
    options = {k: v for k, v in given.items() if k in ("softcap", "window", "sinks")}
    if "alibi_slopes" in given:
        options["alibi_slopes"] = given["alibi_slopes"]
    reference = case.reference(**options)
    with machine(isa):
        out, lse = case.run(exact, **given)
    size = np.maximum(np.linalg.norm(reference.out, axis=-1), reference.mean_length)
    factor = tolerance(isa, bool(exact)) * np.maximum(1, reference.max_terms / 8)
    error = np.linalg.norm(out - reference.out, axis=-1)
    assert (error <= factor * size).all(), (error / size / factor).max()
    allowed = 2 * factor + 2.0**-23 * np.abs(reference.lse)
    assert (np.abs(lse - reference.lse) <= allowed).all()


PAIRS = [(name, name) for name in ROWS] + [(name, "rot4") for name in CHANNELS]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("k_name", "v_name"), PAIRS)
class TestFormats:
    @pytest.mark.parametrize("group", [1, 4, 7])
    def test_matches_decoded_rows(self, k_name: str, v_name: str, group: int, isa: str) -> None:
        raw = {"raw_first": 3, "raw_last": 32} if k_name in CHANNELS else {}
        check(Case(k_name, v_name, group=group, dim=128, **raw), isa)

    @pytest.mark.parametrize("dim", [64, 192])
    def test_head_dims(self, k_name: str, v_name: str, dim: int, isa: str) -> None:
        raw = {"raw_last": 32} if k_name in CHANNELS else {}
        check(Case(k_name, v_name, dim=dim, bias=True, **raw), isa)

    def test_with_raw_rows(self, k_name: str, v_name: str, isa: str) -> None:
        lengths = [(600, 1), (31, 1), (0, 3), (255, 3), (94, 2)]
        case = Case(k_name, v_name, lengths, raw_first=5, raw_last=64, group=3, block_size=32)
        check(case, isa)
        check(case, isa, exact=1)

    def test_larger_scores(self, k_name: str, v_name: str, isa: str) -> None:
        check(Case(k_name, v_name, raw_last=32, spread=12.0), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [16, 80, 576, 1024])
def test_odd_head_dims(isa: str, dim: int) -> None:
    for name in ("rot8", "int8", "fp8_e4m3"):
        check(Case(name, name, heads=1, group=2, dim=dim), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("k_name", "v_name"), [("rot4", "rot4"), ("int8", "fp16"), ("bf16", "rot3")]
)
def test_small_blocks_and_float_sides(isa: str, k_name: str, v_name: str) -> None:
    lengths = [(300, 1), (17, 2), (0, 1), (262, 1)]
    check(Case(k_name, v_name, lengths, block_size=16, group=2), isa)
    check(Case(k_name, v_name, lengths, block_size=16, group=2, raw_first=4, raw_last=32), isa)


OPTIONS = {
    "softcap": {"softcap": 5.0},
    "window": {"window": 77},
    "alibi": {"alibi_slopes": np.array([0.5, 0.1, 0.01, 0.0], np.float32)},
    "sinks": {"sinks": np.array([0.5, -1.0, 3.0, 0.0], np.float32)},
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize(("k_name", "v_name"), [("rot4", "rot8"), ("chan4", "int4")])
def test_options(isa: str, option: str, k_name: str, v_name: str) -> None:
    case = Case(k_name, v_name, [(290, 2), (5, 2)], group=2, raw_first=4, raw_last=32)
    check(case, isa, **OPTIONS[option])


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_seen_takes_no_part(isa: str) -> None:
    """Behind a window blocks are gone; scales of tokens that a mask hides are NaN."""
    case = Case("rot8", "rot8", [(500, 1)], heads=1, dim=64)
    with machine(isa):
        before = case.run(window=100)
        case.step.block_rows[0][:6] = -1
        after = case.run(window=100)
    assert before[0].tobytes() == after[0].tobytes()

    case = Case("rot8", "rot8", [(90, 1)], heads=1, dim=64)
    seen = np.ones(91, bool)
    seen[40] = False
    mask = np.packbits(seen, bitorder="little")
    given = {"mask": mask, "mask_size": mask.size, "mask_offsets": np.zeros(1, np.int64)}
    with machine(isa):
        before = case.run(**given)
        block = case.step.block_rows[0][0]
        for side in (case.k, case.v):
            tile = side.data[block, 0]
            at = side.blocks.metadata_offset + 2 * 40
            tile[at : at + 2] = 0xFF
        after = case.run(**given)
    assert before[0].tobytes() == after[0].tobytes()
    assert np.isfinite(after[0]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("k_name", "v_name"), [("rot8", "rot8"), ("chan4", "rot4"), ("int4", "rot3")]
)
class TestBits:
    """The same q, k and v give the same bits, whatever stands around them."""

    lengths = ((1100, 1), (70, 2), (255, 1), (5, 1))

    def case(self, k_name: str, v_name: str, **changes) -> Case:
        return Case(
            k_name, v_name, list(self.lengths), group=4, raw_first=4, raw_last=32, **changes
        )

    def test_threads(self, k_name: str, v_name: str, isa: str) -> None:
        case = self.case(k_name, v_name)
        with machine(isa):
            out, lse = case.run()
        for threads in (2, 5):
            with machine(isa, threads):
                other, other_lse = case.run()
            assert other.tobytes() == out.tobytes()
            assert other_lse.tobytes() == lse.tobytes()

    def test_batch(self, k_name: str, v_name: str, isa: str) -> None:
        case = self.case(k_name, v_name)
        with machine(isa):
            out, _ = case.run()
        q, rows, raw_rows = case.q, case.step.block_rows, case.raw_step.block_rows
        starts = case.step.query_starts
        for s, (stored, new) in enumerate(self.lengths):
            case.q = np.ascontiguousarray(q[starts[s] : starts[s + 1]])
            case.place([(stored, new)], [rows[s]], [raw_rows[s]])
            with machine(isa):
                alone, _ = case.run()
            assert alone.tobytes() == out[starts[s] : starts[s + 1]].tobytes()

    def test_block_size(self, k_name: str, v_name: str, isa: str) -> None:
        sizes = [32, 64, 512] if k_name in CHANNELS else [16, 64, 512]
        with machine(isa):
            results = [self.case(k_name, v_name, block_size=b).run()[0].tobytes() for b in sizes]
        assert len(set(results)) == 1

    def test_shared_blocks(self, k_name: str, v_name: str, isa: str) -> None:
        """Sequences over one prefix take it together, and have the bits of each alone."""
        case = Case(k_name, v_name, [(1100, 2)], group=4, dim=128, raw_first=4, raw_last=32)
        with machine(isa):
            alone, _ = case.run()
        count = 9
        rows, raw_rows = case.step.block_rows, case.raw_step.block_rows
        case.place([(1100, 2)] * count, rows * count, raw_rows * count)
        case.q = np.concatenate([case.q] * count)
        with machine(isa):
            together, _ = case.run()
        for s in range(count):
            assert together[2 * s : 2 * s + 2].tobytes() == alone.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_a_query_that_is_not_finite_stays_in_its_row(isa: str) -> None:
    case = Case("rot4", "rot4", [(290, 1)], heads=1, group=3)
    with machine(isa):
        clean, _ = case.run()
        case.q[0, 1, 7] = np.nan
        out, lse = case.run()
    assert np.isnan(out[0, 1]).all() and np.isnan(lse[0, 1])
    assert out[0, [0, 2]].tobytes() == clean[0, [0, 2]].tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_of_any_size(isa: str, size: float) -> None:
    case = Case("int8", "rot8", [(290, 1)], heads=1)
    plain = Case("int8", "rot8", [(290, 1)], heads=1)
    plain.v = Side(
        "rot8", [size * x for x in case.v.rows], 64, case.step.block_rows, case.v.num_blocks,
        None, 0, 0,
    )  # fmt: skip
    reference = plain.reference()
    with machine(isa):
        out, _ = plain.run()
    error = np.linalg.norm(out - reference.out, axis=-1) / reference.mean_length
    assert (error < tolerance(isa, False) * np.maximum(1, reference.max_terms / 8)).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_many_cases(data: st.DataObject) -> None:
    k_name = data.draw(st.sampled_from([*ROWS, *CHANNELS]))
    v_name = data.draw(st.sampled_from(ROWS))
    raw_last = data.draw(st.sampled_from([32, 64] if k_name in CHANNELS else [0, 32, 64]))
    raw_first = data.draw(st.integers(0, 32)) if raw_last else 0
    lengths = data.draw(
        st.lists(st.tuples(st.integers(0, 600), st.integers(1, 2)), min_size=1, max_size=3)
    )
    case = Case(
        k_name,
        v_name,
        lengths,
        heads=1,
        group=data.draw(st.sampled_from([1, 2, 3, 5, 8])),
        dim=data.draw(st.sampled_from([64, 128])),
        block_size=data.draw(st.sampled_from([32, 64, 128])),
        raw_first=raw_first,
        raw_last=raw_last,
        bias=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
    )
    check(case, data.draw(st.sampled_from(ISAS)))
