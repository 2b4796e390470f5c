"""Traces of control-plane calls, and two players of them: the Python face and the C door.

A trace is a list of (operation, arguments) over sequences and steps by name, so that it can be
played on any cache. Playing gives what each call answered, plans byte for byte, as a list that two
players of the same trace must agree on.
"""

from __future__ import annotations

import random

import numpy as np

import kvcore
from c_api import CCache, Shortage, StatusError
from mark_backend import marked


def make_trace(seed, length):
    """A random trace: sequences come, fork, grow, shrink and go, in overlapping steps."""
    rng = random.Random(seed)
    documents = [[rng.randrange(50) for _ in range(150)] for _ in range(4)]
    idle, steps, trace = [], [], []

    def new_tokens():
        if rng.random() < 0.3:
            return rng.randrange(1, 40)
        start = rng.choice([0, 0, 16, 32, 64])
        return rng.choice(documents)[start : start + rng.randrange(1, 80)]

    for n in range(length):
        full = len(idle) + sum(len(members) for _, members in steps) > 7
        operation = rng.choices(
            ["create", "create_cached", "fork", "truncate", "free", "begin", "close", "drop"],
            [0, 0, 0, 20, 30, 30, 30, 1] if full else [6, 10, 8, 10, 8, 30, 30, 1],
        )[0]
        if operation == "create":
            trace.append(("create", f"s{n}"))
            idle.append(f"s{n}")
        elif operation == "create_cached":
            tokens = rng.choice(documents)[: rng.randrange(0, 151)]
            trace.append(("create_cached", f"s{n}", tokens, rng.choice([0, 0, 0, 1])))
            idle.append(f"s{n}")
        elif operation == "fork" and idle:
            trace.append(("fork", rng.choice(idle), f"s{n}", rng.random()))
            idle.append(f"s{n}")
        elif operation == "truncate" and idle:
            trace.append(("truncate", rng.choice(idle), rng.random(), rng.random() < 0.2))
        elif operation == "free" and idle:
            trace.append(("free", idle.pop(rng.randrange(len(idle)))))
        elif operation == "begin" and idle:
            names = rng.sample(idle, rng.randint(1, min(4, len(idle))))
            trace.append(("begin", f"t{n}", [(name, new_tokens()) for name in names]))
            steps.append((f"t{n}", names))
            idle = [name for name in idle if name not in names]
        elif operation == "close" and steps:
            name, members = steps.pop(rng.randrange(len(steps)))
            trace.append((rng.choice(["commit", "commit", "commit", "rollback"]), name))
            idle += members
        elif operation == "drop":
            trace.append(("drop_prefixes",))
    for name, members in steps:
        trace.append(("commit", name))
        idle += members
    return trace + [("free", name) for name in idle]


def as_new(new):
    return new if isinstance(new, int) else np.array(new, np.int32)


def counts_of(stats):
    names = ("in_use", "cached", "free", "allocations", "evictions", "copies", "released")
    return tuple(getattr(stats, name) for name in (*names, "reencoded_rows"))


def is_released(error):
    """Asserts that it says what a group's retention does not allow; True."""
    assert isinstance(error, kvcore.TokensReleased) or error.name == "ERR_RELEASED", error
    return True


class Player:
    """Plays a trace. A step that found too few blocks is closed as soon as it was begun."""

    def __init__(self):
        self.sequences, self.steps, self.answers = {}, {}, []

    def play(self, trace):
        for operation, *arguments in trace:
            self.answers.append((operation, getattr(self, operation)(*arguments)))
            self.check()
        return self.answers

    def create(self, name):
        self.sequences[name] = self._create()

    def fork(self, source, name, share):
        """At the length that the trace asks for, or as a whole where that was released."""
        length = int(share * (self.length(source) + 1))
        released = False
        try:
            self.sequences[name] = self._fork(self.sequences[source], length)
        except self.refusal as error:
            released = is_released(error)
            self.sequences[name] = self._fork(self.sequences[source], self.length(source))
        return released, self.length(name), self.balance()

    def truncate(self, name, share, exact):
        try:
            self._truncate(self.sequences[name], int(share * (self.length(name) + 1)), exact)
        except self.refusal as error:
            return is_released(error), self.length(name)
        return False, self.length(name), self.balance()

    def begin(self, name, entries):
        entries = [(self.sequences[sequence], as_new(new)) for sequence, new in entries]
        step, answer = self._begin(entries)
        if step is not None:
            self.steps[name] = step
        return answer

    def commit(self, name):
        if name in self.steps:
            self._commit(self.steps.pop(name))
        return self.balance()

    def rollback(self, name):
        if name in self.steps:
            self._rollback(self.steps.pop(name))
        return self.balance()


class PythonPlayer(Player):
    refusal = kvcore.TokensReleased

    def __init__(self, spec, num_blocks, num_raw_blocks=None):
        super().__init__()
        self.cache = marked(spec, num_blocks, num_raw_blocks)

    def check(self):
        self.cache.check()

    def length(self, name):
        return len(self.sequences[name])

    def _create(self):
        return self.cache.sequence()

    def create_cached(self, name, tokens, salt):
        salt = f"tenant {salt}" if salt else None
        self.sequences[name] = self.cache.sequence(tokens, salt=salt)
        return self.length(name)

    def _fork(self, source, length):
        return source.fork(length)

    def _truncate(self, sequence, length, exact):
        sequence.truncate(length, exact=exact)

    def free(self, name):
        self.sequences.pop(name).free()
        return self.balance()

    def _begin(self, entries):
        try:
            step = self.cache.step(entries)
        except kvcore.OutOfBlocks as error:
            return None, (error.group, error.needed, error.available)
        plans = [step.plan(pool) for pool in range(len(self.cache.spec.pools))]
        tables = [plan.block_tables for plan in plans]
        return step, (plans[0].buffer.tobytes(), [(t.shape, t.tobytes()) for t in tables])

    def _commit(self, step):
        for layer, spec in enumerate(self.cache.spec.layers):
            if spec.kv_source == layer:
                step.append(layer, range(step.num_tokens), None)
        step.commit()

    def _rollback(self, step):
        step.rollback()

    def drop_prefixes(self):
        self.cache.drop_prefixes()
        return self.balance()

    def balance(self):
        return [counts_of(group) for group in self.cache.stats().groups]


class CPlayer(Player):
    refusal = StatusError

    def __init__(self, spec, num_blocks, num_raw_blocks=()):
        super().__init__()
        counts = zip(spec.raw_groups, num_raw_blocks, strict=True)
        raw = {g: (count, spec.raw_first, spec.raw_last) for g, count in counts}
        self.cache = CCache(spec, num_blocks, raw)
        self.check = self.cache.check
        self._create = self.cache.create
        self._fork = self.cache.fork
        self._truncate = self.cache.truncate
        self._rollback = self.cache.rollback

    def length(self, name):
        return self.cache.length(self.sequences[name])

    def create_cached(self, name, tokens, salt):
        self.sequences[name] = self.cache.create_cached(tokens, salt)
        return self.length(name)

    def free(self, name):
        self.cache.free(self.sequences.pop(name))
        return self.balance()

    def _begin(self, entries):
        step = self.cache.begin(entries)
        if isinstance(step, Shortage):
            return None, (step.group, step.needed, step.available)
        plans = [self.cache.plan(step, pool) for pool in range(self.cache.num_pools)]
        buffer = np.ctypeslib.as_array(plans[0].buffer, (plans[0].buffer_size,))
        tables = [self.cache.block_tables(plan) for plan in plans]
        return step, (buffer.tobytes(), [(t.shape, t.tobytes()) for t in tables])

    def _commit(self, step):
        for layer, spec in enumerate(self.cache.spec.layers):
            if spec.kv_source == layer:
                self.cache.mark_appended(step, layer)
        self.cache.commit(step)

    def drop_prefixes(self):
        self.cache.drop_prefixes()
        return self.balance()

    def balance(self):
        return [counts_of(self.cache.group_stats(p)) for p in range(self.cache.num_pools)]
