"""Every backend keeps the contract: the cases of kvcore.parity, on every instruction set."""

from __future__ import annotations

import pytest

import kvcore
from kvcore import parity


def assert_passes(case, subject):
    result = parity.try_case(case, subject, subject.device)
    assert result.passed, result.message


def named(case):
    return case.name


@pytest.mark.parametrize("isa", kvcore.available_isas())
@pytest.mark.parametrize("case", parity.CASES, ids=named)
def test_on_the_cpu(case, isa):
    assert_passes(case, parity.Subject("cpu", isa))


def test_names_are_topics_and_differ():
    names = [case.name for case in parity.CASES]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 1 for name in names)
