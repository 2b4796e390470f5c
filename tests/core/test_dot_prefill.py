"""Prefill by bf16 dot products: when it is taken, how exact it is, what must not change its bits.

Where CPUID hides the instructions, conftest.py finds out whether the CPU has them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.library import ISAS, OK, Step, attend, machine
from core.test_attend_kernels import Case, relative_error

DOTS = "avx512_bf16"
#: New tokens of a sequence from which on it is taken (kernels.h).
TOKENS = 32

needs_dots = pytest.mark.skipif(
    DOTS not in ISAS, reason="the CPU has no AVX512_BF16, or died of it in conftest.py's probe"
)

OPTIONS = {
    "none": {},
    "softcap": {"softcap": 1.5},
    "window": {"window": 37},
    "alibi and sinks": {
        "alibi_slopes": np.array([0.5, 0.25, 0.125], np.float32),
        "sinks": np.array([1.0, 0.0, -1.0], np.float32),
    },
}


def case_of(lengths, k_format="bf16", v_format="bf16", **shape) -> Case:
    return Case(lengths, heads=1, k_format=k_format, v_format=v_format, **shape)


def run(isa: str, case: Case, threads: int = 1, **options) -> tuple[bytes, bytes]:
    with machine(isa, threads):
        out, lse = case.run(**options)
    return out.tobytes(), lse.tobytes()


@needs_dots
class TestChoice:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("formats", [("fp32",) * 2, ("fp16", "bf16"), ("bf16", "fp16")])
    def test_other_formats_have_the_bits_of_avx512(self, formats, options) -> None:
        case = case_of([(200, 70), (0, 300)], *formats, group=3)
        assert run(DOTS, case, **options) == run("avx512", case, **options)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_exact_has_the_bits_of_avx512(self, options) -> None:
        case = case_of([(200, 70), (0, 300)], group=3)
        assert run(DOTS, case, exact=1, **options) == run("avx512", case, exact=1, **options)

    @pytest.mark.parametrize("group", [1, 16])
    def test_new_tokens_decide_and_not_rows(self, group: int) -> None:
        few = case_of([(300, TOKENS - 1), (0, 1)], group=group)
        assert run(DOTS, few) == run("avx512", few)
        many = case_of([(300, TOKENS)], group=group)
        assert run(DOTS, many) != run("avx512", many)


@needs_dots
class TestError:
    @pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
    @pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
    @pytest.mark.parametrize("dims", [(8, 8), (24, 72), (64, 64), (128, 128), (576, 512)])
    def test_stays_within_what_is_promised(self, dims, spread: float, dtype: str) -> None:
        lengths = [(0, 100), (300, 33), (1000, 40)]
        case = case_of(lengths, dim=dims[0], dim_v=dims[1], spread=spread, dtype=dtype, group=2)
        with machine(DOTS):
            out, lse = case.run()
        exact, exact_lse, _, lengths_of_values = case.exact()
        error = np.linalg.norm(out - exact, axis=-1)
        assert (error <= 2e-3 * lengths_of_values).all()
        assert np.abs(lse - exact_lse).max() <= 2e-3
        # On average over rows it holds against the exact row's length as well.
        assert 1e-5 < relative_error(case, out)[0].mean() <= 2e-3

    def test_equal_values_are_averaged_without_error(self) -> None:
        """The weights are rounded, but they still add up to 1."""
        case = case_of([(0, 300)], dim=32)
        case.v[:] = np.float32(1.25)
        with machine(DOTS):
            out, _ = case.run()
        np.testing.assert_allclose(out, 1.25, rtol=2e-6)


@needs_dots
class TestBits:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_threads_and_block_size(self, options) -> None:
        lengths = [(3000, 250), (0, 33), (700, 5)]
        expected = run(DOTS, case_of(lengths, group=3), **options)
        for threads, block_size in ((2, 16), (3, 64), (16, 4096)):
            case = case_of(lengths, group=3, block_size=block_size)
            assert run(DOTS, case, threads, **options) == expected

    @pytest.mark.parametrize("group", [1, 7])
    def test_alone_or_in_a_batch(self, group: int) -> None:
        lengths = [(0, 32), (900, 31), (10, 241), (5, 1), (511, 50)]
        case = case_of(lengths, group=group)
        with machine(DOTS, 3):
            out, _ = case.run()
            for s, (stored, new) in enumerate(lengths):
                rows = slice(case.step.query_starts[s], case.step.query_starts[s + 1])
                alone = np.empty((new, *out.shape[1:]), np.float32)
                step = Step(case.block_size, [new], [stored + new], [case.rows[s]])
                assert attend(step, case.q[rows], case.k, case.v, case.scale, alone) == OK
                assert alone.tobytes() == out[rows].tobytes(), s

    def test_over_shared_blocks(self) -> None:
        """Two that decode and one with a prompt begin with the same blocks, of which two share."""
        stored, news = 1024, [1, 40, 1, 16]
        case = case_of([(stored, 64)], dim=64, block_size=16)
        rows = [case.rows[0]] * len(news)
        step = Step(16, news, [stored + n for n in news], rows)
        q = np.random.default_rng(1).standard_normal((sum(news), 1, 64), np.float32)
        out = np.empty_like(q)
        with machine(DOTS, 2):
            assert attend(step, q, case.k, case.v, case.scale, out) == OK
            for s, new in enumerate(news):
                span = slice(step.query_starts[s], step.query_starts[s + 1])
                alone = np.empty_like(q[span])
                single = Step(16, [new], [stored + new], rows[:1])
                assert attend(single, q[span], case.k, case.v, case.scale, alone) == OK
                assert alone.tobytes() == out[span].tobytes(), s


@needs_dots
@pytest.mark.parametrize("bad", [100, 101, 160, 161, 229])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_later_token_cannot_reach_a_row(bad: int, poison: float) -> None:
    """Tokens are taken in pairs: the other one of a pair may be one that a row does not see."""
    case = case_of([(100, 130)], dim=24, group=2)
    with machine(DOTS):
        clean, _ = case.run()
        block, offset = case.rows[0][bad // 16], bad % 16
        case.v[block, 0, offset] = poison
        out, _ = case.run()
        case.k[block, 0, offset] = np.nan
        keyed, _ = case.run()
    assert out[: bad - 100].tobytes() == clean[: bad - 100].tobytes()
    assert keyed[: bad - 100].tobytes() == clean[: bad - 100].tobytes()
    assert not np.isfinite(out[bad - 100 :]).any()
    assert np.isnan(keyed[bad - 100 :]).all()


@needs_dots
def test_masks_hide_what_is_beside_a_token() -> None:
    stored, new = 90, 64
    case = case_of([(stored, new)], dim=40, group=3)
    mask = np.random.default_rng(2).random((new, stored + new)) < 0.4
    unseen = [0, 33, 64, 65, 153]
    mask[:, unseen] = False
    mask[5] = False
    for j in unseen:
        case.k[case.rows[0][j // 16], :, j % 16] = np.nan
        case.v[case.rows[0][j // 16], :, j % 16] = np.nan
    bits, start = np.packbits(mask, axis=1, bitorder="little"), np.zeros(1, np.int64)
    given = {"mask": bits, "mask_size": bits.size, "mask_offsets": start}
    with machine(DOTS):
        out, lse = case.run(**given)
        reference, reference_lse = case.run(exact=1, **given)
    assert not out[5].any() and np.isneginf(lse[5]).all()
    assert np.isfinite(out).all()
    assert np.abs(out - reference).max() < 0.02
    np.testing.assert_allclose(lse, reference_lse, atol=2e-3)


def isas_with(**environment: str) -> list[str]:
    """The ISA in use, then all that are available, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "import kvcore; print(kvcore.get_isa(), *kvcore.available_isas())"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.stdout.split() or [done.stderr.splitlines()[-1]]


@needs_dots
def test_it_is_chosen_where_it_is_faster() -> None:
    """CPUs of AMD do it at twice the rate of FMA; others take it when they are told to."""
    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    claim = {"KVCORE_CPU_FEATURES": "+avx512_bf16"}
    used, *available = isas_with(**claim)
    first = [DOTS, "avx512_vnni"] if amd else ["avx512_vnni", DOTS]
    assert used == first[0] and available[:2] == first
    assert isas_with(KVCORE_ISA=DOTS, **claim)[0] == DOTS


@pytest.mark.parametrize("claim", ["avx512_bf16", "+avx9", "+avx512_bf16,-avx2", "+avx512_bf1"])
def test_a_claim_that_means_nothing_is_an_error(claim: str) -> None:
    [message] = isas_with(KVCORE_CPU_FEATURES=claim)
    assert message.startswith("kvcore.errors.UnsupportedError: KVCORE_CPU_FEATURES: ")
    assert repr(claim.split(",")[-1]) in message
