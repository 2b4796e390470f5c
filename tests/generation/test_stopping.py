"""Stop strings in text that comes in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import InvalidArgument, InvalidType
from kvcore.models.stopping import StopMatcher, StopRules


def feed(pieces, strings):
    matcher = StopMatcher(tuple(strings))
    out = []
    for piece in pieces:
        out.append(matcher.push(piece))
        if matcher.stopped:
            return out, True
    return [*out, matcher.finish()], False


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["one", " two"], [], ["one", " two", ""]),
        (["on", "e S", "TO", "P more"], ["STOP"], ["on", "e ", "", ""]),
        (["a S", "T", "ART"], ["STOP"], ["a ", "", "START", ""]),
        (["a ST"], ["STOP"], ["a ", "ST"]),
        (["aab"], ["ab"], ["a"]),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", ""]),
        (["\n", "\n", "x"], ["\n\n"], ["", ""]),
        (["xSTOPy", "z"], ["STOP"], ["x"]),
    ],
)
def test_pieces(pieces, stop, expected):
    out, _ = feed(pieces, stop)
    assert out == expected


def test_the_string_that_is_complete_first_counts():
    # "bc" is complete before "abcd", however the text is cut.
    for pieces in (["abcd"], ["ab", "cd"], ["a", "b", "c", "d"]):
        out, stopped = feed(pieces, ["abcd", "bc"])
        assert stopped and "".join(out) == "a"


def naive(text, strings):
    for end in range(len(text) + 1):
        ends = [s for s in strings if text[:end].endswith(s)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


@given(
    st.lists(st.text("abc", max_size=6), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_any_cut_gives_what_a_search_of_the_whole_text_gives(pieces, strings):
    out, stopped = feed(pieces, strings)
    assert ("".join(out), stopped) == naive("".join(pieces), strings)


@given(
    st.lists(st.text("abc", max_size=6), min_size=1, max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_is_let_through_as_soon_as_it_is_certain(pieces, strings):
    matcher = StopMatcher(tuple(strings))
    seen = released = ""
    for piece in pieces:
        released += matcher.push(piece)
        seen += piece
        if matcher.stopped:
            return
        held = seen[len(released) :]
        assert seen == released + held
        assert not held or any(s.startswith(held) and s != held for s in strings)


def test_rules_take_one_or_several_strings_and_ids():
    assert StopRules.parse(None, 10) == StopRules()
    assert StopRules.parse("x", 10) == StopRules(strings=("x",))
    assert StopRules.parse(3, 10) == StopRules(frozenset({3}))
    both = StopRules.parse(["x", np.int32(3), "y", 4], 10)
    assert both == StopRules(frozenset({3, 4}), ("x", "y"))
    assert all(type(token) is int for token in both.tokens)


@pytest.mark.parametrize(
    ("stop", "error"),
    [
        ("", InvalidArgument),
        (["a", ""], InvalidArgument),
        (10, InvalidArgument),
        (-1, InvalidArgument),
        (1.5, InvalidType),
        ([True], InvalidType),
        ([None], InvalidType),
    ],
)
def test_bad_rules_are_named(stop, error):
    with pytest.raises(error, match=r"^stop: expected .* got "):
        StopRules.parse(stop, 10)
