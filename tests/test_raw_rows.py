"""The books of raw rows: which are kept, which are lost and restored, and what they cost."""

from __future__ import annotations

import collections
import math
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
from c_api import CCache, StatusError
from kvcore import CacheSpec, GroupSpec
from mark_backend import marked
from support import assert_balanced, run_machines

RAW = 32  # tokens of a block of raw rows
DOCUMENTS = [[(5 * d + i * i) % 19 for i in range(260)] for d in range(2)]
DOCUMENTS.append([*DOCUMENTS[0][:96], *DOCUMENTS[1][96:]])


def one_group(num_blocks=32, num_raw_blocks=None, *, slack=0, block_size=64, **options):
    options = {"k_format": "chan4", "v_format": "rot4", **options}
    groups = [GroupSpec(block_size, None, slack)]
    return marked(CacheSpec(1, 1, 64, groups=groups, **options), num_blocks, num_raw_blocks)


def grow(cache, entries, tokens=None):
    """A step of marks that nothing depends on; its restores as (column, rows) of each sequence."""
    with cache.step(entries) as step:
        plan = step.plan()
        restores = [[] for _ in entries]
        for s, column, rows in plan.raw.restores.tolist():
            restores[s].append((column, rows))
        for layer in range(cache.spec.num_layers):
            step.append(layer, range(step.num_tokens), None)
    return restores


def raw_columns(sequence, group=0):
    """The columns of raw blocks that a sequence holds."""
    blocks = sequence.blocks(sequence.cache.spec.raw_pool(group))
    return np.flatnonzero(blocks >= 0).tolist()


def reads_raw_from(spec, position):
    """The first of the last tokens that a token reads raw."""
    return max(0, (position + 1) // RAW * RAW - spec.raw_last)


class TestKept:
    @pytest.mark.parametrize("raw_first", [0, 1, 32])
    @pytest.mark.parametrize("raw_last", [0, 32, 64, 128])
    def test_what_the_next_token_reads_and_no_more(self, raw_first, raw_last):
        cache = one_group(raw_first=raw_first, raw_last=raw_last)
        a = cache.sequence()
        for length in range(1, 300):
            assert grow(cache, [(a, 1)]) == [[]]
            read = set(range(reads_raw_from(cache.spec, length), length)) | set(
                range(min(raw_first, length))
            )
            if length % RAW:  # what is still to be encoded
                read |= set(range(length // RAW * RAW, length))
            columns = {j // RAW for j in read}
            held = set(raw_columns(a))
            # The block that the next token fills may go one token later than it could.
            assert columns <= held <= columns | {length // RAW - max(1, raw_last // RAW)}, length
            assert len(held) == cache.spec.pools[1].blocks_held(length)
        assert_balanced(cache)

    def test_none_without_quantized_layers(self):
        spec = CacheSpec(2, 1, 64)
        cache = kvcore.KVCache(spec, 4)
        assert spec.raw_groups == () and spec.pools == spec.groups and spec.raw_pool() is None
        assert cache.num_raw_blocks == () and len(cache.stats().groups) == 1
        with cache.step([(cache.sequence(), 3)]) as step:
            assert step.plan().raw is None and step.plan().restores.shape == (0, 3)
            step.rollback()

    def test_none_where_rows_stand_alone_and_none_are_read(self):
        options = {"raw_first": 0, "raw_last": 0, "v_format": "rot4"}
        assert CacheSpec(1, 1, 64, k_format="rot8", **options).raw_groups == ()
        assert CacheSpec(1, 1, 64, k_format="chan4", **options).raw_groups == (0,)

    def test_only_in_groups_with_quantized_layers(self):
        groups = [GroupSpec(64), GroupSpec(64, 100), GroupSpec(32)]
        spec = CacheSpec(
            4,
            2,
            64,
            groups=groups,
            layer_groups=[0, 1, 2, 1],
            k_format="rot8",
            v_format="bf16",
            layer_formats={0: ("fp32", "bf16"), 3: ("rot6", "rot4")},
        )
        assert spec.raw_groups == (1, 2)
        assert [spec.raw_pool(g) for g in range(3)] == [None, 3, 4]
        assert [pool.block_size for pool in spec.pools] == [64, 64, 32, 32, 32]
        # bf16: K of layer 1; K and V of layer 3; K of layer 2.
        row = 2 * 64 * 2
        assert [spec.raw_bytes_per_token(g) for g in range(3)] == [0, 3 * row, row]
        cache = marked(spec, [4, 5, 6], [7, 8])
        names = [group.name for group in cache.stats().groups]
        assert names == [
            *("group 0", "group 1", "group 2"),
            *("group 1, raw rows", "group 2, raw rows"),
        ]
        assert [group.total for group in cache.stats().groups] == [4, 5, 6, 7, 8]

    def test_a_window_does_not_shorten_it(self):
        spec = CacheSpec(1, 1, 64, groups=[GroupSpec(32, 20)], k_format="rot8", v_format="rot8")
        cache = marked(spec, 8)
        a = cache.sequence()
        for _ in range(20):
            grow(cache, [(a, 13)])
        assert raw_columns(a) == [0, 7, 8] and len(a) == 260
        assert a.first_kept() == 224


class TestRestored:
    @pytest.mark.parametrize("length", [1, 31, 32, 40, 63, 64, 95, 96, 100, 126, 127, 128, 150])
    def test_what_a_truncate_lost(self, length):
        cache = one_group()
        a = cache.sequence()
        grow(cache, [(a, 150)])
        held = raw_columns(a)
        assert held == [0, 3, 4]
        a.truncate(length)
        columns = range(-(-length // RAW))
        assert raw_columns(a) == [c for c in held if c in columns]
        lost = [c for c in columns if c >= reads_raw_from(cache.spec, length) // RAW]
        lost = [c for c in lost if c not in held]
        expected = [(c, min(RAW, length - c * RAW)) for c in lost]
        assert grow(cache, [(a, 3)]) == [expected]
        assert cache.stats().reencoded_rows == sum(rows for _, rows in expected)
        assert cache.stats().groups[1].reencoded_rows == cache.stats().reencoded_rows
        assert grow(cache, [(a, 1)]) == [[]]
        assert_balanced(cache)

    def test_what_a_fork_lost(self):
        cache = one_group()
        a = cache.sequence()
        grow(cache, [(a, 200)])
        b, c = a.fork(100), a.fork()
        restores = grow(cache, [(a, 1), (b, 1), (c, 1)])
        assert restores == [[], [(2, 32), (3, 4)], []]
        assert raw_columns(b) == [0, 2, 3] and cache.stats().reencoded_rows == 36
        assert_balanced(cache)

    def test_exact_refuses(self):
        cache = one_group()
        a = cache.sequence()
        grow(cache, [(a, 150)])
        before = cache.stats(), a.blocks().tolist(), a.blocks(1).tolist()
        for length in (40, 94, 95, 100, 126):
            with pytest.raises(
                kvcore.TokensReleased, match=rf"^length: .* raw rows, .* 0 to 150, got {length}"
            ):
                a.truncate(length, exact=True)
        assert (cache.stats(), a.blocks().tolist(), a.blocks(1).tolist()) == before
        for length in (149, 128, 127, 32, 31, 1, 0):
            a.truncate(length, exact=True)
            assert len(a) == length

    @pytest.mark.parametrize("slack", [1, 16, 40])
    def test_slack_keeps_what_may_be_taken_back(self, slack):
        cache = one_group(slack=slack)
        a = cache.sequence()
        for n in range(90):
            grow(cache, [(a, 1 + slack)])
            a.truncate(len(a) - n % (slack + 1), exact=True)
        assert cache.stats().reencoded_rows == 0

    def test_rollback_gives_back_what_was_restored(self):
        cache = one_group()
        a = cache.sequence()
        grow(cache, [(a, 150)])
        a.truncate(70)
        before = cache.stats().groups[1].free, a.blocks(1).tolist()
        step = cache.step([(a, 60)])
        assert step.plan().raw.restores.tolist() == [[0, 1, 32], [0, 2, 6]]
        step.rollback()
        assert (cache.stats().groups[1].free, a.blocks(1).tolist()) == before
        assert cache.stats().reencoded_rows == 0
        assert grow(cache, [(a, 1)]) == [[(1, 32), (2, 6)]]
        assert_balanced(cache)

    def test_a_group_that_is_sealed_again_is_copied_first(self):
        cache = one_group()
        a = cache.sequence()
        grow(cache, [(a, 150)])
        a.truncate(70)
        block = a.blocks()[1]
        with cache.step([(a, 60)]) as step:
            assert step.plan().copies[:, 0].tolist() == [block]
            assert step.plan().copies[:, 2].tolist() == [70 % 64]
            step.rollback()
        assert a.blocks()[1] == block

    def test_nothing_is_published_afterwards(self):
        cache = one_group()
        tokens = DOCUMENTS[0]
        a = cache.sequence(tokens)
        grow(cache, [(a, tokens[:200])])
        a.truncate(100)
        grow(cache, [(a, tokens[100:150])])
        grow(cache, [(a, tokens[150:])])
        cache.drop_prefixes()
        assert len(cache.sequence(tokens)) == 0
        a.truncate(64)  # before what was restored
        grow(cache, [(a, tokens[64:])])
        grow(cache, [(cache.sequence(), 1)])
        a.free()
        assert len(cache.sequence(tokens)) == 0


class TestPrefixes:
    def test_a_hit_needs_the_raw_rows_that_its_next_token_reads(self):
        cache = one_group(num_blocks=12, num_raw_blocks=12)
        tokens = DOCUMENTS[0]
        a = cache.sequence(tokens)
        grow(cache, [(a, tokens[:200])])
        a.free()
        hit = cache.sequence(tokens)
        assert len(hit) == 192 and raw_columns(hit) == [0, 5]
        assert grow(cache, [(hit, tokens[192:200])]) == [[]]
        hit.free()
        # Of six cached and six free raw blocks, ten leave those of columns 5 and 0.
        b = cache.sequence()
        grow(cache, [(b, 10 * 32)])
        assert len(cache.sequence(tokens)) == 192
        b.free()
        # Nor is there a shorter one than its raw rows allow.
        assert len(cache.sequence(tokens[:130])) == 0

    @pytest.mark.parametrize(("evicted", "found"), [(4, 128), (5, 0)])
    def test_none_without_the_first_rows(self, evicted, found):
        cache = one_group(num_blocks=12, num_raw_blocks=8)
        text, other = DOCUMENTS[0][:128], [*DOCUMENTS[0][:64], *DOCUMENTS[1][:64]]
        a, b = cache.sequence(), cache.sequence()
        grow(cache, [(a, text), (b, other)])
        # The first 64 tokens are listed with a's blocks, which are cached before b's last one.
        a.free()
        b.free()
        assert cache.stats().groups[1].cached == 6
        c = cache.sequence()
        grow(cache, [(c, (2 + evicted) * 32)])
        assert cache.stats().groups[1].evictions == evicted
        assert len(cache.sequence([*other, 0])) == found
        assert_balanced(cache)

    def test_a_fork_inside_a_span_is_published(self):
        """Although the raw block that it shares is listed with the first text."""
        cache = one_group(block_size=128)
        text, other = DOCUMENTS[0], [*DOCUMENTS[0][:160], *DOCUMENTS[1][:100]]
        a = cache.sequence(text)
        grow(cache, [(a, text[:160])])
        b = a.fork()
        grow(cache, [(a, text[160:])])
        grow(cache, [(b, other[160:])])
        for tokens in (text, other):
            assert len(cache.sequence([*tokens, 0])) == 256


class TestShortage:
    def test_names_the_raw_rows(self):
        cache = one_group(num_blocks=10, num_raw_blocks=4)
        a = cache.sequence()
        stats = cache.stats()
        with pytest.raises(
            kvcore.OutOfBlocks,
            match=r"^raw rows of group 0: 5 blocks needed, 4 available .* num_raw_blocks$",
        ) as raised:
            cache.step([(a, 129)])
        assert (raised.value.group, raised.value.raw_of) == (1, 0)
        assert cache.stats() == stats
        for _ in range(8):
            grow(cache, [(a, 64)])
        assert len(a) == 512

    def test_restores_count(self):
        cache = one_group(num_blocks=10, num_raw_blocks=5)
        a = cache.sequence()
        grow(cache, [(a, 150)])
        b, c = a.fork(100), a.fork(60)
        with pytest.raises(kvcore.OutOfBlocks) as raised:
            cache.step([(b, 1), (c, 5)])  # 2 restored, 3 copied; 1 restored, 2 new
        assert (raised.value.needed, raised.value.available) == (4, 2)
        grow(cache, [(b, 1)])
        assert_balanced(cache)


class TestCDoor:
    SPEC = CacheSpec(1, 1, 64)

    @pytest.mark.parametrize(
        "raw", [(0, 4, 0), (0, 0, 32), (-1, 0, 0), (4, -1, 0), (4, 33, 0), (4, 4, 16), (4, 4, -32)]
    )
    def test_raw_rows_that_are_refused(self, raw):
        with pytest.raises(StatusError, match="ERR_VALUE"):
            CCache(self.SPEC, [8], {0: raw})

    def test_raw_slots_that_overflow(self):
        with pytest.raises(StatusError, match="ERR_OVERFLOW"):
            CCache(self.SPEC, [8], {0: (2**26, 4, 32)})

    def test_pools_beyond_the_most(self):
        spec = CacheSpec(9, 1, 64, groups=[GroupSpec(16)] * 9, layer_groups=range(9))
        CCache(spec, [2] * 9, {g: (2, 4, 32) for g in range(7)}).close()
        with pytest.raises(StatusError, match="ERR_VALUE"):
            CCache(spec, [2] * 9, {g: (2, 4, 32) for g in range(8)})

    def test_exact_truncate(self):
        cache = CCache(self.SPEC, [8], {0: (8, 4, 32)})
        a = cache.create()
        step = cache.begin([(a, 150)])
        cache.mark_appended(step, 0)
        cache.commit(step)
        with pytest.raises(StatusError, match="ERR_RELEASED"):
            cache.truncate(a, 100, exact=True)
        assert cache.length(a) == 150
        cache.truncate(a, 100)
        step = cache.begin([(a, 1)])
        plan, raw = cache.plan(step, 0), cache.plan(step, 1)
        assert plan.raw and not raw.raw and plan.num_restores == 0
        restores = np.ctypeslib.as_array(raw.restores, (3 * raw.num_restores,))
        assert restores.tolist() == [0, 2, 32]
        cache.rollback(step)
        cache.check()
        cache.close()


# ---- any order of calls against a model of the rows

PURE = 0


def chain(before, token):
    """The mark of a token after another's mark."""
    return hash((before, token))


@dataclass(eq=False)
class Text:
    """The model of a sequence: what each token is, and how it stands in each group."""

    sequence: kvcore.Sequence
    marks: list[int] = field(default_factory=list)
    raw: list[list] = field(default_factory=list)  # by group: entries of raw rows
    encoded: list[list] = field(default_factory=list)  # by group: entries of encoded rows
    held: list[set] = field(default_factory=list)  # by group: columns of raw blocks
    kept: list[int] = field(default_factory=list)  # by group: the first token that it holds
    exact: float = math.inf  # the first token whose rows, or what they follow from, were restored
    step: OpenStep | None = None


@dataclass(eq=False)
class OpenStep:
    step: kvcore.Step
    texts: list[Text]
    after: list[Text]  # what they become


class Model:
    """What a commit and a truncate make of a text, by the rules that the documentation states."""

    def __init__(self, spec):
        self.spec = spec
        self.groups = range(len(spec.groups))
        self.seals = [any(x.seals_groups for x in spec.layers if x.group == g) for g in self.groups]

    def empty(self, sequence):
        lists = ([[] for _ in self.groups] for _ in range(2))
        return Text(sequence, [], *lists, [set() for _ in self.groups], [0 for _ in self.groups])

    def copy(self, text, sequence):
        copied = self.empty(sequence)
        copied.marks, copied.exact = list(text.marks), text.exact
        copied.raw = [list(entries) for entries in text.raw]
        copied.encoded = [list(entries) for entries in text.encoded]
        copied.held = [set(columns) for columns in text.held]
        copied.kept = list(text.kept)
        return copied

    def cut(self, text, length):
        del text.marks[length:]
        text.exact = math.inf if length <= text.exact else text.exact
        for g in self.groups:
            del text.raw[g][length:]
            del text.encoded[g][length:]
            text.held[g] = {c for c in text.held[g] if c * RAW < length}

    def lost(self, text, g):
        """The columns that the next token reads raw, or that are still to be sealed."""
        length, first = len(text.marks), self.first_column(len(text.marks))
        return [c for c in range(first, -(-length // RAW)) if c not in text.held[g]]

    def first_column(self, length):
        last = max(self.spec.raw_last, 1)
        return max(0, length - last + 1) // RAW if length >= last else 0

    def grow(self, text, tokens):
        """What a step's commit makes of it."""
        grown = self.copy(text, text.sequence)
        start = len(text.marks)
        for g in self.groups:
            lost = self.lost(text, g)
            for column in lost:
                for j in range(column * RAW, min(start, column * RAW + RAW)):
                    grown.raw[g][j] = ("decoded", text.encoded[g][j] if j >= text.kept[g] else None)
            grown.held[g].update(lost)
            grown.exact = min([grown.exact, *(column * RAW for column in lost)])
        before = grown.marks[-1] if grown.marks else PURE
        if grown.exact < start:
            before = chain(before, "restored")  # what the same tokens give elsewhere differs
        for token in tokens:
            before = chain(before, token)
            grown.marks.append(before)
        for g in self.groups:
            self.store(grown, g, start)
        return grown

    def store(self, text, g, start):
        """Adds the rows of the tokens from `start` on, and releases what nothing reads."""
        length, group = len(text.marks), self.spec.groups[g]
        text.raw[g] += [("raw", mark) for mark in text.marks[start:]]
        if self.seals[g]:
            text.encoded[g] += [None] * (length - start)
            for first in range(start // RAW * RAW, length // RAW * RAW, RAW):
                members = tuple(text.raw[g][first : first + RAW])
                sealed = [("sealed", members, place) for place in range(RAW)]
                text.encoded[g][first : first + RAW] = sealed
        else:
            text.encoded[g] += [("row", entry) for entry in text.raw[g][start:]]
        text.held[g] |= set(range(start // RAW, -(-length // RAW)))
        first = self.first_column(length - group.slack)
        pinned = int(self.spec.raw_first > 0)
        text.held[g] = {c for c in text.held[g] if c >= first or c < pinned}
        text.kept[g] = max(text.kept[g], group.first_kept(length))

    def adopt(self, sequence, tokens):
        """What a sequence of these tokens holds that starts from a cached prefix."""
        text = self.grow(self.empty(sequence), tokens)
        length = len(tokens)
        for g in self.groups:
            first, pinned = self.first_column(length), int(self.spec.raw_first > 0)
            columns = range(length // RAW)
            text.held[g] = {c for c in columns if c >= first or c < pinned}
            retention, size = self.spec.groups[g].retention, self.spec.groups[g].block_size
            text.kept[g] = max(0, length - retention + 1) // size * size if retention else 0
        return text


class RawRows(RuleBasedStateMachine):
    """Subclasses say of which spec and how many blocks."""

    spec: ClassVar[CacheSpec]
    num_blocks: ClassVar[tuple[int, ...]]
    num_raw_blocks: ClassVar[tuple[int, ...]]
    operations: ClassVar[collections.Counter[str]] = collections.Counter()

    texts = Bundle("texts")
    steps = Bundle("steps")

    def __init__(self):
        super().__init__()
        self.cache = marked(self.spec, self.num_blocks, self.num_raw_blocks)
        self.model = Model(self.spec)
        self.alive: list[Text] = []
        self.open: list[OpenStep] = []
        self.reencoded = collections.Counter()

    def add(self, text):
        self.alive.append(text)
        return text

    def pick(self, text):
        """Whether an idle text can be asked something."""
        return text in self.alive and text.step is None

    # ---- sequences

    @rule(
        target=texts,
        document=st.sampled_from(range(len(DOCUMENTS))),
        length=st.integers(0, 260),
    )
    def create(self, document, length):
        tokens = DOCUMENTS[document][:length]
        sequence = self.cache.sequence(tokens)
        adopted = len(sequence)
        self.operations["hit" if adopted else "create"] += 1
        assert adopted <= max(length - 1, 0)
        return self.add(self.model.adopt(sequence, tokens[:adopted]))

    @rule(
        target=texts,
        document=st.sampled_from(range(len(DOCUMENTS))),
        length=st.integers(30, 260),
        cut=st.integers(0, 260),
    )
    def write(self, document, length, cut):
        """A prompt in two chunks."""
        text = self.create(document, length)
        for stop in sorted({min(cut, length), length}):
            self.advance([(text, stop - len(text.marks))], document)
        return text

    @rule(
        chosen=st.lists(st.tuples(texts, st.integers(1, 130)), min_size=1, max_size=3),
        document=st.sampled_from(range(len(DOCUMENTS))),
    )
    def advance(self, chosen, document):
        opened = self.begin([(text, n) for text, n in chosen if n > 0], document)
        if isinstance(opened, OpenStep):
            self.commit(opened)

    @rule(text=texts, back=st.integers(1, 120), n=st.integers(1, 60))
    def rewind(self, text, back, n):
        """What a chat does that has an answer written anew."""
        self.truncate(text, back, False)
        self.advance([(text, n)], 2)

    @rule(target=texts, text=texts, share=st.floats(0, 1))
    def fork(self, text, share):
        length = round(share * len(text.marks))
        if not self.pick(text):
            return multiple()
        try:
            sequence = text.sequence.fork(length)
        except kvcore.TokensReleased:
            self.operations["released"] += 1
            assert any(group.retention for group in self.spec.groups)
            return multiple()
        self.operations["fork"] += 1
        copied = self.model.copy(text, sequence)
        self.model.cut(copied, length)
        return self.add(copied)

    @rule(text=texts, back=st.integers(0, 120), exact=st.booleans())
    def truncate(self, text, back, exact):
        if not self.pick(text):
            return
        length = max(0, len(text.marks) - back)
        cut = self.model.copy(text, text.sequence)
        self.model.cut(cut, length)
        lost = any(self.model.lost(cut, g) for g in self.model.groups)
        try:
            text.sequence.truncate(length, exact=exact)
        except kvcore.TokensReleased as error:
            self.operations["released"] += 1
            assert (exact and lost) or "retention" in str(error)
            return
        assert not (exact and lost)
        self.operations["truncate"] += 1
        self.operations["lost"] += lost
        self.model.cut(text, length)

    @rule(text=texts)
    def free(self, text):
        if self.pick(text):
            self.operations["free"] += 1
            text.sequence.free()
            self.alive.remove(text)

    # ---- steps

    @rule(
        target=steps,
        chosen=st.lists(st.tuples(texts, st.integers(1, 130)), min_size=1, max_size=3),
        document=st.sampled_from(range(len(DOCUMENTS))),
    )
    def begin(self, chosen, document):
        chosen = {id(text): (text, n) for text, n in chosen if self.pick(text)}.values()
        if not chosen:
            return multiple()
        entries, after = [], []
        for text, n in chosen:
            place = len(text.marks)
            tokens = DOCUMENTS[document][place : place + n] or [7] * n
            entries.append((text.sequence, tokens))
            after.append(self.model.grow(text, tokens))
        expected = self.expected_restores([text for text, _ in chosen])
        stats = self.cache.stats()
        try:
            step = self.cache.step(entries)
        except kvcore.OutOfBlocks as error:
            self.operations["out of raw" if error.raw_of is not None else "out of blocks"] += 1
            assert self.cache.stats() == stats
            return multiple()
        for g in self.spec.raw_groups:
            assert step.plan(g).raw.restores.tolist() == expected[g]
        opened = OpenStep(step, [text for text, _ in chosen], after)
        for text, _ in chosen:
            text.step = opened
        self.open.append(opened)
        return opened

    def expected_restores(self, texts):
        return [
            [
                [s, column, min(RAW, len(text.marks) - column * RAW)]
                for s, text in enumerate(texts)
                for column in self.model.lost(text, g)
            ]
            for g in self.model.groups
        ]

    def append(self, opened):
        starts = [len(text.marks) for text in opened.texts]
        new = [m for text, n in zip(opened.after, starts, strict=True) for m in text.marks[n:]]
        for layer in range(self.spec.num_layers):
            opened.step.append(layer, new, None)

    @rule(opened=consumes(steps))
    def commit(self, opened):
        self.append(opened)
        self.check_reads(opened)
        for g, restores in enumerate(self.expected_restores(opened.texts)):
            self.reencoded[g] += sum(rows for _, _, rows in restores)
        opened.step.commit()
        self.operations["commit"] += 1
        self.open.remove(opened)
        for text, after in zip(opened.texts, opened.after, strict=True):
            text.__dict__.update(after.__dict__, step=None)

    @rule(opened=consumes(steps), written=st.booleans())
    def roll_back(self, opened, written):
        if written:
            self.append(opened)
        opened.step.rollback()
        self.operations["rollback"] += 1
        self.open.remove(opened)
        for text in opened.texts:
            text.step = None

    @rule(wanted=st.sampled_from([False] * 9 + [True]))
    def drop_prefixes(self, wanted):
        if wanted:
            self.cache.drop_prefixes()

    # ---- what must hold

    def check_rows(self, text, g, tables, start, stop):
        """Tokens [0, stop) as those from `start` on read them, in the blocks of two tables."""
        group, raw_pool = self.spec.groups[g], self.spec.raw_pool(g)
        storage = self.cache._storage
        lower = 0 if group.retention is None else max(0, start - group.retention + 1)
        raw_from = reads_raw_from(self.spec, start)
        if start == stop and self.model.seals[g]:
            raw_from = min(
                raw_from, start // RAW * RAW
            )  # not sealed before the next token is there
        encoded = storage.rows(g, tables[0], 0, stop)
        raw = storage.rows(raw_pool, tables[1], 0, stop)
        for j in range(lower, stop):
            if j < self.spec.raw_first or j >= raw_from:
                if raw[j] is not None:
                    assert raw[j] == text.raw[g][j], (g, j)
                else:  # the next step restores it from here
                    assert start == stop and encoded[j] == text.encoded[g][j], (g, j)
            else:
                assert encoded[j] == text.encoded[g][j], (g, j)

    def check_reads(self, opened):
        """Every new token finds what it reads."""
        for g in self.model.groups:
            plan = opened.step.plan(g)
            tables = zip(plan.block_tables, plan.raw.block_tables, strict=True)
            for text, after, pair in zip(opened.texts, opened.after, tables, strict=True):
                start, stop = len(text.marks), len(after.marks)
                for position in {start, (start + stop) // 2, stop - 1}:
                    self.check_rows(after, g, pair, position, position + 1)

    @invariant()
    def books_and_contents(self):
        assert_balanced(self.cache)
        for text in self.alive:
            if text.step is not None:
                continue
            assert len(text.sequence) == len(text.marks)
            for g in self.model.groups:
                length = len(text.marks)
                assert set(raw_columns(text.sequence, g)) == text.held[g]
                tables = [text.sequence.blocks(p) for p in (g, self.spec.raw_pool(g))]
                self.check_rows(text, g, tables, length, length)
        for g in self.spec.raw_groups:
            stats = self.cache.stats().groups[self.spec.raw_pool(g)]
            assert stats.reencoded_rows == self.reencoded[g]

    def teardown(self):
        for opened in list(self.open):
            self.roll_back(opened, written=False)
        self.books_and_contents()
        for text in self.alive:
            text.sequence.free()
        self.cache.drop_prefixes()
        stats = self.cache.stats()
        assert stats.free == stats.total


class OneGroup(RawRows):
    """Sealed keys in blocks of two groups, few enough that all pools run out."""

    spec = CacheSpec(1, 1, 64, k_format="chan4", v_format="rot4")
    num_blocks, num_raw_blocks = (14,), (16,)


class TwoGroups(RawRows):
    """Small blocks of rows that stand alone beside a window of sealed keys."""

    spec = CacheSpec(
        2,
        1,
        64,
        groups=[GroupSpec(16, None, 5), GroupSpec(32, 90, 3)],
        layer_groups=[0, 1],
        layer_formats={0: ("rot4", "int8"), 1: ("chan2", "bf16")},
        raw_first=0,
        raw_last=64,
    )
    num_blocks, num_raw_blocks = (64, 32), (28, 24)


class NothingLast(RawRows):
    """Only the first rows and those of an unfinished group."""

    spec = CacheSpec(
        1, 1, 64, block_size=128, k_format="chan4", v_format="bf16", raw_first=32, raw_last=0
    )
    num_blocks, num_raw_blocks = (8,), (14,)


def test_any_order_of_calls():
    counts = RawRows.operations
    counts.clear()
    telling = ("hit", "lost", "commit", "rollback", "fork", "released", "out of raw")

    def each_kind_has_come_about():
        return min(counts[name] for name in telling) > 20

    assert run_machines(
        OneGroup, TwoGroups, NothingLast, examples=30, steps=40, until=each_kind_has_come_about
    ), counts
