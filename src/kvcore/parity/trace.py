"""Traces: what happens to the sequences of a cache, one action after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Step:
    """A step of the cache.

    Attributes:
        news: (sequence's name, number of new tokens) each; an unknown name is a new sequence.
        attends: whether the new tokens attend.
        commits: False rolls the step back after its work.
    """

    news: tuple[tuple[str, int], ...]
    attends: bool = True
    commits: bool = True


@dataclass(frozen=True)
class Fork:
    """`child` shares the first `length` tokens of `parent`."""

    parent: str
    child: str
    length: int


@dataclass(frozen=True)
class Begin:
    """`child` is empty; its first `length` tokens will be those of `parent`, as after a Fork."""

    parent: str
    child: str
    length: int


@dataclass(frozen=True)
class Truncate:
    """The sequence keeps its first `length` tokens; what follows is new text."""

    name: str
    length: int


@dataclass(frozen=True)
class Free:
    """The sequence goes."""

    name: str


Action = Step | Fork | Begin | Truncate | Free
Trace = tuple[Action, ...]


def step(**news: int) -> Step:
    """A step of these new tokens."""
    return Step(tuple(news.items()))


def fill(**news: int) -> Step:
    """A step whose tokens are stored and do not attend."""
    return Step(tuple(news.items()), attends=False)


def rolled_back(**news: int) -> Step:
    """A step whose work is undone."""
    return Step(tuple(news.items()), commits=False)


class Player(Protocol):
    """What acts out a trace. Sequences go by name, and so do the texts that they are made of."""

    def begin(self, name: str) -> None:
        """An empty sequence."""

    def step(self, action: Step, texts: list[str]) -> None:
        """A step, with the text of each entry."""

    def fork(self, parent: str, child: str, length: int) -> None: ...
    def truncate(self, name: str, length: int) -> None: ...
    def free(self, name: str) -> None: ...


class Branches(Protocol):
    """Where it is said which text begins like another."""

    def branch(self, parent: str, child: str, length: int) -> None: ...


def play(trace: Trace, player: Player, branches: Branches) -> None:
    """Acts out a trace. A sequence begins with its first step."""
    texts: dict[str, str] = {}
    live: set[str] = set()
    for action in trace:
        if isinstance(action, Step):
            for name, _ in action.news:
                if name not in live:
                    player.begin(name)
                    live.add(name)
                    texts.setdefault(name, name)
            player.step(action, [texts[name] for name, _ in action.news])
        elif isinstance(action, Fork | Begin):
            parent = texts.setdefault(action.parent, action.parent)
            branches.branch(parent, action.child, action.length)
            texts[action.child] = action.child
            if isinstance(action, Fork):
                player.fork(action.parent, action.child, action.length)
                live.add(action.child)
        elif isinstance(action, Truncate):
            text = f"{texts[action.name]}+{action.length}"
            branches.branch(texts[action.name], text, action.length)
            texts[action.name] = text
            player.truncate(action.name, action.length)
        else:
            player.free(action.name)
            live.discard(action.name)
            del texts[action.name]


class Lengths:
    """How long sequences get, and how many there are; both a player and branches.

    Attributes:
        most: the most tokens that a sequence reaches.
        count: sequences that were made.
    """

    def __init__(self) -> None:
        self._lengths: dict[str, int] = {}
        self.most = self.count = 0

    def begin(self, name: str) -> None:
        self._lengths[name] = 0
        self.count += 1

    def step(self, action: Step, texts: list[str]) -> None:
        for name, count in action.news:
            self.most = max(self.most, self._lengths[name] + count)
            if action.commits:
                self._lengths[name] += count

    def fork(self, parent: str, child: str, length: int) -> None:
        self.begin(child)
        self._lengths[child] = length

    def truncate(self, name: str, length: int) -> None:
        self._lengths[name] = length

    def free(self, name: str) -> None:
        del self._lengths[name]

    def branch(self, parent: str, child: str, length: int) -> None:
        self.most = max(self.most, length)
