"""What the suite catches: a backend with one fault each, and how results are told."""

from __future__ import annotations

import json

import numpy as np
import pytest

import kvcore
from kvcore import backend as registry
from kvcore import parity
from kvcore.cpu_backend import CpuBackend
from kvcore.parity import report

FAULTY = parity.Subject("cuda")


class Faulty(CpuBackend):
    """The CPU's operations by another name, whose `attend` goes through `spoil`."""

    name = "cuda"

    def describe(self, device):
        return "a faulty CPU"

    def attend(self, storage, layer, plan, q, layout, options, return_lse, out):
        out, lse = super().attend(storage, layer, plan, q, layout, options, True, None)
        self.spoil(out, lse, plan)
        return out, lse

    def spoil(self, out, lse, plan):
        pass


@pytest.fixture
def install(monkeypatch):
    def use(faulty):
        monkeypatch.setitem(registry._loaded, "cuda", faulty)

    return use


def results(select):
    return parity.run("cuda", select=[select])


def test_a_good_backend_passes(install):
    install(Faulty())
    found = parity.run("cuda")
    assert [r.case for r in found] == [case.name for case in parity.CASES]
    assert not [r.message for r in found if not r.passed]
    assert {r.device for r in found} == {"a faulty CPU"}


def test_an_error_in_out(install):
    class Off(Faulty):
        def spoil(self, out, lse, plan):
            out[-1, -1] *= 1 + 3e-2

    install(Off())
    for result in results("prefill/*"):
        assert not result.passed and result.worst > 1, result
        assert "times what is allowed" in result.message


def test_an_error_in_lse(install):
    class Off(Faulty):
        def spoil(self, out, lse, plan):
            lse[0] += 2e-2

    install(Off())
    assert not any(result.passed for result in results("decode/*"))


def test_a_nan_too_many_and_one_too_few(install):
    class Spread(Faulty):
        def spoil(self, out, lse, plan):
            out[0, 0] = np.nan

    class Lost(Faulty):
        def spoil(self, out, lse, plan):
            np.nan_to_num(out, copy=False)

    install(Spread())
    assert not any(result.passed for result in results("nan/*"))
    install(Lost())
    failed = {result.case for result in results("nan/causal-*") if not result.passed}
    assert len(failed) == 3


def test_a_row_that_sees_nothing(install):
    class Zero(Faulty):
        def spoil(self, out, lse, plan):
            lse[np.isneginf(lse)] = 0

    install(Zero())
    assert not any(result.passed for result in results("options/mask-*"))


def test_other_bits_the_second_time(install):
    class Wandering(Faulty):
        calls = 0

        def spoil(self, out, lse, plan):
            self.calls += 1
            out[0, 0, 0] = np.nextafter(out[0, 0, 0], np.float32(9 * (self.calls > 2)))

    install(Wandering())
    (result,) = results("decode/fp16")
    assert not result.same_bits and not result.passed
    assert "the second time" in result.message


@pytest.mark.parametrize("select", ["invariant/batch-fp16", "invariant/chunks-fp16"])
def test_bits_that_depend_on_company_or_chunks(install, select):
    class Dependent(Faulty):
        def spoil(self, out, lse, plan):
            out[-1] = np.nextafter(out[-1], np.float32(plan.num_tokens % 7))

    install(Dependent())
    (result,) = results(select)
    assert "other bits for the same tokens" in result.message


def test_a_byte_in_a_block_that_nobody_owns(install):
    class Straying(Faulty):
        def append(self, storage, layer, plan, k, v, layout):
            super().append(storage, layer, plan, k, v, layout)
            storage.layers[layer][0].array.view(np.uint8)[-1, 0, -1] = 0

    install(Straying())
    for result in results("append/*"):
        assert result.same_bytes is False and not result.passed


def test_a_copy_that_is_not_made(install):
    class Sharing(Faulty):
        def copy_blocks(self, storage, pool, plan):
            pass

    install(Sharing())
    assert not any(result.passed for result in results("sequences/fork-*"))


def test_raw_rows_that_do_not_come_back(install):
    class Forgetful(Faulty):
        def restore_raw(self, storage, group, plan):
            pass

    install(Forgetful())
    assert not any(result.passed for result in results("raw-rows/restored-*"))


def test_padding_that_is_not_zero(install):
    class Dirty(Faulty):
        def spoil(self, out, lse, plan):
            if out.ndim == 4:
                out[...] = np.where(out == 0, 1e-4, out)

    install(Dirty())
    (result,) = results("layouts/BSHD-fp16")
    assert "padding" in result.message


def test_an_exception_fails_its_case_alone(install):
    class Refusing(Faulty):
        def quantize(self, x, format, scales, bias):
            if format == "rot4":
                raise RuntimeError("no rot4 today")
            return super().quantize(x, format, scales, bias)

    install(Refusing())
    found = {result.case: result for result in results("quantize/*")}
    assert found.pop("quantize/rot4-128").message == "RuntimeError: no rot4 today"
    assert all(r.passed for r in found.values())


class TestSelection:
    def test_patterns_and_parts(self):
        names = [case.name for case in parity.select_cases(["decode/*", "quantize/rot4-128"])]
        assert "decode/fp32" in names and "quantize/rot4-128" in names
        assert all(name.startswith(("decode/", "quantize/rot4-128")) for name in names)

    def test_what_matches_nothing(self):
        with pytest.raises(kvcore.InvalidArgument, match=r"^select: "):
            parity.select_cases(["zzz"])

    def test_an_isa_is_the_cpus(self):
        with pytest.raises(kvcore.InvalidArgument, match=r"^isa: "):
            parity.run("cuda", "avx2")

    def test_the_isa_comes_back(self):
        before = kvcore.get_isa()
        parity.run("cpu", "scalar", ["decode/fp32"])
        assert kvcore.get_isa() == before


def test_lines_and_json():
    good = parity.Result("decode/fp32", "cpu", "avx2", 0.25, True, True, True, "", 0.5)
    bad = parity.Result("ops/x", "cpu", "avx2", np.inf, False, None, False, "boom", 0.25)
    assert report.line(good, 12).split() == ["decode/fp32", "0.250", "same", "same", "0.500"]
    first, second = report.line(bad, 12).splitlines()
    assert first.split() == ["ops/x", "inf", "OTHER", "-", "0.250"]
    assert second.strip() == "FAILED: boom"
    assert report.summary([good, bad]) == (
        "cpu, avx2: 1 of 2 cases passed in 0.8 s; largest error 0.25 of what is allowed "
        "(decode/fp32)."
    )
    records = json.loads(report.to_json([good, bad]))
    assert records[0]["worst"] == 0.25 and records[1]["worst"] is None
