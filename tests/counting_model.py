"""A model whose next token is a function of every token of its text, read through the cache.

Keys are zero, so attention averages the values; a value holds whole numbers made of a token and its
position. Times the length, that average is an exact sum which `next_token` computes from the tokens
alone. A block that is lost, stale, foreign or written twice changes the text.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

import kvcore
from kvcore.models import Device

HEAD_DIM = 16
VOCAB = 60
EOS = 0
ALPHABET = "".join(chr(ord("0") + i) for i in range(VOCAB))


def features(tokens, positions):
    """Whole numbers [n, HEAD_DIM] below 251."""
    rows = np.asarray(tokens, np.int64)[:, None] + 3
    places = np.asarray(positions, np.int64)[:, None] + 1
    columns = np.arange(1, HEAD_DIM + 1)
    return ((rows * columns * 37 + places * columns * columns) % 251).astype(np.float32)


def token_of(sums):
    """The token that follows a text whose features sum to `sums` [HEAD_DIM]."""
    digest = 0
    for value in sums:
        digest = (digest * 1_000_003 + int(value)) % 2_147_483_647
    return digest % VOCAB


def next_token(tokens):
    return token_of(features(tokens, np.arange(len(tokens))).sum(axis=0, dtype=np.float64))


def continuation(prompt, max_tokens, *, eos=EOS):
    """What greedy generation must give."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


class CountingDecoder:
    """Notes the shape of each step; `on_forward(stage)` may raise where the test wants it."""

    def __init__(self):
        self.steps = []
        self.on_forward = lambda stage: None

    def forward(self, step, tokens, logits="last"):
        self.on_forward("begin")
        self.steps.append((np.diff(step.query_starts).tolist(), logits))
        positions = np.concatenate(
            [
                np.arange(length - new, length)
                for new, length in zip(np.diff(step.query_starts), step.seq_lens, strict=True)
            ]
        )
        values = features(tokens, positions)[:, None, :]
        zeros = np.zeros_like(values)
        for layer in range(2):
            step.append(layer, zeros, values)
            self.on_forward("append")
            out = step.attend(layer, zeros)
        self.on_forward("end")
        if logits == "none":
            return None
        last = out[step.query_starts[1:] - 1, 0]
        sums = np.rint(last * step.seq_lens[:, None])
        result = np.zeros((len(sums), VOCAB), np.float32)
        result[np.arange(len(sums)), [token_of(row) for row in sums]] = 4.0
        return result


class CharacterTokenizer:
    def encode(self, text, add_special=True):
        return [ALPHABET.index(character) for character in text]

    def decode(self, ids, skip_special=True):
        return "".join(ALPHABET[i] for i in ids if not (skip_special and i == EOS))

    def chat(self, messages):
        return self.encode("".join(message["content"] for message in messages))

    def stream(self):
        return SimpleNamespace(push=lambda token: self.decode([token]), flush=lambda: "")


class CountingModel:
    def __init__(self, max_context=1000):
        self.config = SimpleNamespace(vocab_size=VOCAB, max_context=max_context)
        self.eos_ids = frozenset({EOS})
        self.tokenizer = CharacterTokenizer()
        self.decoder = CountingDecoder()
        self.device = Device()

    def cache_spec(self, block_size=64, k_format="bf16", v_format="bf16"):
        return kvcore.CacheSpec(
            num_layers=2,
            num_kv_heads=1,
            head_dim=HEAD_DIM,
            block_size=block_size,
            k_format=k_format,
            v_format=v_format,
        )
