"""What generation gives back: tokens as they come, finished texts, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """A finished text.

    Attributes:
        index: the prompt's place among the prompts.
        prompt_tokens: the prompt as token ids.
        tokens: what was generated; a stop token or the tokens of a stop string stand at its end.
        text: `tokens` as text, without stop tokens and up to a stop string.
        finish_reason: "stop" (a stop token or string) or "length" (max_tokens or the context).
        num_cached: prompt tokens whose keys and values were in the cache already.
        num_preemptions: how often the request made room for others and was computed again.
    """

    index: int
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: FinishReason
    num_cached: int
    num_preemptions: int


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    Attributes:
        index: the prompt's place among the prompts.
        token: the token id.
        text: text that became certain with it: whole characters, and nothing that may turn out to
            be the beginning of a stop string. The texts of a prompt's events join to its text.
        completion: the finished text, with its last token; None before.
    """

    index: int
    token: int
    text: str
    completion: Completion | None

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.completion is None else self.completion.finish_reason


@dataclass
class Phase:
    """Tokens computed and the seconds that it took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Metrics:
    """What a generator did: steps that held prompt tokens (prefill), and those that held none."""

    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)
    steps: int = 0
    preemptions: int = 0
