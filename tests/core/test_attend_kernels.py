"""Attention below the Python API: every ISA against float64, and the bits that must not change."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from core.library import DTYPES, ISAS, OK, Step, append, attend, machine


@dataclass
class Case:
    """Sequences of given (stored, new) lengths over blocks in a shuffled pool full of NaN."""

    lengths: list[tuple[int, int]]
    heads: int = 2
    group: int = 1
    dim: int = 64
    dim_v: int | None = None
    block_size: int = 16
    k_format: str = "fp32"
    v_format: str = "fp32"
    dtype: str = "fp32"
    seed: int = 0
    spread: float = 1.0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        dv = self.dim_v or self.dim
        columns = [-(-(stored + new) // self.block_size) for stored, new in self.lengths]
        total = sum(columns) + 3
        ids = np.random.default_rng(self.block_size).permutation(total)
        starts = np.concatenate([[0], np.cumsum(columns)])
        self.rows = [ids[a:b] for a, b in itertools.pairwise(starts)]
        shape = (total, self.heads, self.block_size)
        self.k = np.full((*shape, self.dim), np.nan, DTYPES[self.k_format])
        self.v = np.full((*shape, dv), np.nan, DTYPES[self.v_format])
        self.keys, self.values, slots = [], [], []
        for (stored, new), row in zip(self.lengths, self.rows, strict=True):
            j = np.arange(stored + new)
            slots.append(row[j // self.block_size] * self.block_size + j % self.block_size)
            self.keys.append(rng.standard_normal((j.size, self.heads, self.dim), np.float32))
            self.values.append(rng.standard_normal((j.size, self.heads, dv), np.float32))
        fill = Step(
            self.block_size,
            [k.shape[0] for k in self.keys],
            [k.shape[0] for k in self.keys],
            slots=np.concatenate(slots),
        )
        assert append(fill, np.concatenate(self.keys), self.k) == OK
        assert append(fill, np.concatenate(self.values), self.v) == OK
        tokens = sum(new for _, new in self.lengths)
        q = rng.standard_normal((tokens, self.heads * self.group, self.dim), np.float32)
        self.q = (self.spread * q).astype(DTYPES[self.dtype])
        self.scale = float(np.float32(self.dim**-0.5))
        self.step = Step(
            self.block_size,
            [new for _, new in self.lengths],
            [stored + new for stored, new in self.lengths],
            self.rows,
        )

    def run(self, out_dtype: str = "fp32", **options) -> tuple[np.ndarray, np.ndarray]:
        out = np.full((*self.q.shape[:2], self.v.shape[3]), 7, DTYPES[out_dtype])
        lse = np.full(self.q.shape[:2], 7, np.float32)
        assert attend(self.step, self.q, self.k, self.v, self.scale, out, lse, **options) == OK
        return out, lse

    def exact(self):
        """out, lse, largest |score| and the p-weighted norm of v, in float64."""
        outs, lses, tops, norms = [], [], [], []
        for s, (stored, new) in enumerate(self.lengths):
            start = self.step.query_starts[s]
            k = self.keys[s].astype(self.k.dtype).astype(np.float64)
            v = self.values[s].astype(self.v.dtype).astype(np.float64)
            q = (
                self.q[start : start + new]
                .astype(np.float64)
                .reshape(new, self.heads, self.group, self.dim)
            )
            score = q.transpose(1, 2, 0, 3) @ k.transpose(1, 2, 0)[:, None] * self.scale
            hidden = np.arange(stored + new) > np.arange(stored, stored + new)[:, None]
            tops.append(np.where(hidden, 0, np.abs(score)).max(-1))
            score = np.where(hidden, -np.inf, score)
            m = score.max(-1, keepdims=True)
            p = np.exp(score - m)
            lses.append(m[..., 0] + np.log(p.sum(-1)))
            p /= p.sum(-1, keepdims=True)
            outs.append(p @ v.transpose(1, 0, 2)[:, None])
            norms.append((p @ np.linalg.norm(v, axis=-1).T[:, None, :, None])[..., 0])

        def joined(parts):
            return np.concatenate(
                [np.moveaxis(x, 2, 0).reshape(x.shape[2], -1, *x.shape[3:]) for x in parts]
            )

        return joined(outs), joined(lses), joined(tops), joined(norms)


def relative_error(case: Case, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norm-wise error per token and head, and the factor of its tolerance."""
    exact, _, tops, norms = case.exact()
    size = np.maximum(np.linalg.norm(exact, axis=-1), 0.1 * norms)
    error = np.linalg.norm(out.astype(np.float64) - exact, axis=-1) / size
    return error, np.maximum(1, tops / 8)


SHAPES = [
    Case([(0, 1)], heads=1, dim=8),
    Case([(0, 5), (37, 1), (0, 33), (255, 1), (256, 1), (300, 2)], heads=3, group=3),
    Case([(1000, 1), (0, 700), (511, 17)], heads=2, group=4, dim=128, block_size=64),
    Case([(2000, 1), (3, 1), (900, 1)], heads=1, group=16, dim=24, block_size=32),
    Case([(100, 300)], heads=1, group=7, dim=40, dim_v=72, block_size=16),
    Case([(0, 300), (700, 1)], heads=2, group=2, dim=256, block_size=1024),
    Case([(515, 5)], heads=1, group=1, dim=576, dim_v=512, block_size=128),
    Case([(0, 9), (0, 90)], heads=2, group=1, dim=1024, block_size=16),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: f"{c.dim}x{c.group}b{c.block_size}")
def test_matches_float64(shape: Case, fmt: str, isa: str) -> None:
    case = Case(
        shape.lengths, shape.heads, shape.group, shape.dim, shape.dim_v, shape.block_size, fmt, fmt
    )
    with machine(isa):
        out, lse = case.run(exact=1)
    error, factor = relative_error(case, out)
    assert (error / factor).max() < 2e-6
    _, exact_lse, _, _ = case.exact()
    assert (np.abs(lse - exact_lse) <= 2e-6 * factor + 2.0**-23 * np.abs(exact_lse)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spread", [8.0, 60.0])
def test_large_scores(isa: str, spread: float) -> None:
    case = Case([(600, 3), (0, 40)], dim=128, group=2, spread=spread)
    with machine(isa):
        out, _ = case.run()
    error, factor = relative_error(case, out)
    assert (error / factor).max() < 2e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "unit"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_half_queries_and_outputs(isa: str, dtype: str, unit: float) -> None:
    case = Case([(70, 3), (300, 1)], k_format="bf16", v_format="fp16", dtype=dtype, group=2)
    with machine(isa):
        out, _ = case.run(dtype)
    error, factor = relative_error(case, out)
    assert (error <= 2e-6 * factor + unit).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
class TestBits:
    """The same q, k and v give the same bits, whatever stands around them."""

    lengths = ((3000, 1), (0, 70), (250, 130), (5, 1), (1023, 2))

    def whole(self, fmt: str, **changes) -> Case:
        return Case(
            list(self.lengths), heads=2, group=3, dim=40, k_format=fmt, v_format=fmt, **changes
        )

    def test_threads(self, fmt: str, isa: str) -> None:
        case = self.whole(fmt)
        with machine(isa, 1):
            out, lse = case.run()
        for threads in (2, 3, 4, 16):
            with machine(isa, threads):
                other, other_lse = case.run()
            assert other.tobytes() == out.tobytes()
            assert other_lse.tobytes() == lse.tobytes()

    def test_one_long_sequence(self, fmt: str, isa: str) -> None:
        case = Case([(20000, 1)], heads=1, group=2, dim=64, k_format=fmt, v_format=fmt)
        with machine(isa, 1):
            out, lse = case.run()
        for threads in (2, 7):
            with machine(isa, threads):
                other, other_lse = case.run()
            assert other.tobytes() == out.tobytes()
            assert other_lse.tobytes() == lse.tobytes()

    def test_batch(self, fmt: str, isa: str) -> None:
        case = self.whole(fmt)
        with machine(isa):
            out, _ = case.run()
            for s, (stored, new) in enumerate(self.lengths):
                start = case.step.query_starts[s]
                alone = np.empty((new, *out.shape[1:]), np.float32)
                step = Step(case.block_size, [new], [stored + new], [case.rows[s]])
                q = case.q[start : start + new]
                assert attend(step, q, case.k, case.v, case.scale, alone) == OK
                assert alone.tobytes() == out[start : start + new].tobytes()

    def test_chunks(self, fmt: str, isa: str) -> None:
        case = Case([(0, 600)], heads=1, group=3, dim=40, k_format=fmt, v_format=fmt)
        with machine(isa):
            out, _ = case.run(exact=1)
            for cuts in ([1, 599], [256, 256, 88], [255, 2, 100, 243]):
                done = 0
                for count in cuts:
                    part = np.empty((count, *out.shape[1:]), np.float32)
                    step = Step(case.block_size, [count], [done + count], case.rows)
                    q = case.q[done : done + count]
                    assert attend(step, q, case.k, case.v, case.scale, part, exact=1) == OK
                    assert part.tobytes() == out[done : done + count].tobytes()
                    done += count

    def test_block_size_and_layout(self, fmt: str, isa: str) -> None:
        case = self.whole(fmt)
        with machine(isa):
            out, _ = case.run()
            for block_size in (32, 128, 4096):
                assert self.whole(fmt, block_size=block_size).run()[0].tobytes() == out.tobytes()
            k, v = (
                np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
                for x in (case.k, case.v)
            )
            other = np.empty_like(out)
            assert attend(case.step, case.q, k, v, case.scale, other) == OK
            assert other.tobytes() == out.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_row(isa: str) -> None:
    case = Case([(0, 40), (300, 3)], dim=48, group=2)
    with machine(isa):
        clean, _ = case.run()
        case.k[case.rows[0][0], 0, 7, 3] = np.nan  # token 7 of sequence 0, head 0
        out, lse = case.run()
    hit = np.zeros(out.shape[:2], bool)
    hit[7:40, :2] = True
    assert np.isnan(out[hit]).all() and np.isnan(lse[hit]).all()
    assert out[~hit].tobytes() == clean[~hit].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_infinite_value_hits_one_dim(isa: str) -> None:
    case = Case([(20, 1)], dim=16, heads=1)
    case.v[case.rows[0][0], 0, 3, 5] = np.inf
    with machine(isa):
        out, _ = case.run()
    assert np.isposinf(out[0, 0, 5])
    assert np.isfinite(np.delete(out[0, 0], 5)).all()


def test_isas_agree() -> None:
    case = Case([(700, 2), (0, 50)], dim=128, group=4, k_format="bf16", v_format="bf16")
    results = []
    for isa in ISAS:
        with machine(isa):
            results.append(case.run(exact=1)[0])
    for result in results[1:]:
        assert np.abs(result - results[0]).max() < 4e-6


@pytest.mark.parametrize("out_dtype", ["fp32", "bf16"])
def test_padded_rows(out_dtype: str) -> None:
    case = Case([(70, 3), (0, 9), (300, 1)], group=2)
    out, _ = case.run(out_dtype)
    counts, starts = case.step.counts, case.step.query_starts
    for transpose in (False, True):  # BSHD, then BHSD seen as BSHD
        q = np.full((3, 11, *case.q.shape[1:]), np.nan, np.float32)
        padded = np.full((3, 9, *out.shape[1:]), 5, DTYPES[out_dtype])
        for s, n in enumerate(counts):
            q[s, :n] = case.q[starts[s] : starts[s] + n]
        if transpose:
            q, padded = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, padded))
        assert attend(case.step, q, case.k, case.v, case.scale, padded) == OK
        for s, n in enumerate(counts):
            assert padded[s, :n].tobytes() == out[starts[s] : starts[s] + n].tobytes()
            assert not padded[s, n:].astype(np.float32).any()
