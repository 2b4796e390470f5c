"""Bad input to every public call: the exception's class, the argument it names, nothing changed."""

from __future__ import annotations

import re
import types

import numpy as np
import pytest

import kvcore
from kvcore import errors, ops
from support import append_all, grow, make_cache, random_kv, random_q, snapshot

ARGUMENT, TYPE = kvcore.InvalidArgument, kvcore.InvalidType
T = 5  # new tokens of the open step


@pytest.fixture
def world():
    """A cache with idle sequences, one that is in an open step, a freed and a foreign one."""
    rng = np.random.default_rng(0)
    w = types.SimpleNamespace(cache=make_cache(12, num_layers=3, head_dim_v=24, kv_sources={2: 0}))
    w.a, w.b, w.busy, w.freed = (w.cache.sequence() for _ in range(4))
    grow(w.cache, [(w.a, [*range(20)]), (w.b, 7)], rng)
    w.freed.free()
    w.foreign = make_cache(2).sequence()
    w.k, w.v = random_kv(rng, T, w.cache.spec.layers[0])
    w.q = random_q(rng, T, 4, 16)
    w.step = w.cache.step([(w.busy, T)])
    w.step.append(0, w.k, w.v)
    w.closed = w.cache.step([(w.b, 1)])
    w.closed.rollback()
    # For ops.
    w.k_blocks = rng.standard_normal((4, 2, 16, 16)).astype(np.float32)
    w.v_blocks = rng.standard_normal((4, 2, 16, 24)).astype(np.float32)
    w.books = {"block_tables": [[2, 0], [1, 1]], "seq_lens": [20, 3], "query_starts": [0, 4, 5]}
    return w


def append(w, layer=1, **changes):
    arguments = {"k": w.k, "v": w.v, **changes}
    w.step.append(layer, arguments.pop("k"), arguments.pop("v"), **arguments)


def attend(w, layer=0, **changes):
    arguments = {"q": w.q, **changes}
    return w.step.attend(layer, arguments.pop("q"), **arguments)


def append_kv(w, **changes):
    arguments = {
        "k": w.k,
        "v": w.v,
        "k_blocks": w.k_blocks,
        "v_blocks": w.v_blocks,
        "slots": [*range(T)],
        **changes,
    }
    ops.append_kv(**arguments)


def paged_attention(w, **changes):
    return ops.paged_attention(
        **{"q": w.q, "k_blocks": w.k_blocks, "v_blocks": w.v_blocks, **w.books, **changes}
    )


def paged_attention_of_one(w, **changes):
    """One sequence of T new tokens, as in the open step."""
    books = {"block_tables": [[2]], "seq_lens": [T], "query_starts": [0, T]}
    return paged_attention(w, **books, **changes)


def padded_attention(w, **changes):
    arguments = {"q": w.q[None], "k": w.k[None], "v": w.v[None], "layout": "BSHD", **changes}
    return ops.attention(**arguments)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


HUGE = 2**31

# (exception, the argument that its message starts with, call)
BAD = [
    # KVCache
    (TYPE, "spec", lambda w: kvcore.KVCache(None, num_blocks=4)),
    (ARGUMENT, "num_blocks, memory", lambda w: kvcore.KVCache(w.cache.spec)),
    (ARGUMENT, "num_blocks, memory", lambda w: kvcore.KVCache(w.cache.spec, 4, memory=2**20)),
    (ARGUMENT, "num_blocks", lambda w: kvcore.KVCache(w.cache.spec, 0)),
    (ARGUMENT, "num_blocks", lambda w: kvcore.KVCache(w.cache.spec, -3)),
    (TYPE, "num_blocks", lambda w: kvcore.KVCache(w.cache.spec, 2.5)),
    (ARGUMENT, "num_blocks", lambda w: kvcore.KVCache(w.cache.spec, "44")),
    (ARGUMENT, "num_blocks", lambda w: kvcore.KVCache(w.cache.spec, [4, 4])),
    (ARGUMENT, "num_blocks", lambda w: kvcore.KVCache(w.cache.spec, 2**27)),
    (ARGUMENT, "num_blocks", lambda w: kvcore.KVCache(w.cache.spec, HUGE)),
    (ARGUMENT, "num_blocks", lambda w: kvcore.KVCache(w.cache.spec, 2**70)),
    (ARGUMENT, "memory", lambda w: kvcore.KVCache(w.cache.spec, memory="plenty")),
    (ARGUMENT, "memory", lambda w: kvcore.KVCache(w.cache.spec, memory=-1)),
    (TYPE, "memory", lambda w: kvcore.KVCache(w.cache.spec, memory=1.5)),
    (ARGUMENT, "sequence_length", lambda w: kvcore.KVCache(w.cache.spec, 4, sequence_length=9)),
    (
        ARGUMENT,
        "sequence_length",
        lambda w: kvcore.KVCache(w.cache.spec, memory="1MiB", sequence_length=0),
    ),
    (
        TYPE,
        "sequence_length",
        lambda w: kvcore.KVCache(w.cache.spec, memory="1MiB", sequence_length="9"),
    ),
    (ARGUMENT, "backend", lambda w: kvcore.KVCache(w.cache.spec, 4, backend="tpu")),
    (ARGUMENT, "backend", lambda w: kvcore.KVCache(w.cache.spec, 4, backend=None)),
    (ARGUMENT, "device", lambda w: kvcore.KVCache(w.cache.spec, 4, device=0)),
    # KVCache.sequence
    (ARGUMENT, "tokens", lambda w: w.cache.sequence([[1, 2], [3, 4]])),
    (ARGUMENT, "tokens", lambda w: w.cache.sequence([[1], [1, 2]])),
    (ARGUMENT, "tokens", lambda w: w.cache.sequence([1.5])),
    (ARGUMENT, "tokens", lambda w: w.cache.sequence([1, -1])),
    (ARGUMENT, "tokens", lambda w: w.cache.sequence([HUGE])),
    (TYPE, "tokens", lambda w: w.cache.sequence(5)),
    (TYPE, "tokens", lambda w: w.cache.sequence("a prompt")),
    (TYPE, "salt", lambda w: w.cache.sequence([1], salt=5)),
    # KVCache.step
    (ARGUMENT, "layer", lambda w: w.cache.blocks(3)),
    (ARGUMENT, "layer", lambda w: w.cache.blocks(-1)),
    (TYPE, "layer", lambda w: w.cache.blocks(None)),
    (ARGUMENT, "entries", lambda w: w.cache.step([])),
    (TYPE, "entries", lambda w: w.cache.step(None)),
    (TYPE, "entries", lambda w: w.cache.step(w.a)),
    (TYPE, "entries[0]", lambda w: w.cache.step([w.a])),
    (TYPE, "entries[1]", lambda w: w.cache.step([(w.a, 1), (w.b, 1, 2)])),
    (TYPE, "entries[0]", lambda w: w.cache.step([("a", 1)])),
    (TYPE, "entries[1]", lambda w: w.cache.step([(w.a, 1), (None, 1)])),
    (ARGUMENT, "entries[1]", lambda w: w.cache.step([(w.a, 1), (w.b, 0)])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, -4)])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, HUGE)])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, 2**70)])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, [])])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, [1.0])])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, [[1]])])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, np.array(3))])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, [-1])])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, [0, 2**31])])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, [2**70])])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, [1, True, 1.5])])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, np.array([1, -1]))])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, np.array([2**31]))])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, np.array([1, -1], np.int32))])),
    (ARGUMENT, "entries[0]", lambda w: w.cache.step([(w.a, np.array([2**63], np.uint64))])),
    (TYPE, "entries[0]", lambda w: w.cache.step([(w.a, None)])),
    (TYPE, "entries[0]", lambda w: w.cache.step([(w.a, 1.0)])),
    (TYPE, "entries[0]", lambda w: w.cache.step([(w.a, True)])),
    (TYPE, "entries[0]", lambda w: w.cache.step([(w.a, "ab")])),
    (ARGUMENT, "entries", lambda w: w.cache.step([(w.a, 1), (w.b, 1), (w.a, 2)])),
    (kvcore.SequenceFreed, "entries[1]", lambda w: w.cache.step([(w.a, 1), (w.freed, 1)])),
    (kvcore.ForeignSequence, "entries[1]", lambda w: w.cache.step([(w.a, 1), (w.foreign, 1)])),
    (kvcore.SequenceBusy, "", lambda w: w.cache.step([(w.a, 1), (w.busy, 1)])),
    (kvcore.OutOfBlocks, "group 0", lambda w: w.cache.step([(w.a, 1), (w.b, 16 * 12)])),
    # Sequence
    (ARGUMENT, "length", lambda w: w.a.fork(21)),
    (ARGUMENT, "length", lambda w: w.a.fork(-1)),
    (ARGUMENT, "length", lambda w: w.a.fork(2**70)),
    (TYPE, "length", lambda w: w.a.fork(1.0)),
    (TYPE, "length", lambda w: w.a.fork("1")),
    (ARGUMENT, "length", lambda w: w.a.truncate(21)),
    (ARGUMENT, "length", lambda w: w.a.truncate(-1)),
    (TYPE, "length", lambda w: w.a.truncate(None)),
    (TYPE, "length", lambda w: w.a.truncate(False)),
    (ARGUMENT, "layer", lambda w: w.a.read(3)),
    (ARGUMENT, "layer", lambda w: w.a.read(-1)),
    (TYPE, "layer", lambda w: w.a.read(0.0)),
    (ARGUMENT, "group", lambda w: w.a.blocks(1)),
    (TYPE, "group", lambda w: w.a.blocks("0")),
    (kvcore.SequenceFreed, "", lambda w: w.freed.fork()),
    (kvcore.SequenceFreed, "", lambda w: w.freed.truncate(0)),
    (kvcore.SequenceFreed, "", lambda w: w.freed.read(0)),
    (kvcore.SequenceFreed, "", lambda w: w.freed.free()),
    (kvcore.SequenceFreed, "", lambda w: len(w.freed)),
    (kvcore.SequenceBusy, "", lambda w: w.busy.fork()),
    (kvcore.SequenceBusy, "", lambda w: w.busy.truncate(0)),
    (kvcore.SequenceBusy, "", lambda w: w.busy.read(0)),
    (kvcore.SequenceBusy, "", lambda w: w.busy.free()),
    # Step.append
    (ARGUMENT, "layer", lambda w: append(w, 3)),
    (ARGUMENT, "layer", lambda w: append(w, -1)),
    (TYPE, "layer", lambda w: append(w, "1")),
    (kvcore.StepError, "", lambda w: append(w, 0)),
    (kvcore.StepError, "", lambda w: append(w, 2)),
    (kvcore.StepClosed, "", lambda w: w.closed.append(0, w.k, w.v)),
    (ARGUMENT, "layout", lambda w: append(w, layout="NDH")),
    (ARGUMENT, "layout", lambda w: append(w, layout=None)),
    (ARGUMENT, "layout", lambda w: append(w, layout=["NHD"])),
    (ARGUMENT, "k", lambda w: append(w, k=w.k[:-1])),
    (ARGUMENT, "k", lambda w: append(w, k=w.k[:, :1])),
    (ARGUMENT, "k", lambda w: append(w, k=w.k[..., :8])),
    (ARGUMENT, "k", lambda w: append(w, k=w.k[0])),
    (ARGUMENT, "k", lambda w: append(w, k=w.k[None])),
    (ARGUMENT, "k", lambda w: append(w, k=np.float32(1))),
    (ARGUMENT, "v", lambda w: append(w, v=w.k)),
    (ARGUMENT, "v", lambda w: append(w, v=zeros(T + 1, 2, 24))),
    (ARGUMENT, "k", lambda w: append(w, layout="HND")),
    (ARGUMENT, "k", lambda w: append(w, layout="BSHD")),
    (ARGUMENT, "k", lambda w: append(w, k=zeros(1, T - 1, 2, 16), layout="BSHD")),
    (ARGUMENT, "k", lambda w: append(w, k=zeros(2, T, 2, 16), layout="BSHD")),
    (ARGUMENT, "k", lambda w: append(w, k=zeros(1, T, 2, 16), layout="BHSD")),
    (TYPE, "k", lambda w: append(w, k=w.k.astype(np.float64))),
    (TYPE, "v", lambda w: append(w, v=w.v.astype(np.int32))),
    (TYPE, "v", lambda w: append(w, v=w.v.astype(">f4"))),
    (TYPE, "k", lambda w: append(w, k=w.k.tolist())),
    (TYPE, "v", lambda w: append(w, v=None)),
    # Step.attend
    (ARGUMENT, "layer", lambda w: attend(w, 3)),
    (kvcore.StepError, "", lambda w: attend(w, 1)),
    (kvcore.StepClosed, "", lambda w: w.closed.attend(0, w.q)),
    (ARGUMENT, "layout", lambda w: attend(w, layout="")),
    (ARGUMENT, "q", lambda w: attend(w, q=w.q[:, :3])),
    (ARGUMENT, "q", lambda w: attend(w, q=w.q[:, :1])),
    (ARGUMENT, "q", lambda w: attend(w, q=w.q[:, :0])),
    (ARGUMENT, "q", lambda w: attend(w, q=w.q[..., :8])),
    (ARGUMENT, "q", lambda w: attend(w, q=w.q[:4])),
    (ARGUMENT, "q", lambda w: attend(w, q=w.q[0])),
    (ARGUMENT, "q", lambda w: attend(w, q=zeros(1, 4, 4, 16), layout="BSHD")),
    (TYPE, "q", lambda w: attend(w, q=w.q.astype(np.float64))),
    (TYPE, "q", lambda w: attend(w, q=None)),
    (ARGUMENT, "scale", lambda w: attend(w, scale=np.nan)),
    (ARGUMENT, "scale", lambda w: attend(w, scale=np.inf)),
    (ARGUMENT, "scale", lambda w: attend(w, scale=1e300)),
    (TYPE, "scale", lambda w: attend(w, scale="1")),
    (TYPE, "scale", lambda w: attend(w, scale=True)),
    (ARGUMENT, "out", lambda w: attend(w, out=zeros(T, 4, 16))),
    (ARGUMENT, "out", lambda w: attend(w, out=zeros(T, 2, 24))),
    (ARGUMENT, "out", lambda w: attend(w, out=read_only(zeros(T, 4, 24)))),
    (ARGUMENT, "out", lambda w: attend(w, out=zeros(T, 4, 48)[..., ::2])),
    (ARGUMENT, "out", lambda w: attend(w, out=np.lib.stride_tricks.as_strided(
        zeros(4, 24), (T, 4, 24), (0, 96, 4)))),
    (TYPE, "out", lambda w: attend(w, out=zeros(T, 4, 24, dtype=np.float16))),
    (TYPE, "out", lambda w: attend(w, out=zeros(T, 4, 24).tolist())),
    # Step.plan, commit, rollback
    (ARGUMENT, "group", lambda w: w.step.plan(1)),
    (TYPE, "group", lambda w: w.step.plan(None)),
    (kvcore.StepClosed, "", lambda w: w.closed.plan()),
    (kvcore.StepClosed, "", lambda w: w.closed.commit()),
    (kvcore.StepClosed, "", lambda w: w.closed.rollback()),
    # ops.append_kv
    (ARGUMENT, "k", lambda w: append_kv(w, k=w.k[:2])),
    (ARGUMENT, "v", lambda w: append_kv(w, v=w.k)),
    (TYPE, "k", lambda w: append_kv(w, k=w.k.astype(np.int8))),
    (TYPE, "k_blocks", lambda w: append_kv(w, k_blocks=w.k_blocks.astype(np.float64))),
    (TYPE, "v_blocks", lambda w: append_kv(w, v_blocks=None)),
    (ARGUMENT, "k_blocks", lambda w: append_kv(w, k_blocks=w.k_blocks[0])),
    (ARGUMENT, "k_blocks", lambda w: append_kv(w, k_blocks=w.k_blocks[:0])),
    (ARGUMENT, "k_blocks", lambda w: append_kv(w, k_blocks=read_only(w.k_blocks))),
    (ARGUMENT, "v_blocks", lambda w: append_kv(w, v_blocks=read_only(w.v_blocks))),
    (ARGUMENT, "k_blocks", lambda w: append_kv(w, k_blocks=zeros(4, 2, 16, 32)[..., ::2])),
    (ARGUMENT, "v_blocks", lambda w: append_kv(w, v_blocks=w.v_blocks[:3])),
    (ARGUMENT, "v_blocks", lambda w: append_kv(w, v_blocks=w.v_blocks[:, :1])),
    (ARGUMENT, "k_blocks", lambda w: append_kv(
        w, k_blocks=zeros(4, 2, 8, 16), v_blocks=zeros(4, 2, 8, 24))),
    (ARGUMENT, "k_blocks", lambda w: append_kv(
        w, k_blocks=zeros(4, 2, 24, 16), v_blocks=zeros(4, 2, 24, 24))),
    (ARGUMENT, "k_blocks", lambda w: append_kv(
        w, k_blocks=zeros(4, 2, 16, 12), k=zeros(T, 2, 12))),
    (ARGUMENT, "slots", lambda w: append_kv(w, slots=[0, 1, 2, 3, 64])),
    (ARGUMENT, "slots", lambda w: append_kv(w, slots=[0, 1, 2, 3, -2])),
    (ARGUMENT, "slots", lambda w: append_kv(w, slots=[0, 1, 2, 3, 2**32])),
    (ARGUMENT, "slots", lambda w: append_kv(w, slots=np.array([0, 1, 2, 3, 2**32 - 1], "u4"))),
    (ARGUMENT, "slots", lambda w: append_kv(w, slots=[])),
    (ARGUMENT, "slots", lambda w: append_kv(w, slots=[[*range(T)]])),
    (ARGUMENT, "slots", lambda w: append_kv(w, slots=[0.0] * T)),
    (ARGUMENT, "k", lambda w: append_kv(w, slots=[0, 1])),
    (ARGUMENT, "layout", lambda w: append_kv(w, layout="BSHD")),
    # ops.paged_attention
    (ARGUMENT, "q", lambda w: paged_attention(w, q=w.q[:4])),
    (ARGUMENT, "q", lambda w: paged_attention(w, q=w.q[:, :3])),
    (TYPE, "q", lambda w: paged_attention(w, q=w.q.astype("c8"))),
    (ARGUMENT, "k_blocks", lambda w: paged_attention(w, k_blocks=w.k_blocks[0])),
    (ARGUMENT, "v_blocks", lambda w: paged_attention(w, v_blocks=w.v_blocks[:, :, :8])),
    (ARGUMENT, "layout", lambda w: paged_attention(w, layout="DNH")),
    (ARGUMENT, "scale", lambda w: paged_attention(w, scale=-np.inf)),
    (ARGUMENT, "block_tables", lambda w: paged_attention(w, block_tables=[2, 0])),
    (ARGUMENT, "block_tables", lambda w: paged_attention(w, block_tables=[[2, 0]])),
    (ARGUMENT, "block_tables", lambda w: paged_attention(w, block_tables=[[2, 0], [1]])),
    (ARGUMENT, "block_tables", lambda w: paged_attention(w, block_tables=[[2, 4], [1, 1]])),
    (ARGUMENT, "block_tables", lambda w: paged_attention(w, block_tables=[[2, -1], [1, 1]])),
    (ARGUMENT, "block_tables", lambda w: paged_attention(w, block_tables=[[2, 2**32], [1, 1]])),
    (ARGUMENT, "block_tables", lambda w: paged_attention(w, block_tables=[[2.0, 0], [1, 1]])),
    (ARGUMENT, "seq_lens", lambda w: paged_attention(w, seq_lens=[33, 3])),
    (ARGUMENT, "seq_lens", lambda w: paged_attention(w, seq_lens=[3, 3])),
    (ARGUMENT, "seq_lens", lambda w: paged_attention(w, seq_lens=[20, -1])),
    (ARGUMENT, "seq_lens", lambda w: paged_attention(w, seq_lens=[])),
    (TYPE, "seq_lens", lambda w: paged_attention(w, seq_lens=20)),
    (ARGUMENT, "query_starts", lambda w: paged_attention(w, query_starts=[0, 5])),
    (ARGUMENT, "query_starts", lambda w: paged_attention(w, query_starts=[1, 4, 5])),
    (ARGUMENT, "query_starts", lambda w: paged_attention(w, query_starts=[0, 6, 5])),
    (ARGUMENT, "query_starts", lambda w: paged_attention(w, query_starts=[0, 0, 0])),
    (ARGUMENT, "k_blocks", lambda w: paged_attention(
        w, q=zeros(T, 4, 12), k_blocks=zeros(4, 2, 16, 12))),
    # The options of attend, through both doors
    *[
        (error, argument, lambda w, call=call, o=options: call(w, **o))
        for call in (attend, paged_attention_of_one)
        for error, argument, options in [
            (ARGUMENT, "softcap", {"softcap": 0}),
            (ARGUMENT, "softcap", {"softcap": -1.0}),
            (ARGUMENT, "softcap", {"softcap": np.nan}),
            (ARGUMENT, "softcap", {"softcap": np.inf}),
            (ARGUMENT, "softcap", {"softcap": 1e-60}),
            (TYPE, "softcap", {"softcap": "30"}),
            (TYPE, "softcap", {"softcap": True}),
            (ARGUMENT, "window", {"window": 0}),
            (ARGUMENT, "window", {"window": -1}),
            (ARGUMENT, "window", {"window": HUGE}),
            (TYPE, "window", {"window": 2.0}),
            (TYPE, "window", {"window": (4, 0)}),
            (TYPE, "causal", {"causal": None}),
            (TYPE, "causal", {"causal": 1}),
            (ARGUMENT, "alibi_slopes", {"alibi_slopes": zeros(3)}),
            (ARGUMENT, "alibi_slopes", {"alibi_slopes": zeros(1, 4)}),
            (ARGUMENT, "alibi_slopes", {"alibi_slopes": [0, 0, np.nan, 0]}),
            (ARGUMENT, "alibi_slopes", {"alibi_slopes": [0, 0, 1e300, 0]}),
            (TYPE, "alibi_slopes", {"alibi_slopes": 0.5}),
            (TYPE, "alibi_slopes", {"alibi_slopes": zeros(4, dtype="c8")}),
            (ARGUMENT, "sinks", {"sinks": zeros(2)}),
            (ARGUMENT, "sinks", {"sinks": [np.inf, 0, 0, 0]}),
            (ARGUMENT, "sinks", {"sinks": [[0], [0, 1]]}),
            (TYPE, "sinks", {"sinks": "none"}),
            (ARGUMENT, "positions", {"positions": [0, 1, 2]}),
            (ARGUMENT, "positions", {"positions": [0, 1, 2, 3, -1]}),
            (ARGUMENT, "positions", {"positions": [0, 1, 2, 3, HUGE]}),
            (ARGUMENT, "positions", {"positions": zeros(T)}),
            (TYPE, "positions", {"positions": 7}),
            (ARGUMENT, "mask", {"mask": []}),
            (ARGUMENT, "mask", {"mask": [None, None]}),
            (ARGUMENT, "mask[0]", {"mask": [np.ones((T, T + 1), bool)]}),
            (ARGUMENT, "mask[0]", {"mask": [np.ones(T * T, bool)]}),
            (ARGUMENT, "mask[0]", {"mask": [np.ones((T, T + 1), np.uint8)]}),
            (TYPE, "mask[0]", {"mask": [np.ones((T, T), np.int32)]}),
            (TYPE, "mask[0]", {"mask": [True]}),
            (TYPE, "mask", {"mask": True}),
        ]
    ],
    # ops.attention
    (ARGUMENT, "q", lambda w: ops.attention(w.q[:, :3], w.k, w.v)),
    (ARGUMENT, "q", lambda w: ops.attention(w.q[0], w.k, w.v)),
    (ARGUMENT, "q", lambda w: ops.attention(w.q[..., :8], w.k, w.v)),
    (TYPE, "q", lambda w: ops.attention(w.q.astype("f8"), w.k, w.v)),
    (ARGUMENT, "k", lambda w: ops.attention(w.q, w.k[0], w.v)),
    (ARGUMENT, "k", lambda w: ops.attention(w.q, w.k[:, :0], w.v[:, :0])),
    (ARGUMENT, "k", lambda w: ops.attention(w.q[..., :12], w.k[..., :12], w.v)),
    (ARGUMENT, "k", lambda w: ops.attention(w.q, w.k[:4], w.v[:4])),
    (TYPE, "k", lambda w: ops.attention(w.q, w.k.astype("i4"), w.v)),
    (TYPE, "k", lambda w: ops.attention(w.q, None, w.v)),
    (ARGUMENT, "v", lambda w: ops.attention(w.q, w.k, w.v[:4])),
    (ARGUMENT, "v", lambda w: ops.attention(w.q, w.k, w.v[..., :0])),
    (TYPE, "v", lambda w: ops.attention(w.q, w.k, w.v.astype("f8"))),
    (ARGUMENT, "layout", lambda w: ops.attention(w.q, w.k, w.v, layout="THD")),
    (ARGUMENT, "layout", lambda w: ops.attention(w.q, w.k, w.v, layout=None)),
    (ARGUMENT, "query_starts", lambda w: ops.attention(w.q, w.k, w.v, query_starts=[0, 4])),
    (ARGUMENT, "query_starts", lambda w: ops.attention(w.q, w.k, w.v, query_starts=[0, 6, 5])),
    (ARGUMENT, "query_starts", lambda w: ops.attention(w.q, w.k, w.v, query_starts=[1, 5])),
    (ARGUMENT, "query_starts", lambda w: ops.attention(w.q, w.k, w.v, query_starts=[5])),
    (ARGUMENT, "query_starts", lambda w: ops.attention(w.q, w.k, w.v, query_starts=[0, 5.0])),
    (ARGUMENT, "kv_starts", lambda w: ops.attention(w.q, w.k, w.v, kv_starts=[0, 6])),
    (ARGUMENT, "kv_starts", lambda w: ops.attention(w.q, w.k, w.v, kv_starts=[0, 2, 5])),
    (ARGUMENT, "query_lens", lambda w: ops.attention(w.q, w.k, w.v, query_lens=[5])),
    (ARGUMENT, "kv_lens", lambda w: ops.attention(w.q, w.k, w.v, kv_lens=[5])),
    (ARGUMENT, "query_starts", lambda w: padded_attention(w, query_starts=[0, 5])),
    (ARGUMENT, "kv_starts", lambda w: padded_attention(w, kv_starts=[0, 5])),
    (ARGUMENT, "query_lens", lambda w: padded_attention(w, query_lens=[6])),
    (ARGUMENT, "query_lens", lambda w: padded_attention(w, query_lens=[3, 2])),
    (ARGUMENT, "kv_lens", lambda w: padded_attention(w, kv_lens=[-1])),
    (ARGUMENT, "k", lambda w: padded_attention(w, kv_lens=[3])),
    (ARGUMENT, "k", lambda w: padded_attention(w, q=zeros(2, T, 4, 16))),
    (ARGUMENT, "q", lambda w: padded_attention(w, q=w.q)),
    (ARGUMENT, "softcap", lambda w: ops.attention(w.q, w.k, w.v, softcap=0)),
    (ARGUMENT, "mask[0]", lambda w: ops.attention(w.q, w.k, w.v, mask=[w.k[0] > 0])),
    (TYPE, "out", lambda w: ops.attention(w.q, w.k, w.v, out=w.q.tolist())),
    (ARGUMENT, "out", lambda w: ops.attention(w.q, w.k, w.v, out=zeros(T, 4, 16))),
    # ops.merge_states
    (ARGUMENT, "outs", lambda w: ops.merge_states(zeros(8), zeros())),
    (ARGUMENT, "outs", lambda w: ops.merge_states(zeros(0, 3, 8), zeros(0, 3))),
    (ARGUMENT, "outs", lambda w: ops.merge_states(zeros(2, 3, 12), zeros(2, 3))),
    (ARGUMENT, "outs", lambda w: ops.merge_states(zeros(2, 3, 0), zeros(2, 3))),
    (ARGUMENT, "lses", lambda w: ops.merge_states(zeros(2, 3, 8), zeros(3, 2))),
    (TYPE, "outs", lambda w: ops.merge_states(zeros(2, 3, 8).astype("f8"), zeros(2, 3))),
    (TYPE, "lses", lambda w: ops.merge_states(zeros(2, 3, 8), zeros(2, 3).astype("c8"))),
    (TYPE, "outs", lambda w: ops.merge_states([zeros(3, 8)] * 2, zeros(2, 3))),
    # ops.quantize, ops.dequantize
    (ARGUMENT, "format", lambda w: ops.quantize(w.k, "fp9")),
    (TYPE, "format", lambda w: ops.quantize(w.k, None)),
    (TYPE, "x", lambda w: ops.quantize(w.k.astype(np.float64), "fp16")),
    (TYPE, "x", lambda w: ops.quantize(w.k.astype(">f4"), "fp16")),
    (ARGUMENT, "x", lambda w: ops.quantize(zeros(3, 12), "fp16")),
    (ARGUMENT, "x", lambda w: ops.quantize(np.float32(1), "fp16")),
    (ARGUMENT, "format", lambda w: ops.dequantize(w.k, "fp9")),
    (TYPE, "code", lambda w: ops.dequantize(w.k, "fp16")),
    (TYPE, "code", lambda w: ops.dequantize(w.k.tolist(), "fp32")),
    (ARGUMENT, "code", lambda w: ops.dequantize(zeros(3, 12), "fp32")),
    # ops.linear
    (ARGUMENT, "x", lambda w: ops.linear(zeros(4), zeros(3, 4))),
    (ARGUMENT, "w", lambda w: ops.linear(zeros(2, 4), zeros(3, 5))),
    (ARGUMENT, "x", lambda w: ops.linear(zeros(2, 0), zeros(3, 0))),
    (TYPE, "x", lambda w: ops.linear(zeros(2, 4, dtype=np.float64), zeros(3, 4))),
    (TYPE, "w", lambda w: ops.linear(zeros(2, 4), zeros(3, 4, dtype=np.float16))),
    (TYPE, "w", lambda w: ops.linear(zeros(2, 4), [[1.0] * 4])),
    (ARGUMENT, "bias", lambda w: ops.linear(zeros(2, 4), zeros(3, 4), zeros(2))),
    (TYPE, "bias", lambda w: ops.linear(zeros(2, 4), zeros(3, 4), np.zeros(3, "c8"))),
    (ARGUMENT, "out", lambda w: ops.linear(zeros(2, 4), zeros(3, 4), out=zeros(2, 4))),
    (ARGUMENT, "out", lambda w: ops.linear(zeros(2, 4), zeros(3, 4), out=read_only(zeros(2, 3)))),
    (ARGUMENT, "out", lambda w: ops.linear(zeros(2, 4), zeros(3, 4), out=zeros(2, 6)[:, ::2])),
    (ARGUMENT, "out", lambda w: ops.linear(zeros(2, 4), zeros(3, 4), out=zeros(2, 3)[::-1])),
    (TYPE, "out", lambda w: ops.linear(
        zeros(2, 4), zeros(3, 4), out=zeros(2, 3, dtype=np.float64))),
    (TYPE, "out", lambda w: ops.linear(zeros(2, 4), zeros(3, 4), out=[[0.0] * 3] * 2)),
    # The machine
    (ARGUMENT, "count", lambda w: kvcore.set_num_threads(-1)),
    (ARGUMENT, "count", lambda w: kvcore.set_num_threads(257)),
    (TYPE, "count", lambda w: kvcore.set_num_threads(1.0)),
    (ARGUMENT, "name", lambda w: kvcore.set_isa("mmx")),
    (ARGUMENT, "name", lambda w: kvcore.set_isa(None)),
    (ARGUMENT, "backend", lambda w: kvcore.get_backend("tpu")),
    (ARGUMENT, "backend", lambda w: kvcore.get_backend([])),
]  # fmt: skip


def inputs(w):
    return [x.tobytes() for x in (w.k, w.v, w.q, w.k_blocks, w.v_blocks)]


@pytest.mark.parametrize(
    ("error", "argument", "call"), BAD, ids=[f"{i}-{a}" for i, (_, a, _) in enumerate(BAD)]
)
def test_bad_input(world, error, argument, call):
    idle = [world.a, world.b]
    before = snapshot(world.cache, idle), inputs(world), kvcore.get_isa(), kvcore.get_num_threads()
    with pytest.raises(error) as caught:
        call(world)
    assert type(caught.value) is error or error is kvcore.StepError
    assert isinstance(caught.value, kvcore.KVCoreError)
    if argument:
        assert re.match(re.escape(argument) + "( |:)", str(caught.value)), str(caught.value)
    assert len(str(caught.value)) > 20
    after = snapshot(world.cache, idle), inputs(world), kvcore.get_isa(), kvcore.get_num_threads()
    assert after == before
    # The open step goes on as if nothing had been asked.
    assert world.step.is_open
    world.step.append(1, world.k, world.v)
    world.step.attend(0, world.q)
    world.step.commit()
    assert len(world.busy) == T
    np.testing.assert_array_equal(world.busy.read(0)[0], world.k)


def test_the_tree():
    """One root; the built-in kinds that a caller would expect are kept."""
    tree = [x for x in vars(errors).values() if isinstance(x, type) and x is not type]
    assert all(issubclass(x, kvcore.KVCoreError) for x in tree)
    assert all(x.__doc__ for x in tree)
    assert issubclass(kvcore.InvalidArgument, ValueError)
    assert issubclass(kvcore.InvalidType, TypeError)
    assert issubclass(kvcore.MissingExtra, ImportError)
    for child in (kvcore.SequenceFreed, kvcore.SequenceBusy, kvcore.ForeignSequence):
        assert issubclass(child, kvcore.SequenceError)
    for child in (kvcore.StepClosed, kvcore.StepIncomplete):
        assert issubclass(child, kvcore.StepError)


def test_every_status_of_the_core_has_an_exception():
    from kvcore._native.blocks import status_table

    names = set(status_table()) - {"OK"}
    assert names == set(errors.STATUS_EXCEPTIONS)


def test_out_of_blocks_tells_its_numbers():
    error = kvcore.OutOfBlocks(1, 7, 3)
    assert (error.group, error.needed, error.available) == (1, 7, 3)
    for number in ("group 1", "7 blocks", "3 available"):
        assert number in str(error)


def test_nothing_is_left_after_a_hundred_failures(world):
    """Failed calls take no blocks, sequences, steps or places."""
    rng = np.random.default_rng(0)
    world.step.rollback()
    for _ in range(100):
        with pytest.raises(kvcore.OutOfBlocks):
            world.cache.step([(world.a, 1), (world.b, 1000)])
        with pytest.raises(kvcore.InvalidArgument):
            world.a.fork(100)
        with pytest.raises(kvcore.StepIncomplete), world.cache.step([(world.a, 30)]):
            pass
    stats = world.cache.stats()
    assert (stats.num_sequences, stats.open_steps, stats.in_use) == (3, 0, 3)
    with world.cache.step([(world.a, 12 * 16 - 16 - 20)]) as step:
        append_all(step, rng)
    assert world.cache.stats().free == 0
