"""Texts for a ragged batch of prompts, as they come or finished."""

from __future__ import annotations

from collections.abc import Generator as Iterating
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from .. import checks
from ..cache import KVCache
from ..errors import InvalidArgument, InvalidType
from ..spec import CacheSpec
from .completion import Completion, TokenEvent
from .generator import Generator
from .progress import Progress
from .prompts import Prompt, encode_prompt, text_length
from .sampling import SamplingParams
from .stopping import Stop

if TYPE_CHECKING:
    from . import Model


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = 256,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    stop: Stop = None,
    ignore_eos: bool = False,
    cache: KVCache | None = None,
    block_size: int = 64,
    k_format: str = "bf16",
    v_format: str = "bf16",
    max_batch: int = 16,
    prefill_budget: int = 512,
) -> Iterating[TokenEvent, None, None]:
    """Continues every prompt, token by token.

    All arguments are checked before this returns. Closing or dropping the iterator, and any
    exception out of it, frees all that it holds of the cache.

    Args:
        model: from `kvcore.models.load`.
        prompts: each a text, token ids, or chat messages ({"role": ..., "content": ...}).
        max_tokens: tokens to generate for each, at most; None for as many as the model's context
            holds, which ends a text in any case.
        sampling: how to choose tokens: one for all prompts or one for each; None is greedy. One
            seed for all gives equal prompts equal texts.
        stop: strings and token ids that end a text, beside the model's end tokens.
        ignore_eos: go on after the model's end tokens.
        cache: a cache of the model's shape on its device. None makes one for this call that holds
            max_batch of the longest texts.
        block_size, k_format, v_format: of that cache; not used with `cache`.
        max_batch: texts that advance together, at most.
        prefill_budget: prompt tokens in one step, at most.

    Returns:
        The tokens of all prompts as they are chosen, each with its prompt's index. The last one of
        a prompt carries its `Completion`.

    Raises:
        InvalidArgument, InvalidType: an argument is not as described, or a prompt is empty, has ids
            outside the vocabulary, or does not fit the context or the cache.
        OutOfBlocks: the given cache is too small for a text of max_tokens.
    """
    checks.integer(max_batch, "max_batch", 1)
    checks.integer(prefill_budget, "prefill_budget", 1)
    encoded = _encode(model, prompts)
    if cache is None:
        lengths = [text_length(model, len(tokens), max_tokens) for tokens in encoded]
        spec = model.cache_spec(block_size, k_format, v_format)
        counts = blocks_for(spec, lengths, max_batch, prefill_budget)
        num_groups = len(spec.groups)
        cache = model.device.make_cache(spec, counts[:num_groups], counts[num_groups:] or None)
    generator = Generator(model, cache, max_batch=max_batch, prefill_budget=prefill_budget)
    for tokens, params in zip(encoded, _params(sampling, len(encoded)), strict=True):
        generator.add(
            tokens, max_tokens=max_tokens, sampling=params, stop=stop, ignore_eos=ignore_eos
        )
    return _events(generator)


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = 256,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    stop: Stop = None,
    ignore_eos: bool = False,
    cache: KVCache | None = None,
    block_size: int = 64,
    k_format: str = "bf16",
    v_format: str = "bf16",
    max_batch: int = 16,
    prefill_budget: int = 512,
    progress: bool = False,
) -> list[Completion]:
    """Continues every prompt and returns the finished texts in the prompts' order.

    Arguments and errors are those of `stream`, and `progress=True` shows a bar on stderr (it needs
    tqdm: MissingExtra otherwise).
    """
    events = stream(
        model,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        ignore_eos=ignore_eos,
        cache=cache,
        block_size=block_size,
        k_format=k_format,
        v_format=v_format,
        max_batch=max_batch,
        prefill_budget=prefill_budget,
    )
    completions: list[Completion] = []
    with closing(events), Progress(len(prompts), enabled=progress) as bar:
        for num_tokens, event in enumerate(events, 1):
            if event.completion is not None:
                completions.append(event.completion)
                bar.advance(num_tokens)
    return sorted(completions, key=lambda completion: completion.index)


def blocks_for(
    spec: CacheSpec, lengths: Sequence[int], max_batch: int, prefill_budget: int
) -> list[int]:
    """Blocks of each of spec.pools that the `max_batch` longest of texts of these lengths take.

    Args:
        lengths: in tokens.
        prefill_budget: the most tokens that a step adds to a text.
    """
    longest = sorted(lengths, reverse=True)[:max_batch]
    return [
        max(1, sum(pool.blocks_for(length, prefill_budget) for length in longest))
        for pool in spec.pools
    ]


def _events(generator: Generator) -> Iterating[TokenEvent, None, None]:
    with generator:
        while generator:
            yield from generator.step()


def _encode(model: Model, prompts: Sequence[Prompt]) -> list[list[int]]:
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
        came = type(prompts).__name__
        raise InvalidType(f"prompts: expected a list of prompts, got {came}; put one into a list")
    encoded = []
    for index, prompt in enumerate(prompts):
        try:
            encoded.append(encode_prompt(model, prompt))
        except (InvalidArgument, InvalidType) as error:
            raise type(error)(f"prompts[{index}]: {error}") from None
    return encoded


def _params(
    sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams | None]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * num_prompts
    if not isinstance(sampling, Sequence):
        raise InvalidType(
            f"sampling: expected SamplingParams or a list of them, got {type(sampling).__name__}"
        )
    if len(sampling) != num_prompts:
        raise InvalidArgument(
            f"sampling: expected one for all or one for each of {num_prompts} prompts, "
            f"got {len(sampling)}"
        )
    return sampling
