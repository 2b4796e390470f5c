from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import InvalidArgument, ModelFileError
from kvcore.models import Tokenizer
from kvcore.models.gguf_tokenizer import build_tokenizer

pytest.importorskip("tokenizers")

PATH = Path("model.gguf")
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_characters() -> list[str]:
    """The character that GPT-2's byte-level BPE writes for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = (b for b in range(256) if b not in kept)
    characters = {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(moved)}
    return [characters[b] for b in range(256)]


def byte_level(**changes: Any) -> dict[str, Any]:
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = CONTROL + byte_characters() + joined + ["<tool>"]
    types = [3] * len(CONTROL) + [1] * (256 + len(joined)) + [4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | changes


def build(metadata: dict[str, Any], eos: frozenset[int] = frozenset({2})) -> Tokenizer:
    return build_tokenizer(PATH, {k: v for k, v in metadata.items() if v is not None}, eos)


BYTES = build(byte_level())


def test_byte_level_merges_and_special_tokens() -> None:
    ids = BYTES.encode("hello w<|im_end|><tool>")
    names = [BYTES.backend.id_to_token(token) for token in ids]
    assert names == ["hello", "Ġw", "<|im_end|>", "<tool>"]
    assert BYTES.decode(ids) == "hello w<tool>"
    assert BYTES.decode(ids, skip_special=False) == "hello w<|im_end|><tool>"
    assert BYTES.eos_ids == {0, 2}
    assert BYTES.token_to_id("<|im_start|>") == 1
    assert BYTES.token_to_id("nothing") is None


def test_digits_stand_alone_in_smollm_and_in_threes_in_llama3() -> None:
    merges = ["1 2", "12 3", "3 4"]
    extra = {
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.tokens": [*byte_characters(), "12", "123", "34"],
        "tokenizer.ggml.token_type": None,
        "tokenizer.ggml.bos_token_id": None,
    }
    pieces = {}
    for pre in ("smollm", "llama-bpe", "qwen2", "gpt-2"):
        changes = extra | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        tokenizer = build(byte_level(**changes), frozenset())
        pieces[pre] = [tokenizer.backend.id_to_token(t) for t in tokenizer.encode("1234")]
    assert pieces["smollm"] == pieces["qwen2"] == ["1", "2", "3", "4"]
    assert pieces["llama-bpe"] == ["123", "4"]
    assert pieces["gpt-2"] == ["123", "4"]


def test_bos_follows_the_file_and_the_kind() -> None:
    assert BYTES.encode("a")[0] != 1
    added = build(byte_level(**{"tokenizer.ggml.add_bos_token": True}))
    assert added.encode("a") == [1, *BYTES.encode("a")]
    assert added.encode("a", add_special=False) == BYTES.encode("a")
    llama3 = build(byte_level(**{"tokenizer.ggml.pre": "llama-bpe"}))
    assert llama3.encode("a")[0] == 1


@given(st.text())
def test_byte_level_round_trip(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text), skip_special=False) == text


@given(st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=40))
def test_stream_equals_decode_for_any_ids(ids: list[int]) -> None:
    for skip in (True, False):
        stream = BYTES.stream(skip)
        deltas = [stream.push(token) for token in ids]
        assert "".join(deltas) + stream.flush() == BYTES.decode(ids, skip)


@given(st.text(st.sampled_from("aé日🙂 \N{REPLACEMENT CHARACTER}"), max_size=12))
def test_stream_never_splits_a_character(text: str) -> None:
    stream = BYTES.stream()
    so_far = ""
    for token in BYTES.encode(text):
        so_far += stream.push(token)
        assert text.startswith(so_far)
    assert so_far + stream.flush() == text


def test_stream_holds_an_incomplete_character() -> None:
    first, *middle, last = BYTES.encode("🙂")
    stream = BYTES.stream()
    assert [stream.push(token) for token in (first, *middle)] == ["", "", ""]
    assert stream.push(last) == "🙂"
    stream.push(first)
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""


SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def sentencepiece(**changes: Any) -> dict[str, Any]:
    pieces = [(SPACE, -3.0), ("a", -4.0), ("b", -5.0), ("ab", -1.0), (SPACE + "ab", -2.0)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    scores = [0.0] * len(tokens) + [score for _, score in pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + [piece for piece, _ in pieces],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


PIECES = build(sentencepiece())


def test_sentencepiece_merges_by_score() -> None:
    names = [PIECES.backend.id_to_token(token) for token in PIECES.encode("ab aab")]
    assert names == ["<s>", SPACE + "ab", SPACE, "a", "ab"]
    assert PIECES.decode(PIECES.encode("ab aab")) == "ab aab"


@given(st.text(st.sampled_from("ab é日🙂"), min_size=1))
def test_sentencepiece_round_trip_and_stream(text: str) -> None:
    ids = PIECES.encode(text)
    assert PIECES.decode(ids) == text
    stream = PIECES.stream()
    assert "".join(stream.push(token) for token in ids) + stream.flush() == text


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model", {"tokenizer.ggml.model": "wordpiece"}),
        ("model", {"tokenizer.ggml.model": None}),
        ("pre", {"tokenizer.ggml.pre": "never-heard-of"}),
        ("tokens", {"tokenizer.ggml.tokens": None}),
        ("tokens", {"tokenizer.ggml.tokens": [1, 2]}),
        ("merges", {"tokenizer.ggml.merges": None}),
        ("vocabulary", {"tokenizer.ggml.merges": ["zz y"]}),
        ("vocabulary", {"tokenizer.ggml.merges": ["zz"]}),
        ("token_type", {"tokenizer.ggml.token_type": [1]}),
    ],
)
def test_bad_metadata_names_the_key(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match=key) as raised:
        build(byte_level(**changes))
    assert "model.gguf" in str(raised.value)


def test_bos_outside_the_vocabulary() -> None:
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 999}
    with pytest.raises(ModelFileError, match="bos_token_id"):
        build(byte_level(**changes))


def test_bad_scores() -> None:
    with pytest.raises(ModelFileError, match="scores"):
        build(sentencepiece(**{"tokenizer.ggml.scores": [0.0]}))


def test_bad_arguments() -> None:
    with pytest.raises(InvalidArgument, match="text"):
        BYTES.encode(3)  # type: ignore[arg-type]
    for token in (-1, BYTES.vocab_size):
        with pytest.raises(InvalidArgument, match="ids"):
            BYTES.decode([token])
        with pytest.raises(InvalidArgument, match="ids"):
            BYTES.stream().push(token)


TEMPLATE = """{% for message in messages %}
{% if message.role == 'judge' %}{{ raise_exception('no judge') }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_chat() -> None:
    pytest.importorskip("jinja2")
    tokenizer = build(byte_level(**{"tokenizer.chat_template": TEMPLATE}))
    ids = tokenizer.chat([{"role": "user", "content": "hello"}])
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special=False) == text
    assert ids.count(1) == 2 and ids.count(2) == 1
    with pytest.raises(InvalidArgument, match="no judge"):
        tokenizer.chat([{"role": "judge", "content": "hello"}])
    with pytest.raises(InvalidArgument, match=r"messages\[1\]"):
        tokenizer.chat([{"role": "user", "content": "hello"}, {"role": "user"}])
    with pytest.raises(InvalidArgument, match="chat template"):
        BYTES.chat([{"role": "user", "content": "hello"}])


def test_chat_template_cannot_reach_python() -> None:
    pytest.importorskip("jinja2")
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = build(byte_level(**{"tokenizer.chat_template": template}))
    with pytest.raises(InvalidArgument, match="template"):
        tokenizer.chat([{"role": "user", "content": "hello"}])
