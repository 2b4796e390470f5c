"""libkvcore's control plane through ctypes: what a C program sees, without kvcore's own Python."""

from __future__ import annotations

import ctypes
import sys
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import numpy as np

import kvcore


class GroupConfig(Structure):
    _fields_ = [
        (name, c_int32)
        for name in (
            *("block_size", "num_blocks", "retention", "slack"),
            *("raw_blocks", "raw_first", "raw_last"),
        )
    ]


class LayerConfig(Structure):
    _fields_ = [("group", c_int32), ("kv_source", c_int32)]


class CacheConfig(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("num_groups", c_int32),
        ("groups", POINTER(GroupConfig)),
        ("num_layers", c_int32),
        ("layers", POINTER(LayerConfig)),
    ]


class GroupStats(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        *((name, c_int32) for name in ("total", "in_use", "cached", "free")),
        *((name, c_int64) for name in ("allocations", "evictions", "copies", "released")),
        ("reencoded_rows", c_int64),
    ]


class StepEntry(Structure):
    _fields_ = [("sequence", c_uint64), ("num_new", c_int32), ("tokens", POINTER(c_int32))]


class Shortage(Structure):
    _fields_ = [("group", c_int32), ("needed", c_int64), ("available", c_int64)]


class Plan(Structure):
    _fields_ = [
        *((n, c_int32) for n in ("block_size", "num_sequences", "num_tokens", "max_new")),
        ("query_starts", POINTER(c_int32)),
        ("seq_lens", POINTER(c_int32)),
        ("slots", POINTER(c_int32)),
        ("num_copies", c_int32),
        ("copies", POINTER(c_int32)),
        ("num_new_blocks", c_int32),
        ("new_blocks", POINTER(c_int32)),
        ("block_rows", POINTER(POINTER(c_int32))),
        ("buffer", POINTER(c_int32)),
        ("buffer_size", c_int64),
        ("raw", c_void_p),
        ("num_restores", c_int32),
        ("restores", POINTER(c_int32)),
    ]


class StatusError(Exception):
    """A call returned something other than KV_OK; `name` is the status's."""

    def __init__(self, name):
        super().__init__(name)
        self.name = name


def load():
    name = "libkvcore.dylib" if sys.platform == "darwin" else "libkvcore.so"
    library = ctypes.CDLL(str(Path(kvcore.get_library_dir()) / name))
    library.kv_status_name.restype = c_char_p
    return library


class CCache:
    """A kv_cache with the calls that the tests make.

    raw: {group: (raw_blocks, raw_first, raw_last)} for the groups that keep raw rows.
    """

    def __init__(self, spec, num_blocks, raw=None):
        raw = raw or {}
        self.library = load()
        groups = (GroupConfig * len(spec.groups))(
            *(
                (g.block_size, count, g.retention or 0, g.slack, *raw.get(number, (0, 0, 0)))
                for number, (g, count) in enumerate(zip(spec.groups, num_blocks, strict=True))
            )
        )
        layers = (LayerConfig * spec.num_layers)(*((x.group, x.kv_source) for x in spec.layers))
        config = CacheConfig(ctypes.sizeof(CacheConfig), len(groups), groups, len(layers), layers)
        self.num_pools, self.spec = len(groups) + len(raw), spec
        self.cache = c_void_p()
        self.call("cache_create", ctypes.byref(config), ctypes.byref(self.cache))

    def call(self, name, *arguments):
        status = getattr(self.library, f"kv_{name}")(*arguments)
        if status:
            raise StatusError(self.library.kv_status_name(status).decode())

    def close(self):
        self.call("cache_destroy", self.cache)

    def check(self):
        message = (c_char * 256)()
        self.call("cache_check", self.cache, message, c_size_t(256))

    def create(self):
        out = c_uint64()
        self.call("sequence_create", self.cache, ctypes.byref(out))
        return out.value

    def create_cached(self, tokens, salt):
        out = c_uint64()
        tokens = np.ascontiguousarray(tokens, np.int32)
        pointer = tokens.ctypes.data_as(POINTER(c_int32))
        self.call(
            "sequence_create_cached",
            self.cache, pointer, c_int32(tokens.size), c_uint64(salt), ctypes.byref(out),
        )  # fmt: skip
        return out.value

    def fork(self, sequence, length):
        out = c_uint64()
        arguments = c_uint64(sequence), c_int32(length), ctypes.byref(out)
        self.call("sequence_fork", self.cache, *arguments)
        return out.value

    def truncate(self, sequence, length, exact=False):
        arguments = c_uint64(sequence), c_int32(length), c_int32(exact)
        self.call("sequence_truncate", self.cache, *arguments)

    def free(self, sequence):
        self.call("sequence_free", self.cache, c_uint64(sequence))

    def length(self, sequence):
        out = c_int32()
        self.call("sequence_length", self.cache, c_uint64(sequence), ctypes.byref(out))
        return out.value

    def begin(self, entries):
        """entries: (handle, number of new tokens or int32 ids). The step, or a Shortage."""
        native = (StepEntry * len(entries))()
        for entry, (sequence, new) in zip(native, entries, strict=True):
            entry.sequence = sequence
            entry.num_new = new if isinstance(new, int) else len(new)
            if not isinstance(new, int):
                entry.tokens = new.ctypes.data_as(POINTER(c_int32))
        step, shortage = c_void_p(), Shortage()
        try:
            self.call(
                "step_begin",
                self.cache, native, c_int32(len(entries)), ctypes.byref(step),
                ctypes.byref(shortage),
            )  # fmt: skip
        except StatusError as error:
            if error.name.endswith("OUT_OF_BLOCKS"):
                return shortage
            raise
        return step

    def plan(self, step, pool):
        plan = Plan()
        self.call("step_get_plan", step, c_int32(pool), ctypes.byref(plan))
        return plan

    def block_tables(self, plan):
        width = max(-(-plan.seq_lens[s] // plan.block_size) for s in range(plan.num_sequences))
        tables = np.empty((plan.num_sequences, width), np.int32)
        pointer = tables.ctypes.data_as(POINTER(c_int32))
        self.call("plan_block_tables", ctypes.byref(plan), pointer, c_int32(width))
        return tables

    def mark_appended(self, step, layer):
        self.call("step_mark_appended", step, c_int32(layer))

    def commit(self, step):
        self.call("step_commit", step)

    def rollback(self, step):
        self.call("step_rollback", step)

    def drop_prefixes(self):
        self.call("cache_drop_prefixes", self.cache)

    def group_stats(self, pool):
        stats = GroupStats(struct_size=ctypes.sizeof(GroupStats))
        self.call("cache_get_group_stats", self.cache, c_int32(pool), ctypes.byref(stats))
        return stats
