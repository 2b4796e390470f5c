"""`kvcore demo`: a generation, what the cache did for it, and what each token cost."""

from __future__ import annotations

import sys
import time

import click
import numpy as np
from numpy.typing import NDArray

from .. import set_num_threads
from ..cache import KVCache
from ..models import Model, load
from ..models.completion import Completion
from ..models.generator import Generator
from . import measure, report
from .options import device_options

PROMPT = "Once upon a time, there was a little girl named"
LENGTHS = (64, 128, 256, 512, 1024)
BLOCK_SIZE = 64
NUM_RECOMPUTED = 8


@click.command()
@click.option("--model", default="smollm2", show_default=True, metavar="NAME|DIR|FILE.gguf")
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--max-tokens", default=96, show_default=True, help="Tokens to generate, at most.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads of kvcore's kernels.")
@device_options
def demo(
    model: str,
    prompt: str,
    max_tokens: int,
    threads: int | None,
    backend: str,
    device: int | None,
) -> None:
    """Stream a text, then measure what the cache saves as the text grows."""
    if threads is not None:
        set_num_threads(threads)
    start = time.perf_counter()
    loaded = load(model, backend, device=device)
    click.echo(f"{loaded!r}")
    seconds = time.perf_counter() - start
    click.echo(f"loaded in {seconds:.1f} s; {loaded.device.describe()}\n")
    lengths = [n for n in LENGTHS if n <= loaded.config.max_context]
    spec = loaded.cache_spec(BLOCK_SIZE, slack=1)  # what is measured repeats the last token
    cache = loaded.device.make_cache(spec, num_blocks=2 * -(-max(lengths) // BLOCK_SIZE))

    completion = _stream(loaded, cache, prompt, max_tokens)
    _compare_with_recomputation(loaded, cache, completion)
    text = completion.prompt_tokens + completion.tokens
    tokens = np.resize(np.asarray(text, np.int32), max(lengths))
    _tabulate_costs(loaded, cache, tokens, lengths)
    _relate_to_reading(loaded, cache, tokens[: lengths[0]])
    cache.check()


def _stream(model: Model, cache: KVCache, prompt: str, max_tokens: int) -> Completion:
    """Prints a greedy text as it comes, and what the cache did."""
    click.secho(prompt, nl=False, bold=True)
    completion, peak = None, 0
    with Generator(model, cache) as generator:
        generator.add(prompt, max_tokens=max_tokens, ignore_eos=True)
        while completion is None:
            for event in generator.step():
                click.echo(event.text, nl=False)
                sys.stdout.flush()
                completion = event.completion
            peak = max(peak, cache.stats().in_use)
    click.echo("\n")
    for line in report.lines(cache, generator.metrics, peak):
        click.echo(line)
    click.echo()
    return completion


def _compare_with_recomputation(model: Model, cache: KVCache, completion: Completion) -> None:
    """Makes the beginning of the text twice more: with the cache, and without."""
    prompt, count = completion.prompt_tokens, min(NUM_RECOMPUTED, len(completion.tokens))
    seconds, cached = measure.continue_text(model, cache, prompt, count, recompute=False)
    slow_seconds, recomputed = measure.continue_text(model, cache, prompt, count, recompute=True)
    same = cached == recomputed == completion.tokens[:count]
    click.echo(
        f"The first {count} tokens again: {seconds:.2f} s with the cache, {slow_seconds:.2f} s "
        f"without, {slow_seconds / seconds:.1f} times as long; "
        f"{'the same tokens' if same else 'OTHER tokens'}.\n"
    )


def _tabulate_costs(
    model: Model, cache: KVCache, tokens: NDArray[np.int32], lengths: list[int]
) -> None:
    """Prints what the next token costs as the text grows."""
    click.echo("The next token of a text, measured:")
    click.echo("  length   with the cache   recomputed   times   prefill tokens/s")
    for length in lengths:
        cost = measure.token_cost(model, cache, tokens[:length])
        click.echo(
            f"  {length:>6}   {cost.cached * 1e3:>11.1f} ms   {cost.recomputed * 1e3:>7.0f} ms   "
            f"{cost.recomputed / cost.cached:>5.1f}   {length / cost.recomputed:>16.0f}"
        )
    click.echo()


def _relate_to_reading(model: Model, cache: KVCache, tokens: NDArray[np.int32]) -> None:
    """Prints how far a token is from reading the weights once."""
    cost = measure.reading_cost(model, cache, tokens)
    click.echo(
        f"A token reads {cost.nbytes / 1e6:.0f} MB of weights and took {cost.token * 1e3:.1f} ms. "
        f"Reading them and no more took {cost.reading * 1e3:.1f} ms "
        f"({cost.nbytes / cost.reading / 1e9:.1f} GB/s, by {cost.reader}): "
        f"a token is {cost.token / cost.reading:.2f} times that."
    )
