"""Any order of calls against a plain model: lengths, contents, owners and accounts.

The model of a sequence is the list of its tokens' marks. A mark is a number made of the salt and
of every token up to this one, and it is what the cache stores as K and V; so a row that is lost,
stale, foreign or written over reads back as another number.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

import kvcore
from support import assert_balanced, poison, run_machines

HEAD_DIM = 8
SPAN = 32  # tokens of the largest block: prefixes are found in steps of it
RETENTION = 20  # of the last group
SPEC = kvcore.CacheSpec(
    4,
    1,
    HEAD_DIM,
    groups=[kvcore.GroupSpec(16), kvcore.GroupSpec(SPAN), kvcore.GroupSpec(16, RETENTION)],
    layer_groups=[0, 1, 0, 2],
    kv_sources={2: 0},
    k_format="fp32",
    v_format="fp32",
)
OWNERS = {0, 1, 3}  # the layers that own storage
NUM_BLOCKS = (14, 8, 11)
DOCUMENTS = [[(7 * d + i * i) % 23 for i in range(120)] for d in range(2)]
DOCUMENTS.append([*DOCUMENTS[0][:40], *DOCUMENTS[1][40:]])  # the same beginning, then another text


def mark(before: int, token: int) -> int:
    """The mark of a token that follows `before`: below 2**20, so that float32 holds it exactly."""
    return (before * 92_821 + (token + 1) * 68_917 + 12_345) % 1_048_573


def marks(tokens, before: int) -> list[int]:
    result = []
    for token in tokens:
        before = mark(before, token)
        result.append(before)
    return result


def rows(values, layer: int) -> np.ndarray:
    """What a layer stores for tokens of these marks: [n, 1, HEAD_DIM]."""
    columns = np.arange(HEAD_DIM) + 100 * layer
    return (np.array(values, np.float32)[:, None, None] * 8 + columns).astype(np.float32)


def first_kept(num_tokens: int, group: int = 2) -> int:
    """The first token of the first block that the next token may read from."""
    return max(0, num_tokens - RETENTION + 1) // 16 * 16 if group == 2 else 0


def can_shorten(num_tokens: int, length: int) -> bool:
    return length == 0 or max(0, length - RETENTION + 1) >= first_kept(num_tokens)


@dataclass(eq=False)
class Text:
    """The model of a sequence."""

    sequence: kvcore.Sequence
    root: int
    marks: list[int] = field(default_factory=list)
    step: OpenStep | None = None

    @property
    def last(self) -> int:
        return self.marks[-1] if self.marks else self.root


@dataclass(eq=False)
class OpenStep:
    step: kvcore.Step
    texts: list[Text]
    new_marks: list[list[int]]
    appended: set[int] = field(default_factory=set)

    def append(self, layer: int) -> None:
        values = rows([m for new in self.new_marks for m in new], layer)
        self.step.append(layer, values, -values)
        self.appended.add(layer)


class ControlPlane(RuleBasedStateMachine):
    operations: ClassVar[collections.Counter[str]] = collections.Counter()

    texts = Bundle("texts")
    steps = Bundle("steps")

    def __init__(self):
        super().__init__()
        self.cache = kvcore.KVCache(SPEC, num_blocks=NUM_BLOCKS)
        poison(self.cache)
        self.alive: list[Text] = []
        self.open: list[OpenStep] = []
        self.unknown = 1000  # tokens that are given by number get ids that no text has

    def count(self, operation: str) -> None:
        self.operations[operation] += 1

    def add(self, sequence, root, values=()) -> Text:
        text = Text(sequence, root, list(values))
        self.alive.append(text)
        return text

    def remove(self, text: Text) -> None:
        self.alive.remove(text)

    # ---- sequences

    @rule(target=texts)
    def create(self):
        self.count("create")
        return self.add(self.cache.sequence(), 0)

    @rule(
        target=texts,
        document=st.sampled_from(range(len(DOCUMENTS))),
        length=st.integers(0, 120),
        salt=st.sampled_from([None, None, "a", b"a"]),
    )
    def create_with_tokens(self, document, length, salt):
        self.count("create_with_tokens")
        before = self.cache.stats()
        tokens = DOCUMENTS[document][:length]
        sequence = self.cache.sequence(tokens, salt=salt)
        after = self.cache.stats()
        adopted = len(sequence)
        assert adopted % SPAN == 0 and adopted <= max(length - 1, 0)
        assert after.prefix_queries == before.prefix_queries + (length > 0)
        assert after.prefix_hits == before.prefix_hits + (adopted > 0)
        assert after.prefix_hit_tokens == before.prefix_hit_tokens + adopted
        if adopted:
            self.count("hit")
        root = {None: 0, "a": 1, b"a": 2}[salt]
        return self.add(sequence, root, marks(tokens[:adopted], root))

    @rule(
        target=texts,
        document=st.sampled_from(range(len(DOCUMENTS))),
        length=st.integers(SPAN, 120),
        salt=st.sampled_from([None, None, "a"]),
    )
    def write(self, document, length, salt):
        """What an engine does with a prompt: adopts what is cached, and computes the rest."""
        text = self.create_with_tokens(document, length, salt)
        opened = self.begin(text, length, True, [], document)
        if isinstance(opened, OpenStep):
            self.commit(opened)
        return text

    @rule(target=texts, text=texts, share=st.floats(0, 1), everything=st.booleans())
    def fork(self, text, share, everything):
        self.count("fork")
        if text not in self.alive:
            self.expect_freed(text.sequence.fork)
            return multiple()
        length = len(text.marks) if everything else round(share * len(text.marks))
        arguments = () if everything else (length,)
        if text.step:
            self.expect_busy(text.sequence.fork, *arguments)
            return multiple()
        if not can_shorten(len(text.marks), length):
            self.expect_released(text.sequence.fork, length)
            return multiple()
        return self.add(text.sequence.fork(*arguments), text.root, text.marks[:length])

    @rule(text=texts, share=st.floats(0, 1))
    def truncate(self, text, share):
        self.count("truncate")
        if text not in self.alive:
            self.expect_freed(text.sequence.truncate, 0)
            return
        length = round(share * len(text.marks))
        if text.step:
            self.expect_busy(text.sequence.truncate, length)
            return
        if not can_shorten(len(text.marks), length):
            self.expect_released(text.sequence.truncate, length)
            return
        text.sequence.truncate(length)
        del text.marks[length:]

    @rule(text=texts)
    def free(self, text):
        self.count("free")
        if text not in self.alive:
            self.expect_freed(text.sequence.free)
        elif text.step:
            self.expect_busy(text.sequence.free)
        else:
            text.sequence.free()
            assert text.sequence.is_freed
            self.remove(text)

    @rule(text=consumes(texts))
    def drop(self, text):
        """The last reference goes, whatever state the sequence is in."""
        self.count("drop")
        if text in self.alive and not text.step:
            self.remove(text)
            del text.sequence

    # ---- steps

    @rule(
        target=steps,
        text=texts,
        n=st.integers(1, 50),
        known=st.booleans(),
        others=st.lists(st.tuples(texts, st.integers(1, 50), st.booleans()), max_size=3),
        document=st.sampled_from(range(len(DOCUMENTS))),
    )
    def begin(self, text, n, known, others, document):
        self.count("begin")
        members = [(text, n, known), *others]
        chosen = {id(text): (text, n, known) for text, n, known in members if text in self.alive}
        if not chosen:
            return multiple()
        entries, new_marks = [], []
        for text, n, known in chosen.values():
            place = len(text.marks)
            tokens = DOCUMENTS[document][place : place + n] if known else []
            if tokens:
                entries.append((text.sequence, tokens))
            else:
                tokens = range(self.unknown, self.unknown + n)
                self.unknown += n
                entries.append((text.sequence, n))
            new_marks.append(marks(tokens, text.last))
        members = [text for text, _, _ in chosen.values()]
        if any(text.step for text in members):
            self.expect_busy(self.cache.step, entries)
            return multiple()
        stats = self.cache.stats()
        try:
            step = self.cache.step(entries)
        except kvcore.OutOfBlocks as error:
            self.count("out of blocks")
            group = stats.groups[error.group]
            assert error.needed > error.available == group.free + group.cached
            assert self.cache.stats() == stats
            return multiple()
        opened = OpenStep(step, members, new_marks)
        for text in members:
            text.step = opened
        self.open.append(opened)
        return opened

    def close(self, opened: OpenStep, committed: bool) -> None:
        self.open.remove(opened)
        for text, new in zip(opened.texts, opened.new_marks, strict=True):
            text.step = None
            if committed:
                text.marks += new
        if hasattr(opened, "step"):
            for call in (opened.step.commit, opened.step.rollback, lambda: opened.append(0)):
                with pytest.raises(kvcore.StepClosed):
                    call()
            del opened.step  # it holds its sequences, which `drop` wants to be the last to hold

    @rule(opened=steps, layer=st.sampled_from(sorted(OWNERS)))
    def append(self, opened, layer):
        self.count("append")
        if layer in opened.appended:
            with pytest.raises(kvcore.StepError):
                opened.append(layer)
        else:
            opened.append(layer)

    @rule(opened=consumes(steps))
    def commit(self, opened):
        self.count("commit")
        for layer in OWNERS - opened.appended:
            opened.append(layer)
        opened.step.commit()
        self.close(opened, committed=True)

    @rule(opened=consumes(steps))
    def commit_as_it_is(self, opened):
        self.count("commit as it is")
        complete = opened.appended == OWNERS
        if complete:
            opened.step.commit()
        else:
            with pytest.raises(kvcore.StepIncomplete):
                opened.step.commit()
        self.close(opened, committed=complete)

    # A rule for each way out: drawn as a value, one of them may not come about in a whole run.

    @rule(opened=consumes(steps))
    def roll_back(self, opened):
        self.count("step: rollback")
        opened.step.rollback()
        self.close(opened, committed=False)

    @rule(opened=consumes(steps))
    def drop_step(self, opened):
        self.count("step: drop")
        del opened.step
        self.close(opened, committed=False)

    @rule(opened=consumes(steps))
    def fail(self, opened):
        self.count("step: error")
        with pytest.raises(ValueError), opened.step:
            raise ValueError
        self.close(opened, committed=False)

    @rule(opened=consumes(steps))
    def interrupt(self, opened):
        self.count("step: interrupt")
        with pytest.raises(KeyboardInterrupt), opened.step:
            raise KeyboardInterrupt
        self.close(opened, committed=False)

    # ---- the cache

    @rule(wanted=st.sampled_from([False] * 9 + [True]))
    def drop_prefixes(self, wanted):
        if not wanted:
            return  # seldom, or no prefix would live long
        self.count("drop_prefixes")
        self.cache.drop_prefixes()
        assert self.cache.stats().cached == 0

    # ---- what must hold after each

    def expect_freed(self, call, *arguments):
        with pytest.raises(kvcore.SequenceFreed):
            call(*arguments)

    def expect_released(self, call, length):
        self.count("released")
        with pytest.raises(kvcore.TokensReleased, match=r"^length: .* group 2, "):
            call(length)

    def expect_busy(self, call, *arguments):
        with pytest.raises(kvcore.SequenceBusy):
            call(*arguments)

    @invariant()
    def accounts_balance(self):
        assert_balanced(self.cache)
        stats = self.cache.stats()
        assert stats.num_sequences == len(self.alive)
        assert stats.open_steps == len(self.open)

    @invariant()
    def contents_are_the_models(self):
        for text in self.alive:
            assert len(text.sequence) == len(text.marks)
            if text.step:
                continue
            for layer, source in enumerate((0, 1, 0, 3)):
                k, v = text.sequence.read(layer)
                first = first_kept(len(text.marks), SPEC.layers[layer].group)
                expected = rows(text.marks[first:], source)
                assert np.array_equal(k, expected) and np.array_equal(v, -expected)

    @invariant()
    def blocks_have_one_owner_or_the_same_text(self):
        for group, spec in enumerate(SPEC.groups):
            size, held = spec.block_size, {}
            for text in self.alive:
                blocks = text.sequence.blocks(group).tolist()
                assert len(blocks) == -(-len(text.marks) // size)
                first = first_kept(len(text.marks), group) // size
                assert blocks[:first] == [-1] * first and -1 not in blocks[first:]
                for column, block in enumerate(blocks[first:], first):
                    held.setdefault(block, []).append((column, text))
            for holders in held.values():
                column, first = holders[0]
                for other_column, other in holders[1:]:
                    assert other_column == column
                    stop = min((column + 1) * size, len(first.marks), len(other.marks))
                    assert first.marks[:stop] == other.marks[:stop]
            if not self.open:
                assert self.cache.stats().groups[group].in_use == len(held)

    def teardown(self):
        for opened in list(self.open):
            opened.step.rollback()
            self.close(opened, committed=False)
        self.contents_are_the_models()
        for text in self.alive:
            text.sequence.free()
        assert_balanced(self.cache)
        assert self.cache.stats().in_use == 0
        self.cache.drop_prefixes()
        assert self.cache.stats().free == sum(NUM_BLOCKS)


def test_ten_thousand_operations():
    counts = ControlPlane.operations
    counts.clear()
    telling = ("hit", "out of blocks", "commit", "drop", "released")

    def each_kind_has_come_about():
        often = min(counts[name] for name in telling) > 100
        return often and len(counts) == 18 and sum(counts.values()) > 10_000

    assert run_machines(ControlPlane, examples=250, steps=50, until=each_kind_has_come_about), (
        counts
    )


@pytest.mark.slow
def test_a_hundred_thousand_operations():
    run_machines(ControlPlane, examples=1000, steps=100)
