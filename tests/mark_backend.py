"""A data plane that stores what each row is instead of numbers, to check the books of raw rows.

An entry of a raw row is ("raw", mark) or ("decoded", encoded entry); one of an encoded row is
("row", raw entry), or ("sealed", the 32 raw entries of its group, place) where a group of tokens is
encoded together. So a row that is lost, stale, foreign, encoded twice or decoded shows.
"""

from __future__ import annotations

from unittest import mock

import numpy as np

import kvcore
from kvcore.spec import RAW_BLOCK_SIZE


def marked(spec, num_blocks=None, num_raw_blocks=None, **options):
    """A cache whose rows are entries."""
    with mock.patch("kvcore.cache.get_backend", lambda name: MarkBackend()):
        return kvcore.KVCache(spec, num_blocks, num_raw_blocks, **options)


class Marks:
    """Entries [N, block_size] of each pool."""

    nbytes = 0

    def __init__(self, spec, num_blocks):
        self.spec = spec
        self.pools = [
            np.full((count, pool.block_size), None)
            for pool, count in zip(spec.pools, num_blocks, strict=True)
        ]

    def rows(self, pool, block_row, start, stop):
        """The entries of tokens [start, stop) of a sequence; None where a block was released."""
        entries, size = self.pools[pool], self.pools[pool].shape[1]
        return [
            None if block_row[j // size] < 0 else entries[block_row[j // size], j % size]
            for j in range(start, stop)
        ]


class MarkBackend:
    """The calls of kvcore.backend.Backend that a cache makes of itself; one layer a group."""

    name = "marks"

    def allocate(self, spec, num_blocks, device):
        return Marks(spec, num_blocks)

    def begin_step(self, storage, plans):
        pass

    def copy_blocks(self, storage, pool, plan):
        entries = storage.pools[pool]
        for source, target, rows in plan.copies.tolist():
            # Whole groups, of which a sealed one may have more rows than are kept.
            rows = -(-rows // RAW_BLOCK_SIZE) * RAW_BLOCK_SIZE
            entries[target, :rows] = entries[source, :rows]

    def restore_raw(self, storage, group, plan):
        raw = storage.pools[storage.spec.raw_pool(group)]
        tables, raw_tables = plan.block_tables, plan.raw.block_tables
        for s, column, rows in plan.raw.restores.tolist():
            start = column * RAW_BLOCK_SIZE
            encoded = storage.rows(group, tables[s], start, start + rows)
            for row, entry in enumerate(encoded):
                raw[raw_tables[s, column], row] = ("decoded", entry)

    def append(self, storage, layer, plan, marks, v, layout):
        spec = storage.spec.layers[layer]
        raw_pool = storage.spec.raw_pool(spec.group)
        entries = [("raw", mark) for mark in marks]
        if raw_pool is not None:
            storage.pools[raw_pool].reshape(-1)[plan.raw.slots] = as_objects(entries)
        if not spec.seals_groups:
            rows = as_objects([("row", entry) for entry in entries])
            storage.pools[spec.group].reshape(-1)[plan.slots] = rows
            return
        for s, stop in enumerate(plan.seq_lens.tolist()):
            start = stop - (plan.query_starts[s + 1] - plan.query_starts[s])
            for group in range(start // RAW_BLOCK_SIZE, stop // RAW_BLOCK_SIZE):
                self._seal(storage, spec.group, plan, s, group * RAW_BLOCK_SIZE)

    def _seal(self, storage, group, plan, s, start):
        raw_pool = storage.spec.raw_pool(group)
        table, raw_table = plan.block_tables[s], plan.raw.block_tables[s]
        stop = start + RAW_BLOCK_SIZE
        members = tuple(storage.rows(raw_pool, raw_table, start, stop))
        size = storage.pools[group].shape[1]
        for place in range(RAW_BLOCK_SIZE):
            j = start + place
            storage.pools[group][table[j // size], j % size] = ("sealed", members, place)


def as_objects(entries):
    array = np.empty(len(entries), object)
    array[:] = entries
    return array
