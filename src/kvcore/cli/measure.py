"""Measurements that `kvcore demo` prints. Nothing here is computed from a model of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import get_num_threads, ops
from ..cache import KVCache
from ..models import Device, Model
from ..models.weights import DecoderWeights
from ..sequence import Sequence


@dataclass(frozen=True)
class TokenCost:
    """Seconds for the next token of a text that is `length` tokens long."""

    length: int
    cached: float
    recomputed: float


def token_cost(model: Model, cache: KVCache, tokens: NDArray[np.int32]) -> TokenCost:
    """The next token with the text in the cache, and with nothing kept: the best of some rounds.

    Recomputation runs the whole text through the same decoder and kernels, and the output head for
    its last token alone, which is the fastest way that this library has to start over.

    Args:
        tokens: the text [n].
    """
    length = len(tokens)
    cached, recomputed = [], []
    sequence = cache.sequence()
    for _ in range(3 if length <= 256 else 2):
        sequence.truncate(0)
        recomputed.append(_seconds(lambda: _forward(model, cache, sequence, tokens)))
        for _ in range(5):
            sequence.truncate(length - 1)
            cached.append(_seconds(lambda: _forward(model, cache, sequence, tokens[-1:])))
    sequence.free()
    return TokenCost(length, min(cached), min(recomputed))


def continue_text(
    model: Model, cache: KVCache, prompt: list[int], count: int, *, recompute: bool
) -> tuple[float, list[int]]:
    """Seconds for `count` greedy tokens, and the tokens.

    Args:
        recompute: start over for every token instead of keeping the text in the cache.
    """
    tokens = np.asarray(prompt, np.int32)
    sequence = cache.sequence()
    start = time.perf_counter()
    for _ in range(count):
        if recompute:
            sequence.truncate(0)
        logits = _forward(model, cache, sequence, tokens[len(sequence) :])
        tokens = np.append(tokens, logits[0].argmax().astype(np.int32))
    seconds = time.perf_counter() - start
    sequence.free()
    return seconds, tokens[len(prompt) :].tolist()


@dataclass(frozen=True)
class ReadingCost:
    """A token beside the bare reading of the weights that it needs: bytes and seconds.

    Attributes:
        reader: how they were read, in words.
    """

    nbytes: int
    token: float
    reading: float
    reader: str


def reading_cost(model: Model, cache: KVCache, tokens: NDArray[np.int32]) -> ReadingCost:
    """The next token of a text, and the bare reading of the weights that it needs.

    The readers and the token take turns on the same memory and the best of each counts, as a
    machine's speed changes with its other work, and a buffer's with its pages.
    """
    arrays = _read_by_a_token(model.decoder.weights)
    sequence = cache.sequence()
    _forward(model, cache, sequence, tokens[:-1])
    token, reading = [], []
    with ThreadPoolExecutor(get_num_threads()) as pool:
        readers, words = _readers(model.device, arrays, pool)
        for _ in range(15):
            reading += [_seconds(reader) for reader in readers]
            sequence.truncate(len(tokens) - 1)
            token.append(_seconds(lambda: _forward(model, cache, sequence, tokens[-1:])))
    sequence.free()
    return ReadingCost(sum(array.nbytes for array in arrays), min(token), min(reading), words)


def _readers(
    device: Device, arrays: list[Any], pool: ThreadPoolExecutor
) -> tuple[list[Callable[[], object]], str]:
    """Ways to read arrays once, and what they are called.

    On the CPU these are NumPy's maximum over all of them in as many threads, and one row through
    `ops.linear` for every matrix.
    """
    if not device.is_host:
        return [lambda: _read_on_device(device, arrays)], "the maximum of each array"
    count = get_num_threads()
    shares = [[np.array_split(array, count)[i] for array in arrays] for i in range(count)]
    return [
        lambda: list(pool.map(_read_with_max, shares)),
        lambda: _read_with_linear(arrays),
    ], f"the better of NumPy's max and ops.linear in {count} threads"


def _read_on_device(device: Device, arrays: list[Any]) -> None:
    with device.active():
        device.get(device.xp.stack([array.max() for array in arrays]))


def _read_by_a_token(weights: DecoderWeights) -> list[Any]:
    """All weights but an embedding that is not the head as well: of that a token reads one row."""
    embedding = None if weights.head is weights.embedding else weights.embedding
    return [array for array in weights.arrays() if array is not embedding]


def _read_with_max(arrays: list[NDArray[np.float32]]) -> None:
    for array in arrays:
        array.max(initial=0.0)


def _read_with_linear(arrays: list[NDArray[np.float32]]) -> None:
    for array in arrays:
        if array.ndim == 2:
            ops.linear(np.ones((1, array.shape[1]), np.float32), array)


def _forward(
    model: Model, cache: KVCache, sequence: Sequence, tokens: NDArray[np.int32]
) -> NDArray[np.float32]:
    device = model.device
    with device.active(), cache.step([(sequence, len(tokens))]) as step:
        # On the host, so that what is timed has been computed.
        return device.get(model.decoder.forward(step, tokens, logits="last"))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
