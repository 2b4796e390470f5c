"""Pairs of formats as people write them."""

from __future__ import annotations

import pytest

from kvcore import InvalidArgument
from kvcore.evaluation import Case, parse_cases


def test_every_quantized_pair_with_and_without_raw_rows():
    assert parse_cases("bf16, rot8+bias/rot4,int8") == [
        Case("bf16", "bf16"),
        Case("rot8", "rot4", key_bias=True),
        Case("rot8", "rot4", key_bias=True, raw_first=4, raw_last=32),
        Case("int8", "int8"),
        Case("int8", "int8", raw_first=4, raw_last=32),
    ]


def test_one_way_only():
    assert parse_cases("rot4/rot4", "without") == [Case("rot4", "rot4")]
    assert parse_cases("rot4/rot4", "with", 8, 64) == [Case("rot4", "rot4", False, 8, 64)]
    assert parse_cases("fp16/float32", "with") == [Case("fp16", "fp32")]


def test_names():
    names = [case.name for case in parse_cases("rot8+bias/rot4,chan4/rot4,bf16/fp8", "without")]
    assert names == ["rot8+bias/rot4", "chan4/rot4", "bf16/fp8_e4m3"]


def test_a_pair_twice_counts_once():
    assert len(parse_cases("fp16,fp16/fp16,int8,int8")) == 3


@pytest.mark.parametrize(
    ("formats", "raw", "message"),
    [
        ("", "both", "at least one pair"),
        ("rot9", "both", "expected one of fp32"),
        ("rot8+b/rot8", "both", r"expected K\+bias/V, got 'rot8\+b/rot8'"),
        ("bf16+bias/rot8", "both", "quantized key format"),
        ("int8_static+bias/rot8", "both", "int8_static without"),
        ("rot8/rot8/rot8", "both", "got 'rot8/rot8'"),
        ("rot8", "some", "raw: expected one of both, with, without, got 'some'"),
    ],
)
def test_bad_pairs(formats, raw, message):
    with pytest.raises(InvalidArgument, match=message):
        parse_cases(formats, raw)


def test_a_case_that_needs_a_calibration_says_so(model):
    for case in (Case("rot8", "rot8", key_bias=True), Case("int8_static", "rot8")):
        with pytest.raises(InvalidArgument, match="calibration: expected one"):
            case.spec(model, 64, None)
