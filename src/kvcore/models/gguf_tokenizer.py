"""The tokenizer that a GGUF file's metadata describes, built with the `tokenizers` package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvcore.errors import ModelFileError
from kvcore.models.files import Fields, require
from kvcore.models.tokenizer import Tokenizer

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6

# How pre-tokenizers cut a text into words before merging, by tokenizer.ggml.pre. Digits: how many
# stand together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _WORDS % "{1,3}"
_QWEN2_WORDS = _WORDS % ""

# Names by which models mark the end of a turn or text; the metadata has room for one of them only.
_END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")


def build_tokenizer(path: Path, metadata: Mapping[str, Any], eos_ids: frozenset[int]) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Args:
        path: named in errors.
        metadata: keys and plain values of the file.
        eos_ids: ends of text that the metadata names.

    Raises:
        ModelFileError: for missing or inconsistent metadata or a kind that kvcore does not know.
    """
    fields = Fields(path, metadata)
    kind = fields.typed("tokenizer.ggml.model", str)
    if kind not in _MODELS:
        raise fields.error("tokenizer.ggml.model", " or ".join(_MODELS), repr(kind))
    tokens = _list(fields, "tokenizer.ggml.tokens", str)
    types = _list(fields, "tokenizer.ggml.token_type", int, default=[1] * len(tokens))
    if len(types) != len(tokens):
        expected = f"{len(tokens)} entries, one for each token,"
        raise fields.error("tokenizer.ggml.token_type", expected, len(types))
    try:
        backend, starts_with_bos = _MODELS[kind](fields, tokens, types)
        _add_special_tokens(backend, tokens, types)
        _add_bos(backend, fields, tokens, starts_with_bos)
    except ModelFileError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise ModelFileError(f"{path}: a consistent vocabulary expected: {error}") from error

    ends = {
        token
        for token, (name, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ == _CONTROL and name in _END_NAMES
    }
    names = {}
    for role in ("bos", "eos"):
        token = fields.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None and 0 <= int(token) < len(tokens):
            names[f"{role}_token"] = tokens[int(token)]
    return Tokenizer(
        backend,
        eos_ids=eos_ids | ends,
        chat_template=fields.get("tokenizer.chat_template"),
        special_tokens=names,
    )


def _list(fields: Fields, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
    values = fields.get(key, default)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        came = "nothing" if values is None else "something else"
        raise fields.error(key, f"a list of {kind.__name__}", came)
    return values


def _byte_level_bpe(fields: Fields, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """The byte-level BPE of GPT-2; returns the tokenizer and whether a text starts with BOS."""
    tk = require("tokenizers")
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        expected = f"one of {', '.join(_PRE_TOKENIZERS)}"
        raise fields.error("tokenizer.ggml.pre", expected, repr(pre))
    merges = [tuple(m.split(" ", 1)) for m in _list(fields, "tokenizer.ggml.merges", str)]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it is, even where merging would not arrive at it.
    model = tk.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    backend = tk.Tokenizer(model)
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre](tk.pre_tokenizers, tk.Regex)
    if pre == "qwen2":
        backend.normalizer = tk.normalizers.NFC()
    backend.decoder = tk.decoders.ByteLevel()
    return backend, pre == "llama-bpe"


def _gpt2_words(pre: Any, regex: Any) -> Any:
    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_words(pre: Any, regex: Any) -> Any:
    return pre.Sequence([pre.Digits(individual_digits=True), _gpt2_words(pre, regex)])


def _split_words(pattern: str) -> Callable[[Any, Any], Any]:
    def build(pre: Any, regex: Any) -> Any:
        words = pre.Split(regex(pattern), behavior="isolated")
        return pre.Sequence([words, pre.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


_PRE_TOKENIZERS: Mapping[str, Callable[[Any, Any], Any]] = {
    "default": _gpt2_words,
    "gpt-2": _gpt2_words,
    "smollm": _smollm_words,
    "llama-bpe": _split_words(_LLAMA3_WORDS),
    "qwen2": _split_words(_QWEN2_WORDS),
}


def _sentencepiece_bpe(fields: Fields, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """The SentencePiece BPE of Llama 1 and 2, whose merges follow from its scores."""
    tk = require("tokenizers")
    scores = _list(fields, "tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        expected = f"{len(tokens)} entries, one for each token,"
        raise fields.error("tokenizer.ggml.scores", expected, len(scores))
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[int(fields.get("tokenizer.ggml.unknown_token_id", 0))]
    model = tk.models.BPE(
        vocab=vocab,
        merges=_merges_by_score(vocab, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    backend = tk.Tokenizer(model)
    prefixed = fields.typed("tokenizer.ggml.add_space_prefix", bool, True)
    prefix = [tk.normalizers.Prepend("\N{LOWER ONE EIGHTH BLOCK}")] if prefixed else []
    spaces = tk.normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    backend.normalizer = tk.normalizers.Sequence([*prefix, spaces])
    decoders = [
        tk.decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
        tk.decoders.ByteFallback(),
        tk.decoders.Fuse(),
    ]
    if prefixed:
        decoders.append(tk.decoders.Strip(" ", 1, 0))
    backend.decoder = tk.decoders.Sequence(decoders)
    return backend, True


def _merges_by_score(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token, the best-scored result first."""
    merges = []
    for token, index in vocab.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-scores[index], pair) for pair in known]
    merges.sort(key=lambda entry: entry[0])
    return [pair for _, pair in merges]


_MODELS: Mapping[str, Callable[[Fields, list[str], list[int]], tuple[Any, bool]]] = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece_bpe,
}


def _add_special_tokens(backend: Any, tokens: list[str], types: list[int]) -> None:
    """Marks the tokens that are matched in a text as a whole."""
    tk = require("tokenizers")

    def added(wanted: int, special: bool) -> list[Any]:
        names = (name for name, type_ in zip(tokens, types, strict=True) if type_ == wanted)
        return [tk.AddedToken(name, special=special, normalized=False) for name in names]

    backend.add_special_tokens(added(_CONTROL, special=True))
    backend.add_tokens(added(_USER_DEFINED, special=False))


def _add_bos(backend: Any, fields: Fields, tokens: list[str], default: bool) -> None:
    """Puts BOS (and EOS, where the file asks for it) around a text."""
    tk = require("tokenizers")
    parts, special = ["$A"], []
    for role, wanted, place in (("bos", default, 0), ("eos", False, 2)):
        token = fields.get(f"tokenizer.ggml.{role}_token_id")
        if not fields.typed(f"tokenizer.ggml.add_{role}_token", bool, wanted):
            continue
        if token is None or not 0 <= int(token) < len(tokens):
            key = f"tokenizer.ggml.{role}_token_id"
            raise fields.error(key, "a token of the vocabulary", token)
        parts.insert(place, tokens[int(token)])
        special.append((tokens[int(token)], int(token)))
    if special:
        backend.post_processor = tk.processors.TemplateProcessing(
            single=parts, special_tokens=special
        )
