"""A language model on the GPU beside the same model on the CPU: logits, greedy texts, tokens/s."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bench.gpu.greedy import follow
from kvcore.models import Generator, Model, load
from kvcore.models.generation import blocks_for

NAME = "smollm2"
PROMPT = (
    "Once upon a time, there was a little girl named Emma who lived in a small house near the "
    "forest. Every evening she came home with a story about what she had seen between the trees."
)
#: How far logits over an fp32 cache may lie from the CPU's. Over others attention itself rounds.
AIM = 1e-3
FORMATS = ("fp32", "fp16", "bf16", "rot8")
BATCHES = (1, 16)
#: Prompt tokens of one step, at most.
BUDGET = 4096


def records(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, fields) of what a report says of the model."""
    here, there = load(NAME), load(NAME, backend="cuda")
    prompt = here.tokenizer.encode(PROMPT)
    count = 8 if quick else 32
    for name in FORMATS[:1] if quick else FORMATS:
        found = follow(here, there, prompt, count, k_format=name, v_format=name)
        yield "agreement", {
            "model": NAME, "format": name, "tokens": count, "largest": found.largest,
            "aim": AIM if name == "fp32" else None, "ties": [asdict(tie) for tie in found.ties],
        }  # fmt: skip
    for batch in BATCHES:
        yield "generation", {"model": NAME, "batch": batch, **_speed(there, prompt, batch, count)}


def _speed(model: Model, prompt: list[int], batch: int, count: int) -> dict[str, float]:
    """Tokens a second of a batch of greedy texts, the second time it is run."""
    length = 1 + len(prompt) + count
    spec = model.cache_spec()
    cache = model.device.make_cache(spec, blocks_for(spec, [length] * batch, batch, BUDGET))
    for turn in ("warm", "timed"):
        with Generator(model, cache, max_batch=batch, prefill_budget=BUDGET) as generator:
            for first in range(1, batch + 1):
                # By salt and first token, no text finds its beginning in the cache.
                tokens = [first, *prompt]
                generator.add(tokens, max_tokens=count, ignore_eos=True, salt=turn)
            while generator:
                generator.step()
    phases = generator.metrics.prefill, generator.metrics.decode
    prefill, decode = (phase.tokens_per_second for phase in phases)
    return {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
