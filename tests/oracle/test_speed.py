"""SmolLM2 in float32 is at least as fast here as in transformers, measured in turns in one run.

Wants a quiet machine: run it alone with `pytest -m "oracle and slow" -s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvcore
from kvcore import ops
from kvcore.models import Model

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROUNDS = 5


def best_in_turns(*runs: Callable[[], float]) -> list[float]:
    """The shortest time of each run, in seconds, taking turns so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, measured in zip(runs, times, strict=True):
            measured.append(run())
    return [min(measured) for measured in times]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.fixture(autouse=True)
def as_many_torch_threads(one_torch_thread: None) -> None:
    torch.set_num_threads(kvcore.get_num_threads())


@pytest.mark.parametrize("length", [128, 512])
def test_prefill(length: int, smollm2: Model, theirs: Any) -> None:
    ids = np.random.default_rng(1).integers(0, smollm2.config.vocab_size, length)
    cache = kvcore.KVCache(smollm2.cache_spec(), num_blocks=length // 64 + 1)

    def ours() -> float:
        sequence = cache.sequence()

        def run() -> None:
            with cache.step([(sequence, length)]) as step:
                smollm2.decoder.forward(step, ids)

        elapsed = seconds(run)
        sequence.free()
        return elapsed

    def other() -> float:
        with torch.inference_mode():
            return seconds(lambda: theirs(torch.from_numpy(ids)[None], logits_to_keep=1))

    mine, its = best_in_turns(ours, other)
    print(f"\nprefill of {length}: {length / mine:.0f} tokens/s, transformers {length / its:.0f}")
    assert mine <= its


@pytest.mark.parametrize("batch", [1, 8])
def test_decode(batch: int, smollm2: Model, theirs: Any) -> None:
    prompt = np.random.default_rng(1).integers(0, smollm2.config.vocab_size, (batch, 16))
    cache = kvcore.KVCache(smollm2.cache_spec(), num_blocks=4 * batch)
    sequences = [cache.sequence() for _ in range(batch)]
    with cache.step([(sequence, 16) for sequence in sequences]) as step:
        smollm2.decoder.forward(step, prompt.ravel())
    past = transformers.DynamicCache()
    with torch.inference_mode():
        theirs(torch.from_numpy(prompt), past_key_values=past)

    def our_token() -> None:
        with cache.step([(sequence, 1) for sequence in sequences]) as step:
            smollm2.decoder.forward(step, np.full(batch, 7)).argmax(-1)

    def its_token() -> None:
        with torch.inference_mode():
            theirs(torch.full((batch, 1), 7), past_key_values=past).logits[:, -1].argmax(-1)

    def several(token: Callable[[], None]) -> Callable[[], float]:
        return lambda: min(seconds(token) for _ in range(8))

    weights = smollm2.decoder.weights
    x = np.ones((1, smollm2.config.hidden_size), np.float32)
    wide = np.ones((1, smollm2.config.intermediate_size), np.float32)

    def read_weights() -> None:
        for layer in weights.layers:
            for matrix in (layer.qkv, layer.output, layer.gate_up):
                ops.linear(x, matrix)
            ops.linear(wide, layer.down)
        ops.linear(x, weights.head)

    mine, its, once = best_in_turns(several(our_token), several(its_token), several(read_weights))
    print(
        f"\ndecode of {batch}: {batch / mine:.1f} tokens/s, transformers {batch / its:.1f}; a step "
        f"takes {mine / once:.2f} times as long as reading the weights once ({1e3 * once:.1f} ms)"
    )
    assert mine <= its
