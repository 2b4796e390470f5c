"""decode.cu and simt.cu against float64, and to the bit where bits are due."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import attention_oracle as oracle
import kvcore
from attention_oracle import attention, visible_tokens
from cuda_emulator.runtime import EmulatedRuntime
from kvcore_gpu import attention as dispatch
from kvcore_gpu.backend import CudaBackend
from quantized_reference import Side
from support import FORMAT_DTYPES, assert_same_bits, poison, random_kv, random_q

# Tolerances of docs/numerics_gpu.md.
TOLERANCES = {"fp32": 2e-6, "fp16": 3e-4}
OTHERS = 2e-3


class Call:
    """One step over sequences of random contents, some of which they hold before it."""

    def __init__(self, contexts, news, *, heads, seed=0, q_dtype="float32", **spec):
        rng = np.random.default_rng(seed)
        self.contexts, self.news, self.heads = contexts, news, heads
        shape = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, **spec}
        self.spec = kvcore.CacheSpec(**shape)
        self.layer = self.spec.layers[0]
        self.lengths = [c + n for c, n in zip(contexts, news, strict=True)]
        self.texts = [random_kv(rng, n, self.layer) for n in self.lengths]
        self.q = random_q(rng, sum(news), heads, self.layer.head_dim, q_dtype)
        self.starts = [0, *itertools.accumulate(news)]

    @property
    def formats(self):
        return self.layer.k_format, self.layer.v_format

    def run(self, texts=None, q=None, news=None, contexts=None, **options):
        """(out, lse) by the kernels; every slot that no sequence owns holds NaN."""
        texts, news = texts or self.texts, news or self.news
        contexts = self.contexts if contexts is None else contexts
        cache = kvcore.KVCache(self.spec, 90, backend="cuda")
        if set(self.formats) <= set(FORMAT_DTYPES):
            poison(cache)
        v_of = (lambda v: None) if self.layer.v_in_k else (lambda v: v)
        sequences = [cache.sequence() for _ in texts]
        for sequence, (k, v), context in zip(sequences, texts, contexts, strict=True):
            if context:
                with cache.step([(sequence, context)]) as step:
                    step.append(0, k[:context], v_of(v[:context]))
        with cache.step(list(zip(sequences, news, strict=True))) as step:
            new = [
                [x[c : c + n] for x in kv] for kv, c, n in zip(texts, contexts, news, strict=True)
            ]
            k, v = (np.concatenate(rows) for rows in zip(*new, strict=True))
            step.append(0, k, v_of(v))
            q = self.q if q is None else q
            first = step.attend(0, q, return_lse=True, **options)
            again = step.attend(0, q, return_lse=True, **options)
        for a, b in zip(first, again, strict=True):
            assert_same_bits(a, b, "the same call again")
        return first

    def of_sequence(self, options, s):
        """The options as the oracle takes them."""
        own = dict(options)
        if own.get("mask") is not None:
            own["mask"] = own["mask"][s]
        if own.get("positions") is not None:
            own["positions"] = np.asarray(own["positions"])[self.starts[s] : self.starts[s + 1]]
        return own

    def reference(self, s, options):
        """Of sequence s. In quantized caches each new token reads keys in its own way: they come
        one by one, and what options say is for the only one, if any."""
        k, v = self.texts[s]
        own, rows = self.of_sequence(options, s), slice(self.starts[s], self.starts[s + 1])
        if not self.spec.raw_groups:
            k = k.astype(FORMAT_DTYPES[self.layer.k_format])
            v = k[..., : self.layer.v_in_k] if self.layer.v_in_k else v
            return [attention(self.q[rows], k, v.astype(FORMAT_DTYPES[self.layer.v_format]), **own)]
        sides = [Side(f, self.spec.raw_first, self.spec.raw_last, True) for f in self.formats]
        for side, x in zip(sides, (k, v), strict=True):
            for part in (x[: self.contexts[s]], x[self.contexts[s] :]):
                if len(part):
                    side.append(part)
        found = []
        for i in range(self.news[s]):
            position = self.contexts[s] + i
            seen = [side.seen(position, self.lengths[s])[: position + 1] for side in sides]
            found.append(attention(self.q[rows][i : i + 1], *seen, **own))
        return found

    def check(self, **options):
        """Runs it and compares with float64; returns what came."""
        out, lse = self.run(**options)
        share = max(TOLERANCES.get(name, OTHERS) for name in self.formats)
        for s in range(len(self.texts)):
            found = self.reference(s, options)
            exact, at, terms, mean = (
                np.concatenate([getattr(one, name) for one in found])
                for name in ("out", "lse", "max_terms", "mean_length")
            )
            rows = slice(self.starts[s], self.starts[s + 1])
            growth = np.maximum(1, terms / 8)
            error = np.linalg.norm(out[rows].astype(np.float64) - exact, axis=-1)
            allowed = share * growth * mean
            allowed += oracle.OUT_ROUNDING[out.dtype.name] * np.linalg.norm(exact, axis=-1)
            oracle.assert_within(error, allowed, "out")
            nothing = np.isneginf(at)
            assert np.array_equal(np.isneginf(lse[rows]), nothing)
            error = np.abs(np.where(nothing, 0, lse[rows]) - np.where(nothing, 0, at))
            oracle.assert_within(error, share * growth + 2.0**-22 * np.abs(lse[rows]), "lse")
        return out, lse


@pytest.fixture
def cuda(monkeypatch):
    """Makes backend="cuda" the emulator, in check mode or another order if asked."""
    from kvcore import backend

    def use(**options):
        made = CudaBackend(EmulatedRuntime(**options))
        monkeypatch.setitem(backend._loaded, "cuda", made)
        return made

    return use


pytestmark = pytest.mark.usefixtures("cuda_emulated")

PAIRS = [("bf16", "bf16"), ("fp32", "fp32"), ("chan4", "rot4")]
#: A sequence longer than all rings together, one that begins, one of several new tokens.
RAGGED = {"contexts": (1100, 0, 45), "news": (1, 1, 4)}


class TestFormats:
    """Some; the contract's cases have all of them."""

    @pytest.mark.parametrize(
        "formats",
        [("bf16", "bf16"), ("fp16", "rot2"), ("rot8", "rot8"), ("rot6", "rot3"), ("chan2", "int4")],
        ids="+".join,
    )
    def test_matrices(self, formats):
        k_format, v_format = formats
        Call(**RAGGED, heads=6, k_format=k_format, v_format=v_format, block_size=32).check()

    @pytest.mark.parametrize(
        "format, q_dtype", [("bf16", "bfloat16"), ("fp16", "bfloat16"), ("rot8", "bfloat16")]
    )
    def test_dtypes_of_q(self, format, q_dtype):
        Call((300,), (2,), heads=6, q_dtype=q_dtype, k_format=format, v_format=format).check()

    @pytest.mark.parametrize(
        "formats", [("fp32", "fp32"), ("fp32", "rot4"), ("chan2", "fp32")], ids="+".join
    )
    def test_float32(self, formats):
        k_format, v_format = formats
        Call(**RAGGED, heads=6, k_format=k_format, v_format=v_format, block_size=32).check()

    @pytest.mark.parametrize("format", ["fp16", "bf16"])
    def test_a_query_head_for_each_kv_head(self, format):
        call = Call(**RAGGED, heads=2, k_format=format, v_format=format)
        call.check()

    @pytest.mark.parametrize("formats", [("bf16", "bf16"), ("rot8", "rot4")], ids="+".join)
    @pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-42, 3.0])
    def test_scales(self, formats, scale):
        """Some keys are masked: nothing times -inf may be a NaN."""
        k_format, v_format = formats
        Call((70,), (3,), heads=2, k_format=k_format, v_format=v_format,
             **({} if "bf16" in formats else {"raw_last": 0})).check(scale=scale)  # fmt: skip

    def test_a_bias_and_scales_of_channels(self):
        rng = np.random.default_rng(3)
        scales = rng.uniform(0.02, 0.05, (1, 2, 64))
        call = Call(
            (200,), (1,), heads=8, k_format="int8_static", v_format="int8_static",
            key_bias=rng.standard_normal((1, 2, 64)), key_scales=scales, value_scales=scales,
        )  # fmt: skip
        out, lse = call.run()
        cpu = kvcore.KVCache(call.spec, 60)
        a, (k, v) = cpu.sequence(), call.texts[0]
        with cpu.step([(a, 200)]) as step:
            step.append(0, k[:200], v[:200])
        with cpu.step([(a, 1)]) as step:
            step.append(0, k[200:], v[200:])
            expected = step.attend(0, call.q, return_lse=True, exact=True)
        assert np.abs(out - expected[0]).max() < 4e-3
        assert np.abs(lse - expected[1]).max() < 4e-3


class TestShapes:
    @pytest.mark.parametrize(
        "dims, formats",
        [
            ((8, 8), ("fp16", "fp16")),
            ((40, 72), ("fp16", "bf16")),
            ((264, 8), ("bf16", "bf16")),
            ((128, 320), ("bf16", "int4")),
            ((192, 192), ("rot3", "rot3")),
            ((512, 512), ("fp32", "fp32")),
        ],
        ids=str,
    )
    def test_head_dims(self, dims, formats):
        k_format, v_format = formats
        call = Call(
            (80, 0), (1, 3), heads=3, num_kv_heads=1, head_dim=dims[0], head_dim_v=dims[1],
            k_format=k_format, v_format=v_format,
        )  # fmt: skip
        call.check()

    def test_latent_attention(self):
        """V in K, 20 query heads on one KV head, V in two slices."""
        call = Call(
            (150,), (2,), heads=20, num_kv_heads=1, head_dim=576, v_in_k=512,
            k_format="bf16", v_format="bf16", q_dtype="bfloat16",
        )  # fmt: skip
        call.check()

    def test_more_splits_than_lanes(self):
        """33 splits: their states come from two rounds of a warp."""
        Call((16_500,), (1,), heads=2, num_kv_heads=1, head_dim=16, block_size=1024,
             k_format="bf16", v_format="bf16").check()  # fmt: skip


def every_option(call):
    rng = np.random.default_rng(9)
    masks = [rng.random(shape) < 0.5 for shape in zip(call.news, call.lengths, strict=True)]
    masks[1] = np.zeros_like(masks[1])
    places = [c for c, n in zip(call.contexts, call.news, strict=True) for _ in range(n)]
    return {
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": 2.0 ** -np.arange(1, call.heads + 1)},
        "window": {"window": 100},
        "non-causal": {"causal": False},
        "mask": {"mask": [masks[0], masks[1], None]},
        "positions": {"positions": np.array(places) + rng.integers(0, 5, len(places))},
        "sinks": {"sinks": rng.standard_normal(call.heads).astype(np.float32) * 3},
    }


NAMES = ("softcap", "alibi", "window", "non-causal", "mask", "positions", "sinks")
TOGETHER = [*((name,) for name in NAMES), ("window", "positions"), ("mask", "window"), NAMES]


@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
@pytest.mark.parametrize("formats", PAIRS, ids="+".join)
def test_options(formats, names):
    k_format, v_format = formats
    news = (1, 1, 1) if k_format == "chan4" else (4, 2, 1)
    call = Call((600, 0, 250), news, heads=6, block_size=32, k_format=k_format, v_format=v_format)
    options = every_option(call)
    call.check(**{key: value for name in names for key, value in options[name].items()})


@pytest.mark.parametrize("formats", PAIRS, ids="+".join)
def test_masks_of_long_runs(formats):
    """Tiles that all rows see as a whole, or none; and trees, whose tokens see their ancestors."""
    k_format, v_format = formats
    news = (1, 1, 1) if k_format == "chan4" else (7, 2, 5)
    call = Call((600, 3, 250), news, heads=4, block_size=32, k_format=k_format, v_format=v_format)
    masks = [np.tri(n, m, m - n, bool) for n, m in zip(news, call.lengths, strict=True)]
    masks[0][:, 37:203] = False
    masks[0][0, 300:411] = False
    masks[0][1::2, 601::2] = False
    masks[2][:, :131] = False
    call.check(mask=masks)
    call.check(mask=masks, window=190)


@pytest.mark.parametrize("format", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("names", [(), ("window",), ("mask", "window")], ids="+".join)
class TestWhatIsNotSeen:
    def test_takes_no_part(self, format, names):
        call = Call((590, 3, 3), (9, 1, 1), heads=6, head_dim=16, k_format=format, v_format=format)
        options = every_option(call)
        given = {key: value for name in names for key, value in options[name].items()}
        own = call.of_sequence(given, 0)
        seen = visible_tokens(9, 599, **own)
        own["mask"] = [own["mask"]] if "mask" in own else None
        alone = {"q": call.q[:9], "news": [9], "contexts": [590], **own}
        k, v = call.texts[0]
        clean = call.run(texts=[(k, v)], **alone)
        for row in (0, 4, 8):
            bad = [x.copy() for x in (k, v)]
            for x in bad:
                x[~seen[row]] = np.nan
            for a, b in zip(call.run(texts=[bad], **alone), clean, strict=True):
                assert_same_bits(a[row], b[row], f"row {row}")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_reaches_those_that_see_it(self, format, names, value):
        call = Call((590, 3, 3), (9, 1, 1), heads=6, head_dim=16, k_format=format, v_format=format)
        options = every_option(call)
        given = {key: x for name in names for key, x in options[name].items()}
        own = call.of_sequence(given, 0)
        sees = visible_tokens(9, 599, **own)[:, 594]
        own["mask"] = [own["mask"]] if "mask" in own else None
        alone = {"q": call.q[:9], "news": [9], "contexts": [590], **own}
        k, v = call.texts[0]
        bad = v.copy()
        bad[594] = value
        clean, out = (call.run(texts=[(k, x)], **alone)[0] for x in (v, bad))
        assert sees.any() and not sees.all()
        assert_same_bits(out[~sees], clean[~sees])
        assert np.array_equal(out[sees], np.full_like(out[sees], value), equal_nan=True)


@pytest.mark.parametrize("formats", PAIRS, ids="+".join)
class TestBits:
    def call(self, formats, **changes):
        k_format, v_format = formats
        return Call((600, 0, 250), (5, 3, 1), heads=6, k_format=k_format, v_format=v_format,
                    **{"block_size": 32, **changes})  # fmt: skip

    def given(self, call):
        options = every_option(call)
        return {**options["window"], **options["softcap"], **options["sinks"]}

    def test_order_of_threads_and_no_races(self, formats, cuda):
        call = self.call(formats)
        results = []
        for order, check in (("ascending", False), ("descending", True), ("random", True)):
            cuda(order=order, check=check)
            results.append(call.run(**self.given(call)))
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                assert_same_bits(a, b)

    def test_alone_in_other_blocks_or_in_pieces(self, formats, monkeypatch):
        call = self.call(formats)
        given = self.given(call)
        whole = call.run(**given)
        for s, text in enumerate(call.texts):
            rows = slice(call.starts[s], call.starts[s + 1])
            alone = call.run(texts=[text], q=call.q[rows], news=[call.news[s]],
                             contexts=[call.contexts[s]], **given)  # fmt: skip
            for a, b in zip(alone, whole, strict=True):
                assert_same_bits(a, b[rows])
        monkeypatch.setattr(dispatch, "MAX_PARTIAL_BYTES", 1)
        for a, b in zip(self.call(formats, block_size=256).run(**given), whole, strict=True):
            assert_same_bits(a, b)

    def test_chunks_where_exact(self, formats):
        call = self.call(formats)
        given = {**self.given(call), "exact": True}
        k, v = call.texts[0]
        results = []
        for cuts in ([0, 5], [0, 1, 3, 5]):
            parts = [
                call.run(texts=[(k[: 600 + b], v[: 600 + b])], q=call.q[a:b], news=[b - a],
                         contexts=[600 + a], **given)
                for a, b in itertools.pairwise(cuts)
            ]  # fmt: skip
            results.append([np.concatenate(x) for x in zip(*parts, strict=True)])
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)
