"""Measurements that `kvcore demo` prints. Nothing here is computed from a model of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import get_num_threads, ops
from ..cache import KVCache
from ..models import Model
from ..models.weights import DecoderWeights
from ..sequence import Sequence

PROBE_BYTES = 256 << 20  # far more than the caches of a CPU hold
PROBE_ROUNDS = 5


@dataclass(frozen=True)
class TokenCost:
    """Seconds for the next token of a text that is `length` tokens long."""

    length: int
    cached: float
    recomputed: float


def token_cost(
    model: Model, cache: KVCache, tokens: NDArray[np.int32], *, cached_rounds: int = 7
) -> TokenCost:
    """The next token with the text in the cache, and with nothing kept: medians.

    Recomputation runs the whole text through the same decoder and kernels, and the output head for
    its last token alone, which is the fastest way that this library has to start over.

    Args:
        tokens: the text [n].
    """
    length = len(tokens)
    recomputed = []
    sequence = cache.sequence()
    for _ in range(2 if length <= 512 else 1):
        sequence.truncate(0)
        recomputed.append(_seconds(lambda: _forward(model, cache, sequence, tokens)))
    cached = []
    for _ in range(cached_rounds):
        sequence.truncate(length - 1)
        cached.append(_seconds(lambda: _forward(model, cache, sequence, tokens[-1:])))
    sequence.free()
    return TokenCost(length, statistics.median(cached), min(recomputed))


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


def weight_bytes(weights: DecoderWeights) -> int:
    """Bytes of weights that one token reads: all but an embedding that is not the head as well."""
    tied = weights.head is weights.embedding
    return weights.nbytes - (0 if tied else int(weights.embedding.nbytes))


def read_bandwidth() -> float:
    """Bytes a second that this machine reads from memory, with as many threads as kvcore uses.

    The best of several rounds of two readers over 256 MiB: NumPy's maximum in threads of its own,
    and one matrix product of `ops.linear`.
    """
    threads = get_num_threads()
    data = np.ones(PROBE_BYTES // 4, np.float32)
    parts = np.array_split(data, threads)
    matrix = data.reshape(-1, 4096)
    x, out = np.ones((1, 4096), np.float32), np.empty((1, len(matrix)), np.float32)
    with ThreadPoolExecutor(threads) as pool:
        readers: list[Callable[[], object]] = [
            lambda: list(pool.map(np.max, parts)),
            lambda: ops.linear(x, matrix, None, out),
        ]
        best = min(_seconds(reader) for _ in range(PROBE_ROUNDS) for reader in readers)
    return PROBE_BYTES / best


def _forward(
    model: Model, cache: KVCache, sequence: Sequence, tokens: NDArray[np.int32]
) -> NDArray[np.float32]:
    with cache.step([(sequence, len(tokens))]) as step:
        logits: NDArray[np.float32] = model.decoder.forward(step, tokens, logits="last")
    return logits


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
