"""kernels/prefill.cu against float64: every option and format, ragged, and what promises hold."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest

import attention_oracle as oracle
import kvcore
from cuda_emulator.runtime import EmulatedRuntime
from kvcore import backend
from kvcore.formats import get_format
from kvcore_gpu import attention, prefill
from kvcore_gpu.backend import CudaBackend
from quantized_reference import Side
from support import DTYPES, assert_same_bits, poison, random_kv, random_q

#: docs/numerics_gpu.md, "Tolerances": of the mean length of the values, and of lse.
TOLERANCE = {"fp16": 3e-4}
OTHER_TOLERANCE = 2e-3

CONTEXTS, NEWS = (70, 0, 3, 130), (40, 70, 1, 9)  # over tiles' and blocks' ends, some short
LENGTHS = [c + n for c, n in zip(CONTEXTS, NEWS, strict=True)]


def row_of(reference, t):
    return oracle.Reference(**{name: x[t : t + 1] for name, x in vars(reference).items()})


class Case:
    """A cache with sequences of random contents, poisoned elsewhere, and a step's queries."""

    def __init__(
        self, k_format, v_format, head_dim, head_dim_v=None, *, heads=2, group=2, block_size=32,
        q_dtype="float32", contexts=CONTEXTS, news=NEWS, seed=0, **spec,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.spec = kvcore.CacheSpec(
            1, heads, head_dim, head_dim_v, block_size=block_size, k_format=k_format,
            v_format=v_format, **spec,
        )  # fmt: skip
        layer = self.spec.layers[0]
        self.contexts, self.news = contexts, news
        self.lengths = [c + n for c, n in zip(contexts, news, strict=True)]
        self.texts = [random_kv(rng, n, layer) for n in self.lengths]
        self.q = random_q(rng, sum(news), heads * group, head_dim, q_dtype)
        self.starts = np.concatenate([[0], np.cumsum(news)])
        if layer.v_in_k:
            self.texts = [(k, k[..., : layer.v_in_k]) for k, _ in self.texts]

    def __str__(self):
        layer = self.spec.layers[0]
        return f"{layer.k_format}-{layer.v_format}-{layer.head_dim}-{layer.head_dim_v}"

    def rows(self, s):
        return slice(self.starts[s], self.starts[s + 1])

    def attend(self, runtime, chosen=None, few_rows=0, **options):
        """out and lse of the chosen sequences' new tokens, of prefill.cu those with more rows."""
        chosen = range(len(self.news)) if chosen is None else chosen
        made = {"cuda": CudaBackend(runtime)}
        with (
            mock.patch.dict(backend._loaded, made),
            mock.patch.object(attention.Attention, "few_rows", few_rows),
        ):
            raw_blocks = 400 if self.spec.raw_groups else None
            cache = kvcore.KVCache(self.spec, 40, num_raw_blocks=raw_blocks, backend="cuda")
            return self._attend(cache, chosen, options)

    def _attend(self, cache, chosen, options):
        if not self.is_quantized:
            poison(cache)
        sequences = [cache.sequence() for _ in chosen]
        stored = [(q, s) for q, s in zip(sequences, chosen, strict=True) if self.contexts[s]]
        if stored:
            with cache.step([(q, self.contexts[s]) for q, s in stored]) as step:
                self._append(step, [(s, 0, self.contexts[s]) for _, s in stored])
        entries = [(q, self.news[s]) for q, s in zip(sequences, chosen, strict=True)]
        with cache.step(entries) as step:
            self._append(step, [(s, self.contexts[s], self.lengths[s]) for s in chosen])
            q = np.concatenate([self.q[self.rows(s)] for s in chosen])
            first = step.attend(0, q, return_lse=True, **options)
            again = step.attend(0, q, return_lse=True, **options)
        for a, b in zip(first, again, strict=True):
            assert_same_bits(a, b, "the same call again")
        return first

    @property
    def is_quantized(self):
        return any(f.is_quantized for f in self.spec.layers[0].formats)

    def _append(self, step, parts):
        k, v = (np.concatenate([self.texts[s][i][a:b] for s, a, b in parts]) for i in (0, 1))
        step.append(0, k, None if self.spec.layers[0].v_in_k else v)

    def own(self, options, s):
        """The options as the oracle takes them for one sequence."""
        own = dict(options)
        if own.get("mask") is not None:
            own["mask"] = own["mask"][s]
        if own.get("positions") is not None:
            own["positions"] = np.asarray(own["positions"])[self.rows(s)]
        return own

    def held(self, s):
        """What K and V of a sequence are read as, float formats: [m, H, D] and [m, H, Dv]."""
        return [
            x.astype(DTYPES[{"fp16": "float16", "bf16": "bfloat16"}[f.name]]).astype(np.float32)
            for x, f in zip(self.texts[s], self.spec.layers[0].formats, strict=True)
        ]

    def sides(self, s):
        given = [{} for _ in range(2)]
        for channels, scales in zip(given, self.spec.layer_scales(0), strict=True):
            if scales is not None:
                channels["scales"] = scales
        if self.spec.layer_bias(0) is not None:
            given[0]["bias"] = self.spec.layer_bias(0)
        sides, keeps_raw = [], bool(self.spec.raw_groups)
        for rows, f, channels in zip(
            self.texts[s], self.spec.layers[0].formats, given, strict=True
        ):
            side = Side(f.name, self.spec.raw_first, self.spec.raw_last, keeps_raw, **channels)
            for part in np.split(rows, [self.contexts[s]]):
                if len(part):
                    side.append(part)
            sides.append(side)
        return sides

    def check(self, out, lse, **options):
        if self.is_quantized:
            self._check_quantized(out, lse, options)
            return
        for s in range(len(self.news)):
            reference = oracle.attention(
                self.q[self.rows(s)], *self.held(s), **self.own(options, s)
            )
            self._assert_close(out[self.rows(s)], lse[self.rows(s)], reference)

    def _check_quantized(self, out, lse, options):
        """Some rows of each sequence: each reads other rows raw."""
        for s, n in enumerate(self.news):
            sides, own = self.sides(s), self.own(options, s)
            for t in sorted({0, 1, 30, 31, 32, n // 2, n - 1} & set(range(n))):
                k, v = (side.seen(self.lengths[s] - n + t, self.lengths[s]) for side in sides)
                reference = oracle.attention(self.q[self.rows(s)], k, v, **own)
                at = slice(self.starts[s] + t, self.starts[s] + t + 1)
                self._assert_close(out[at], lse[at], row_of(reference, t))

    def _assert_close(self, out, lse, reference):
        names = [f.name for f in self.spec.layers[0].formats]
        tolerance = max(TOLERANCE.get(name, OTHER_TOLERANCE) for name in names)
        growth = np.maximum(1, reference.max_terms / 8)
        error = np.linalg.norm(out.astype(np.float64) - reference.out, axis=-1)
        length = np.linalg.norm(reference.out, axis=-1)
        allowed = tolerance * growth * reference.mean_length
        allowed += (oracle.RELATIVE * growth + oracle.OUT_ROUNDING[out.dtype.name]) * length
        oracle.assert_within(error, allowed + 1e-30, "out")
        nothing = np.isneginf(reference.lse)
        assert np.array_equal(np.isneginf(lse), nothing)
        error = np.abs(np.where(nothing, 0, lse) - np.where(nothing, 0, reference.lse))
        oracle.assert_within(error, (tolerance + oracle.RELATIVE) * growth, "lse")


def run(runtime, case, **options):
    out, lse = case.attend(runtime, **options)
    case.check(out, lse, **options)
    return out, lse


# ---- formats and shapes


@pytest.mark.parametrize(
    "case",
    [
        Case("bf16", "bf16", 64, q_dtype="bfloat16"),
        Case("fp16", "fp16", 128, q_dtype="float16", block_size=16),
        Case("bf16", "bf16", 256, q_dtype="bfloat16", heads=1),
        Case("fp16", "bf16", 40, 72, group=3),
        Case("bf16", "fp16", 96, 8, group=1, heads=3, block_size=256),
        Case("bf16", "bf16", 80, v_in_k=24, q_dtype="bfloat16", group=8, heads=1),
    ],
    ids=str,
)
def test_float_caches(runtime, case):
    run(runtime, case)


def int8_scales(head_dim):
    return np.random.default_rng(1).uniform(0.01, 0.05, (1, 2, head_dim)).astype(np.float32)


@pytest.mark.parametrize(
    "case",
    [
        Case("rot8", "rot6", 128, q_dtype="bfloat16"),
        Case("int4", "rot4", 96, block_size=16),
        Case("fp8_e4m3", "rot3", 64, 192, group=4),
        Case("rot4", "int8", 160, q_dtype="bfloat16", raw_first=0, raw_last=64),
        Case("rot6", "rot2", 64, q_dtype="float16", raw_first=0, raw_last=0),
        Case("rot3", "fp8_e4m3", 256, heads=1, group=1),
        Case("chan4", "rot4", 128, q_dtype="bfloat16"),
        Case("chan2", "bf16", 64, raw_first=32, raw_last=0),
        Case(
            "int8_static", "int8_static", 64,
            key_scales=int8_scales(64), value_scales=int8_scales(64),
        ),
        Case(
            "rot8", "rot4", 64, q_dtype="bfloat16",
            key_bias=np.random.default_rng(2).standard_normal((1, 2, 64)),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_quantized_caches(runtime, case):
    run(runtime, case)


def test_long_prompts_in_several_tiles_of_rows(runtime):
    """More rows than a block has, beside others, as a grid of few blocks finds them."""
    run(runtime, Case("bf16", "bf16", 64, q_dtype="bfloat16", contexts=(5, 0), news=(200, 90)))


def test_keys_of_any_magnitude(runtime):
    for magnitude in (1e-30, 30.0, 1e8):
        case = Case("int4", "int8", 32, 64, q_dtype="bfloat16", heads=1)
        case.texts = [(k * np.float32(magnitude), v) for k, v in case.texts]
        run(runtime, case)


# ---- options


def options_of(case):
    rng = np.random.default_rng(5)
    shapes = zip(case.news, case.lengths, (0.5, 0.02, 1.0, 0.9), strict=True)
    masks = [rng.random((n, m)) < density for n, m, density in shapes]
    starts = np.concatenate(
        [np.arange(c, m) for c, m in zip(case.contexts, case.lengths, strict=True)]
    )
    heads = case.q.shape[1]
    return {
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": 2.0 ** -np.arange(1, heads + 1)},
        "window": {"window": 20},
        "non-causal": {"causal": False},
        "mask": {"mask": [masks[0], masks[1], None, masks[3]]},
        "positions": {"positions": starts + rng.integers(0, 5, len(starts))},
        "sinks": {"sinks": rng.standard_normal(heads).astype(np.float32) * 3},
    }


NAMES = list(options_of(Case("bf16", "bf16", 64)))


@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("rot8", "rot4")], ids="-".join)
def test_options_alone_and_together(runtime, pair):
    case = Case(*pair, 64, q_dtype="bfloat16")
    given = options_of(case)
    pairs = [*itertools.combinations(NAMES, 2)]
    for names in [*itertools.combinations(NAMES, 1), *pairs[pair[0] == "bf16" :: 3], NAMES]:
        run(runtime, case, **{key: x for name in names for key, x in given[name].items()})


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
def test_scale(runtime, scale):
    run(runtime, Case("bf16", "bf16", 64, q_dtype="bfloat16"), scale=scale)


def test_rows_that_see_nothing(runtime):
    case = Case("bf16", "bf16", 64, q_dtype="bfloat16")
    masks = [np.zeros((n, m), bool) for n, m in zip(case.news, case.lengths, strict=True)]
    masks[0][3, 17] = True
    out, lse = case.attend(runtime, mask=masks)
    assert_same_bits(out[3, 0], case.held(0)[1][17, 0].astype(out.dtype))
    assert not np.delete(out, 3, axis=0).astype(np.float32).any()
    assert np.isneginf(np.delete(lse, 3, axis=0)).all()
    sinks = np.linspace(-3, 3, 4, dtype=np.float32)
    out, lse = case.attend(runtime, mask=masks, sinks=sinks)
    np.testing.assert_allclose(np.delete(lse, 3, axis=0), np.tile(sinks, (len(lse) - 1, 1)), 1e-6)


# ---- what is not seen


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("names", [(), ("mask",), ("window", "mask")], ids="+".join)
def test_what_is_not_seen_takes_no_part(runtime, names, bad):
    """Not a number in K and V where a row does not look: its bits stay. Where it looks: it is not
    finite either."""
    case = Case("bf16", "bf16", 64, q_dtype="bfloat16", contexts=(90,), news=(50,))
    given = options_of(Case("bf16", "bf16", 64, contexts=(90, 0, 0, 1), news=(50, 1, 1, 1)))
    options = {key: x for name in names for key, x in given[name].items()}
    if "mask" in options:
        options["mask"] = options["mask"][:1]
    sight = {key: options[key] for key in ("window",) if key in options}
    sight |= {"mask": options["mask"][0]} if "mask" in options else {}
    seen = oracle.visible_tokens(50, 140, **sight)
    clean = case.attend(runtime, **options)
    texts = case.texts
    for which in (0, 1):
        for key in (3, 99, 139):
            changed = [x.copy() for x in texts[0]]
            changed[which][key] = bad
            case.texts = [changed]
            out, lse = case.attend(runtime, **options)
            for a, b in zip((out, lse), clean, strict=True):
                assert_same_bits(a[~seen[:, key]], b[~seen[:, key]], f"key {key}")
            if which == 1 or np.isnan(bad):
                assert not np.isfinite(out[seen[:, key]].astype(np.float32)).any()
            if which == 1:
                assert_same_bits(lse, clean[1])


def test_a_query_that_is_nan_spoils_its_own_row(runtime):
    for k_format, v_format in (("bf16", "bf16"), ("rot8", "rot4")):
        case = Case(k_format, v_format, 64, q_dtype="bfloat16")
        clean = case.attend(runtime)[0]
        case.q = case.q.copy()
        case.q[17, 2, 5] = np.nan
        out = case.attend(runtime)[0]
        assert np.isnan(out[17, 2].astype(np.float32)).all()
        out[17, 2] = clean[17, 2]
        assert_same_bits(out, clean)


# ---- promises on bits


@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("rot8", "rot4")], ids="-".join)
def test_alone_or_in_a_batch(runtime, pair):
    case = Case(*pair, 64, q_dtype="bfloat16")
    out, lse = case.attend(runtime)
    for s in range(len(case.news)):
        alone = case.attend(runtime, [s])
        assert_same_bits(alone[0], out[case.rows(s)])
        assert_same_bits(alone[1], lse[case.rows(s)])


def test_block_size(runtime):
    results = [
        Case("bf16", "bf16", 64, q_dtype="bfloat16", block_size=size).attend(runtime)
        for size in (16, 128)
    ]
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_chunks_within_the_tolerance(runtime):
    """A prompt whole, and its end alone over what came before."""
    whole = Case("rot8", "rot4", 64, q_dtype="bfloat16", contexts=(0,), news=(110,))
    part = Case("rot8", "rot4", 64, q_dtype="bfloat16", contexts=(40,), news=(70,))
    part.texts, part.q = whole.texts, whole.q[40:]
    run(runtime, part)
    run(runtime, whole)


def test_sequences_of_few_rows_are_another_kernels(runtime):
    case = Case("bf16", "bf16", 64, q_dtype="bfloat16")
    every = case.attend(runtime)
    few_rows = attention.FEW_TILES * 16
    with mock.patch.object(EmulatedRuntime, "launch", autospec=True) as launch:
        launch.side_effect = EMULATED_LAUNCH
        out, lse = case.attend(runtime, few_rows=few_rows)
    names = {call.args[1].name for call in launch.call_args_list}
    assert names == {"append", "prefill", "decode"}
    case.check(out, lse)
    many = [s for s, n in enumerate(case.news) if 2 * n > few_rows]
    assert 0 < len(many) < len(case.news)
    for s in many:
        assert_same_bits(out[case.rows(s)], every[0][case.rows(s)])


EMULATED_LAUNCH = EmulatedRuntime.launch


# ---- keys in parts


def long_case(*pair, contexts=(3100, 30, 2100), news=(70, 40, 9), **given):
    """Few rows over many keys: three parts and two, and one that is not cut between them."""
    return Case(
        *pair, 32, heads=1, block_size=256, contexts=contexts, news=news,
        **({"q_dtype": "bfloat16"} | given),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "given"),
    [
        (("bf16", "bf16"), {}),
        (("fp16", "fp16"), {"q_dtype": "float32", "group": 5}),  # tiles of 64 rows
        (("rot8", "rot4"), {"raw_first": 20}),
        (("bf16", "int8"), {"contexts": (2100,), "news": (200,)}),
    ],
    ids=["bf16", "fp16", "rot8-rot4", "bf16-int8"],
)
def test_parts_of_keys(runtime, pair, given):
    case = long_case(*pair, **given)
    with mock.patch.object(EmulatedRuntime, "zeros", nan_for_floats):
        run(runtime, case)


def nan_for_floats(self, shape, dtype):
    """Scratch comes with what was there before; only counters are to be zeros."""
    made = self.empty(shape, dtype)
    made[...] = np.nan if np.dtype(dtype) == np.float32 else 0
    return made


@pytest.mark.parametrize("name", ["window", "mask", "sinks"])
def test_parts_with_options(runtime, name):
    """A window leaves the first parts without keys, a mask some rows of a part, or all."""
    case = long_case("bf16", "bf16", contexts=(2980, 2100), news=(70, 9))
    rng = np.random.default_rng(6)
    masks = [rng.random((n, m)) < 0.5 for n, m in zip(case.news, case.lengths, strict=True)]
    masks[0][:20, :1600] = False
    masks[1][:] = False
    options = {
        "window": {"window": 700},
        "mask": {"mask": masks, "sinks": np.zeros(2, np.float32)},
        "sinks": {"sinks": np.array([4.0, -4.0], np.float32)},
    }[name]
    run(runtime, case, **options)


@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("rot8", "rot4")], ids="-".join)
def test_parts_do_not_depend_on_the_batch(runtime, pair):
    """Nor on how many launches it takes to have room for them."""
    case = long_case(*pair)
    out, lse = case.attend(runtime)
    with mock.patch.object(attention, "MAX_PARTIAL_BYTES", 1):
        again = case.attend(runtime)
    for a, b in zip(again, (out, lse), strict=True):
        assert_same_bits(a, b, "in several launches")
    for s in range(len(case.news)):
        alone = case.attend(runtime, [s])
        assert_same_bits(alone[0], out[case.rows(s)])
        assert_same_bits(alone[1], lse[case.rows(s)])


def test_how_many_sequences_are_cut():
    """What a launch makes room for: all that there can be, but no prompts of many rows."""
    kernel = prefill.Prefill(*[get_format("bf16")] * 2, 128, 128, 1, False)
    assert kernel.max_cut(512, 8, 1, 32768) == 1
    assert kernel.max_cut(2048, 8, 1, 32768) == 1
    assert kernel.max_cut(2049, 8, 1, 32768) == 0  # 17 tiles of 8 heads: two parts are too many
    assert kernel.max_cut(0, 8, 3, 32768) == 3
    assert kernel.max_cut(0, 8, 3, 2047) == 0
    assert prefill.max_sequences(256, 767, 512, 16) == 1  # one chunk beside decode steps
    assert prefill.max_sequences(256, 767, 500, 16) == 1
    assert prefill.max_sequences(256, 767, 496, 16) == 2
    assert prefill.max_sequences(4, 4 * 128, 128, 16) == 4
    assert prefill.max_sequences(3, 40, 16, 16) == 0


# ---- the emulator's checks


@pytest.mark.parametrize("name", ["plain", "options", "quantized", "all raw", "parts"])
def test_without_races(checked, name):
    if name == "plain":
        run(checked, Case("bf16", "bf16", 64, q_dtype="bfloat16"))
    elif name == "all raw":  # a first pass without a tile, whose queries are copied all the same
        run(checked, Case("bf16", "rot4", 64, q_dtype="bfloat16", contexts=(0,), news=(30,)))
    elif name == "options":
        case = Case("bf16", "bf16", 40, q_dtype="float32", contexts=(70, 0, 3, 30))
        given = options_of(case)
        run(checked, case, **{key: x for name in NAMES for key, x in given[name].items()})
    elif name == "parts":
        run(checked, long_case("rot8", "rot4", contexts=(2030,), news=(40,)))
    else:
        run(checked, Case("chan4", "int4", 32, heads=1, contexts=(90,), news=(40,)))
