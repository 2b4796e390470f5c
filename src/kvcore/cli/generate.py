"""`kvcore generate`: continue prompts with a language model."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator as Iterating
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import click

from .. import set_num_threads
from ..cache import KVCache
from ..models import Model, load
from ..models.completion import Completion, TokenEvent
from ..models.generation import blocks_for
from ..models.generator import Generator
from ..models.progress import Progress
from ..models.prompts import Prompt, encode_prompt, text_length
from ..models.sampling import SamplingParams
from . import report
from .inputs import read_prompts
from .options import device_options

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@click.command()
@click.argument("prompt", nargs=-1)
@click.option("--file", metavar="PATH", help="Prompts from a file, - for stdin: one a line, or "
              'JSON lines with {"prompt": ...}.')  # fmt: skip
@click.option("--model", default="smollm2", show_default=True, metavar="NAME|DIR|FILE.gguf",
              help="A known name, a Hugging Face directory or a GGUF file.")  # fmt: skip
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: the system message.")
@click.option("--max-tokens", default=256, show_default=True, help="Tokens to generate, at most.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May repeat.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Keep the k likeliest; 0 keeps all.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep this much probability.")
@click.option("--min-p", default=0.0, show_default=True,
              help="Keep tokens this share as likely as the likeliest.")  # fmt: skip
@click.option("--repetition-penalty", default=1.0, show_default=True,
              help="Above 1: make tokens of the text so far less likely.")  # fmt: skip
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--k-format", default="bf16", show_default=True, help="How the cache stores keys.")
@click.option("--v-format", default="bf16", show_default=True, help="How it stores values.")
@click.option("--block-size", default=64, show_default=True, help="Tokens a block holds.")
@click.option("--memory", metavar="SIZE", help='The cache\'s memory: "2GiB", "512MB" or "auto".')
@click.option("--num-blocks", type=int, help="The cache's blocks, instead of --memory. With "
              "neither, as many as the longest --max-batch texts take.")  # fmt: skip
@click.option("--max-batch", default=16, show_default=True, help="Texts that advance together.")
@click.option("--prefill-budget", default=512, show_default=True,
              help="Prompt tokens in one step, at most.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 256), help="Threads of kvcore's kernels.")
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each prompt.")
@click.option("--stats", is_flag=True, help="Tell what the cache did (on stderr, or in JSON).")
def generate(**options: Any) -> None:
    """Continue each PROMPT with a language model; - reads one from stdin.

    One prompt streams to the terminal. Several are computed together and printed in their order.
    """
    if options["memory"] is not None and options["num_blocks"] is not None:
        raise click.UsageError("--memory and --num-blocks: expected at most one of them")
    if options["system"] is not None and not options["chat"]:
        raise click.UsageError("--system: expected only together with --chat")
    texts = read_prompts(options["prompt"], options["file"])
    sampling = SamplingParams(**{name: options[name] for name in SAMPLING})
    if options["threads"] is not None:
        set_num_threads(options["threads"])
    model = load(
        options["model"],
        options["backend"],
        device=options["device"],
        progress=sys.stderr.isatty(),
    )
    prompts = [encode_prompt(model, _prompt(text, options)) for text in texts]
    cache = _make_cache(model, [len(tokens) for tokens in prompts], options)
    batch = {name: options[name] for name in ("max_batch", "prefill_budget")}
    with Generator(model, cache, **batch) as generator:
        for tokens in prompts:
            generator.add(
                tokens,
                max_tokens=options["max_tokens"],
                sampling=sampling,
                stop=options["stop"],
                ignore_eos=options["ignore_eos"],
            )
        run = Run(generator)
        if options["as_json"]:
            _print_json(run, texts, options["stats"])
        elif len(texts) == 1:
            _print_stream(run)
        else:
            _print_texts(run, texts)
    if options["stats"] and not options["as_json"]:
        for line in report.lines(cache, generator.metrics, run.peak):
            click.echo(line, err=True)


class Run:
    """A generator's events, and the most blocks that were in use meanwhile."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.peak = 0

    def events(self) -> Iterator[TokenEvent]:
        generator = self.generator
        while generator:
            events = generator.step()
            self.peak = max(self.peak, generator.cache.stats().in_use)
            yield from events

    def completions(self, count: int) -> Iterating[Completion, None, None]:
        """Finished texts in the prompts' order, each as soon as those before it are there."""
        ready: dict[int, Completion] = {}
        following = 0
        with Progress(count, enabled=sys.stderr.isatty()) as bar:
            for num_tokens, event in enumerate(self.events(), 1):
                if event.completion is None:
                    continue
                ready[event.index] = event.completion
                bar.advance(num_tokens)
                while following in ready:
                    with bar.aside():
                        yield ready.pop(following)
                    following += 1


def _prompt(text: str, options: dict[str, Any]) -> Prompt:
    if not options["chat"]:
        return text
    system = options["system"]
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": text}]


def _make_cache(model: Model, prompt_lengths: list[int], options: dict[str, Any]) -> KVCache:
    spec = model.cache_spec(options["block_size"], options["k_format"], options["v_format"])
    make_cache = model.device.make_cache
    lengths = [text_length(model, n, options["max_tokens"]) for n in prompt_lengths]
    if options["memory"] is not None:
        longest = max(lengths)
        return make_cache(spec, memory=options["memory"], sequence_length=longest)
    if options["num_blocks"] is not None:
        return make_cache(spec, options["num_blocks"])
    batch, budget = (max(options[name], 1) for name in ("max_batch", "prefill_budget"))
    counts, num_groups = blocks_for(spec, lengths, batch, budget), len(spec.groups)
    return make_cache(spec, counts[:num_groups], counts[num_groups:] or None)


def _print_stream(run: Run) -> None:
    for event in run.events():
        click.echo(event.text, nl=False)
        sys.stdout.flush()
    click.echo()


def _print_texts(run: Run, texts: list[str]) -> None:
    with closing(run.completions(len(texts))) as completions:
        for completion in completions:
            prompt = " ".join(texts[completion.index].split())
            click.secho(f"[{completion.index + 1}] {prompt}", bold=True)
            click.echo(completion.text)


def _print_json(run: Run, texts: list[str], stats: bool) -> None:
    with closing(run.completions(len(texts))) as completions:
        for completion in completions:
            click.echo(json.dumps(_record(completion, texts[completion.index])))
    if stats:
        numbers = {
            **report.generation_numbers(run.generator.metrics),
            **report.cache_numbers(run.generator.cache, run.peak),
        }
        click.echo(json.dumps({"stats": numbers}))


def _record(completion: Completion, prompt: str) -> dict[str, Any]:
    return {
        "index": completion.index,
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt_tokens),
        "cached_tokens": completion.num_cached,
        "preemptions": completion.num_preemptions,
        "tokens": completion.tokens,
    }
