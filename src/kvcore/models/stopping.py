"""Finding stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .. import checks
from ..errors import InvalidArgument, InvalidType

Stop = str | int | Iterable[str | int] | None


@dataclass(frozen=True)
class StopRules:
    """What ends a text besides its length: token ids and strings."""

    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, stop: Stop, vocab_size: int) -> StopRules:
        """Takes one string or token id, or several of either.

        Raises:
            InvalidArgument: a string is empty or an id is outside the vocabulary.
            InvalidType: something is neither.
        """
        if stop is None:
            return cls()
        items = [stop] if isinstance(stop, str | int) else _listed(stop)
        tokens, strings = set(), []
        for item in items:
            if isinstance(item, str):
                if not item:
                    raise InvalidArgument("stop: expected strings that are not empty, got ''")
                strings.append(item)
            else:
                tokens.add(checks.integer(item, "stop", 0, vocab_size - 1))
        return cls(frozenset(tokens), tuple(strings))


def _listed(stop: Iterable[str | int]) -> list[str | int]:
    try:
        return list(stop)
    except TypeError:
        raise InvalidType(f"stop: expected strings and token ids, got {stop!r}") from None


@dataclass
class StopMatcher:
    """Lets text through up to the first stop string.

    A tail that may be the beginning of a stop string is held back until the text goes on or ends.
    """

    strings: tuple[str, ...]
    stopped: bool = False
    _held: str = field(default="", repr=False)

    def push(self, text: str) -> str:
        """The text that is now certain to stand before any stop string."""
        if not self.strings:
            return text
        held = self._held + text
        # The one that is complete first counts, so that the cut of text into tokens does not.
        found = [(at + len(s), at) for s in self.strings if (at := held.find(s)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)[1]]
        keep = max(_overlap(held, string) for string in self.strings)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest proper prefix of `string` that `text` ends with."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
