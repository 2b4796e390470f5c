"""Prompts as a caller writes them, checked and turned into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

from .. import checks
from ..errors import InvalidArgument, InvalidType

if TYPE_CHECKING:
    from kvcore.models import Model

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def encode_prompt(model: Model, prompt: Prompt) -> list[int]:
    """The token ids of a text, of chat messages, or of ids themselves.

    Raises:
        InvalidArgument: the prompt is empty, has ids outside the vocabulary, or leaves no room
            for one more token in the model's context.
        InvalidType: it is none of the three.
    """
    tokens = _tokens(model, prompt)
    if not tokens:
        raise InvalidArgument("prompt: expected at least one token, got none")
    vocab_size = model.config.vocab_size
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidArgument(f"prompt: expected token ids in [0, {vocab_size}), got {wrong}")
    if len(tokens) >= model.config.max_context:
        raise InvalidArgument(
            f"prompt: expected fewer tokens than the model's context of "
            f"{model.config.max_context}, got {len(tokens)}"
        )
    return tokens


def text_length(model: Model, num_prompt: int, max_tokens: int | None) -> int:
    """The length in tokens, prompt included, at which a text ends.

    Raises:
        InvalidArgument: max_tokens is below 1.
        InvalidType: max_tokens is not an integer.
    """
    max_context = model.config.max_context
    if max_tokens is None:
        return max_context
    return min(num_prompt + checks.integer(max_tokens, "max_tokens", 1), max_context)


def _tokens(model: Model, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidArgument("prompt: expected text, got an empty string")
        return model.tokenizer.encode(prompt)
    try:
        items: list[Any] = list(prompt)
    except TypeError:
        items = [None]
    if items and all(isinstance(item, Mapping) for item in items):
        return model.tokenizer.chat(cast("list[Mapping[str, str]]", items))
    if not all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        raise InvalidType(
            "prompt: expected text, token ids or chat messages, "
            f"got {type(prompt).__name__} {str(prompt)[:40]!r}"
        )
    return [int(item) for item in items]
