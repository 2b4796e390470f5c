"""What an evaluation found, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from kvcore.evaluation.cases import Case

#: The long context for which sizes are told beside the tested one.
LONG = 32_768


@dataclass(frozen=True)
class Sizes:
    """What one sequence takes.

    Attributes:
        bits_per_element: bits of an encoded element, metadata included.
        bits_at_length: with the blocks of raw rows that a sequence of the tested length holds.
        bits_at_32k: the same at 32,768 tokens.
        bytes_per_token: of an encoded token, all layers.
        break_even_length: the length from which on a sequence takes fewer bytes than in bf16; None
            if it never does.
    """

    bits_per_element: float
    bits_at_length: float
    bits_at_32k: float
    bytes_per_token: int
    break_even_length: int | None


@dataclass(frozen=True)
class TextResult:
    """One text: `perplexity`, mean `kl` in nats, and `agreement` in percent as in `Result`."""

    perplexity: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Recall:
    """The second copies of passages of tokens in random order.

    Attributes:
        nll: nats a token.
        extra: nats more than with the float32 cache.
        hits: tokens that were the likeliest, in percent.
    """

    nll: float
    extra: float
    hits: float


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        sizes: what a sequence takes.
        texts: each text alone.
        perplexity: over the tokens of all texts.
        perplexity_change: by how much it exceeds that of the float32 cache, in percent.
        perplexity_change_error: the standard error of that, from paired differences.
        kl: mean divergence from the float32 cache's distribution, in nats.
        agreement: positions with the same likeliest token, in percent.
        recall: what is left of tokens seen long ago; None if it was not tested.
        error_mean, error_largest: each layer's mean and largest relative error of attention's
            output over heads and tokens, with the same q, k and v.
        tokens_per_second: of decoding one sequence behind the last text.
    """

    case: Case
    sizes: Sizes
    texts: dict[str, TextResult]
    perplexity: float
    perplexity_change: float
    perplexity_change_error: float
    kl: float
    agreement: float
    recall: Recall | None
    error_mean: tuple[float, ...]
    error_largest: tuple[float, ...]
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """Results of several cases over the same texts.

    Attributes:
        model: where the model came from.
        length: tokens of each text.
        chunk: tokens that went through the model in one step.
        recall_length: tokens of a copy in the test of recall; 0 if there was none.
        device: what computed, in words.
        reference: the float32 cache, as a case.
        results: each case, in order.
    """

    model: str
    length: int
    chunk: int
    recall_length: int
    device: str
    reference: Result
    results: tuple[Result, ...]

    def to_json(self) -> str:
        """All of it as one JSON object; a result carries its case's name."""
        data = asdict(self)
        _name(data["reference"], self.reference)
        for record, result in zip(data["results"], self.results, strict=True):
            _name(record, result)
        return json.dumps(data, indent=2)


def _name(record: dict[str, Any], result: Result) -> None:
    record["case"]["name"] = result.case.name
