"""The host side of the CUDA backend on the emulator: what it takes, refuses and keeps."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvcore
from kvcore.attend_options import AttendOptions
from kvcore_gpu.plans import table_width
from kvcore_gpu.scratch import Scratch
from support import BFLOAT16, assert_same_bits, random_kv, random_q

SPEC = kvcore.CacheSpec(
    3,
    2,
    64,
    groups=[kvcore.GroupSpec(16), kvcore.GroupSpec(32, 40)],
    layer_groups=[0, 1, 0],
    layer_formats={0: ("bf16", "bf16"), 1: ("rot8", "rot8"), 2: ("int8", "fp16")},
    raw_last=32,
)

pytestmark = pytest.mark.usefixtures("cuda_emulated")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def caches(spec=SPEC, num_blocks=24, **options):
    return [kvcore.KVCache(spec, num_blocks, backend=name, **options) for name in ("cpu", "cuda")]


def play(cache, entries, seed):
    """One step of random contents; what every layer attended."""
    rng = np.random.default_rng(seed)
    outs = []
    with cache.step(entries) as step:
        for layer, spec in enumerate(cache.spec.layers):
            step.append(layer, *random_kv(rng, step.num_tokens, spec))
            window = cache.spec.groups[spec.group].retention
            q = random_q(rng, step.num_tokens, 4, spec.head_dim)
            outs.append(step.attend(layer, q, window=window))
    return outs


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        scale = np.linalg.norm(other, axis=-1).max()
        assert np.linalg.norm(one - other, axis=-1).max() <= 1e-2 * scale


def test_a_life_is_the_same_on_both():
    """Growth, forks, copies on write, truncation, restored raw rows, released blocks."""
    both = caches()
    lives = []
    for cache in both:
        a = cache.sequence()
        outs = play(cache, [(a, 31)], 1)
        b = a.fork()
        outs += play(cache, [(b, 1), (a, 2)], 2)
        outs += play(cache, [(a, 32)], 3)
        outs += play(cache, [(a, 32)], 4)
        c = a.fork(90)
        outs += play(cache, [(c, 3), (b, 30)], 5)
        lives.append((outs, [s.read(layer) for s in (a, b, c) for layer in range(3)]))
        stats = cache.stats()
        lives[-1] += ((stats.copies, stats.reencoded_rows, stats.released, stats.bytes),)
        cache.check()
    assert lives[0][2] == lives[1][2] and all(lives[0][2])
    assert_close(lives[1][0], lives[0][0])
    for one, other in zip(lives[1][1], lives[0][1], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert_same_bits(mine, theirs)


LAYOUTS = {
    "NHD": lambda x, cut: x,
    "HND": lambda x, cut: x.swapaxes(0, 1),
    "BSHD": lambda x, cut: padded(x, cut),
    "BHSD": lambda x, cut: padded(x, cut).swapaxes(1, 2),
}


def padded(rows, cut):
    """[T, H, D] as [S, n + 1, H, D], NaN in the padding."""
    news = np.diff(cut)
    array = np.full((len(news), news.max() + 1, *rows.shape[1:]), np.nan, rows.dtype)
    for s, n in enumerate(news):
        array[s, :n] = rows[cut[s] : cut[s + 1]]
    return array


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_layouts_and_dtypes(rng, layout, dtype):
    spec = kvcore.CacheSpec(1, 2, 64, k_format="bf16", v_format="bf16", block_size=16)
    news = [3, 1, 5]
    k, v = (x.astype(dtype) for x in random_kv(rng, 9, spec.layers[0]))
    q = random_q(rng, 9, 4, 64).astype(dtype)
    outs = []
    for cache in caches(spec):
        with cache.step([(cache.sequence(), n) for n in news]) as step:
            rows = [LAYOUTS[layout](x, step.query_starts) for x in (k, v, q)]
            step.append(0, *rows[:2], layout=layout)
            out, lse = step.attend(0, rows[2], layout=layout, return_lse=True)
            assert out.dtype == dtype and lse.shape == (9, 4)
            plain = step.attend(0, q)
            target = np.full_like(out, np.nan)
            assert step.attend(0, rows[2], layout=layout, out=target) is target
            assert_same_bits(target, out)
            expected = LAYOUTS[layout](plain, step.query_starts)
            assert_same_bits(out, np.where(np.isnan(expected), 0, expected).astype(dtype))
            outs.append((out.astype(np.float32), lse))
    np.testing.assert_allclose(outs[1][0], outs[0][0], atol=2e-2)
    np.testing.assert_allclose(outs[1][1], outs[0][1], atol=1e-2)


def test_arrays_that_are_not_aligned(rng):
    """They are copied on the way in, as often as they come; results cannot be written there."""
    spec = kvcore.CacheSpec(1, 2, 64, k_format="bf16", v_format="bf16", block_size=16)
    wide = rng.standard_normal((3, 3, 4, 68)).astype(np.float32)
    aligned = [np.ascontiguousarray(x) for x in wide[..., 1:65]]
    odd = list(wide[..., 1:65])
    outs = []
    for rows in (aligned, odd, aligned, odd):
        cache = kvcore.KVCache(spec, 8, backend="cuda")
        a = cache.sequence()
        for again in range(3):
            with cache.step([(a, 3)]) as step:
                step.append(0, rows[0][:, :2], rows[1][:, :2])
                outs.append((again, step.attend(0, rows[2])))
                if rows is odd:
                    with pytest.raises(kvcore.InvalidArgument, match=r"^out: expected a writable"):
                        step.attend(0, rows[2], out=rows[0])
    for again, out in outs[3:]:
        assert_same_bits(out, outs[again][1])


def bad_calls():
    good = np.zeros((3, 2, 64), np.float32)
    q = np.zeros((3, 4, 64), np.float32)
    return {
        "k shape": lambda s: s.append(0, good[:2], good),
        "v shape": lambda s: s.append(0, good, good[..., :32]),
        "k heads": lambda s: s.append(0, q, good),
        "k dtype": lambda s: s.append(0, good.astype(np.float64), good),
        "v missing": lambda s: s.append(0, good, None),
        "k layout": lambda s: s.append(0, good, good, layout="DHN"),
        "appended twice": lambda s: [s.append(0, good, good) for _ in range(2)],
        "layer": lambda s: s.append(3, good, good),
        "attend before append": lambda s: s.attend(0, q),
        "q heads": lambda s: attend(s, good[:, :1]),
        "q head_dim": lambda s: attend(s, q[..., :32]),
        "q tokens": lambda s: attend(s, q[:2]),
        "out dtype": lambda s: attend(s, q, out=q.astype(np.float16)),
        "out shape": lambda s: attend(s, q, out=q[:2]),
        "scale": lambda s: attend(s, q, scale=np.inf),
        "softcap": lambda s: attend(s, q, softcap=-1.0),
        "slopes": lambda s: attend(s, q, alibi_slopes=[1.0]),
        "slopes not finite": lambda s: attend(s, q, alibi_slopes=[1.0, 2.0, np.nan, 0.0]),
        "sinks": lambda s: attend(s, q, sinks=np.zeros((4, 1))),
        "positions": lambda s: attend(s, q, positions=[0, 1]),
        "negative positions": lambda s: attend(s, q, positions=[0, -1, 2]),
        "mask": lambda s: attend(s, q, mask=[np.ones((3, 3), bool), None]),
        "mask shape": lambda s: attend(s, q, mask=[np.ones((3, 4), bool)]),
        "window": lambda s: attend(s, q, window=0),
    }


def attend(step, q, **options):
    rows = np.zeros((3, 2, 64), np.float32)
    step.append(0, rows, rows)
    return step.attend(0, q, **options)


@pytest.mark.parametrize("name", bad_calls())
def test_refusals_are_the_cpus(name):
    errors = []
    for cache in caches():
        sequence = cache.sequence()
        with pytest.raises(kvcore.KVCoreError) as raised, cache.step([(sequence, 3)]) as step:
            bad_calls()[name](step)
        errors.append(raised.value)
        assert len(sequence) == 0 and cache.stats().in_use == 0
    mine, theirs = errors[1], errors[0]
    assert type(mine) is type(theirs)
    assert str(mine) == str(theirs).replace("a float32 NumPy array like q", "float32 like q")


def test_tokens_that_were_released(rng):
    for cache in caches():
        a = cache.sequence()
        for _ in range(4):
            play(cache, [(a, 30)], 0)
        with cache.step([(a, 1)]) as step:
            for layer, spec in enumerate(SPEC.layers):
                step.append(layer, *random_kv(rng, 1, spec))
            q = random_q(rng, 1, 4, 64)
            with pytest.raises(kvcore.TokensReleased):
                step.attend(1, q, window=40, positions=[60])
            step.attend(1, q, window=40, positions=[121])


def test_what_is_not_finite_is_noted(rng):
    cuda = kvcore.KVCache(SPEC, 24, backend="cuda")
    k, v = random_kv(rng, 2, SPEC.layers[1])
    k[1, 0, 5], v[0, 1, 7] = np.inf, np.nan
    cuda.check_finite()
    with cuda.step([(cuda.sequence(), 2)]) as step:
        step.append(0, k, v)
        cuda.check_finite()  # floats are stored as they are
        step.append(1, k, v)
        step.append(2, k, v)
    with pytest.raises(kvcore.NotFinite, match=r"^append: expected finite numbers"):
        cuda.check_finite()
    cuda.check_finite()
    saturating = kvcore.CacheSpec(1, 2, 64, k_format="rot8", v_format="rot8", saturate=True)
    blocks = []
    for cache in caches(saturating, 4):
        with cache.step([(cache.sequence(), 2)]) as step:
            step.append(0, k, v)
        cache.check_finite()
        blocks.append(cache.blocks(0))
    for one, other in zip(*blocks, strict=True):
        assert_same_bits(one, other)


def test_v_in_k(rng):
    spec = kvcore.CacheSpec(1, 1, 96, v_in_k=64, k_format="bf16", block_size=16)
    outs = []
    k = rng.standard_normal((8, 1, 96)).astype(np.float32)
    q = rng.standard_normal((8, 8, 96)).astype(np.float32)
    for cache in caches(spec):
        a = cache.sequence()
        with cache.step([(a, 8)]) as step:
            with pytest.raises(kvcore.InvalidArgument, match=r"^v: expected None"):
                step.append(0, k, k)
            step.append(0, k, None)
            outs.append(step.attend(0, q))
        assert cache.blocks(0)[1].shape[-1] == 64
        held = a.read(0)
        assert_same_bits(held[1], held[0][..., :64])
    np.testing.assert_allclose(outs[1], outs[0], atol=2e-2)


def test_a_layer_that_reads_anothers_cache(rng):
    spec = kvcore.CacheSpec(2, 2, 64, k_format="bf16", v_format="bf16", kv_sources={1: 0})
    for cache in caches(spec, 4):
        with cache.step([(cache.sequence(), 3)]) as step:
            step.append(0, *random_kv(rng, 3, spec.layers[0]))
            q = random_q(rng, 3, 4, 64)
            assert_same_bits(step.attend(1, q), step.attend(0, q))
        assert cache.blocks(0)[0] is cache.blocks(1)[0]


@pytest.mark.parametrize("view", [np.s_[:, :, ::-1], np.s_[..., 1:65], np.s_[..., ::2]], ids=str)
def test_blocks_that_kernels_cannot_read(rng, view):
    blocks = rng.standard_normal((4, 2, 16, 128)).astype(np.float32)[view]
    q = rng.standard_normal((1, 2, blocks.shape[-1])).astype(np.float32)
    tables, lens, starts = np.array([[0, 1]], np.int32), [20], [0, 1]
    operations = kvcore.get_backend("cuda")
    with pytest.raises(kvcore.InvalidArgument, match=r"^k_blocks: .*got strides"):
        operations.paged_attention(
            q, blocks, blocks, tables, lens, starts, "HND", AttendOptions(), False
        )
    upwards = np.ascontiguousarray(blocks)[::-1]  # blocks may lie in any order
    operations.paged_attention(
        q, upwards, upwards, tables, lens, starts, "HND", AttendOptions(), False
    )


def test_more_sequences_than_a_grid_has_blocks():
    cache = kvcore.KVCache(kvcore.CacheSpec(1, 1, 64, block_size=16), 65537, backend="cuda")
    entries = [(cache.sequence(), 1) for _ in range(65536)]
    with pytest.raises(kvcore.InvalidArgument, match=r"^entries: expected at most 65535 sequences"):
        cache.step(entries)
    assert cache.stats().in_use == 0
    cache.check()


def test_threads_share_a_cache():
    """Each has a step of its own; what a launch takes is filled in by one of them at a time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    cache = kvcore.KVCache(kvcore.CacheSpec(1, 2, 64, k_format="bf16"), 8, backend="cuda")

    def work(number):
        sequence, steps = cache.sequence(), 40
        rows = np.full((2, 1, 2, 64), number, np.float32)
        for _ in range(steps):
            with cache.step([(sequence, 1)]) as step:
                step.append(0, *rows)
        k, v = sequence.read(0)
        return k.shape == (steps, 2, 64) and (k == number).all() and (v == number).all()

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(1, 5)))
    finally:
        sys.setswitchinterval(interval)


class TestMemory:
    def test_bytes_are_the_cpus(self):
        cpu, cuda = caches()
        assert cpu.stats().bytes == cuda.stats().bytes

    def test_a_device_that_is_none(self):
        with pytest.raises(kvcore.InvalidArgument, match=r"^device: expected 0"):
            kvcore.KVCache(SPEC, 4, backend="cuda", device=1)
        kvcore.KVCache(SPEC, 4, backend="cuda", device=0)

    def test_scratch_grows_and_stays(self, cuda_emulated):
        scratch = Scratch(cuda_emulated.runtime)
        first = scratch.get("a", 100, np.float32)
        assert scratch.get("a", 128, np.float32) == first
        other = scratch.get("a", 129, np.float32)
        assert other != first and scratch.get("a", 1, np.float32) == other
        assert scratch.get("b", 1, np.int32) not in (first, other)

    @pytest.mark.parametrize("block_size", [16, 64, 4096])
    def test_tables_are_a_quarter_wider_at_most(self, block_size):
        least = 512 // block_size
        for columns in range(1, 5000):
            width = table_width(columns, block_size)
            assert columns <= width <= max(least, columns * 5 / 4)
            assert width <= table_width(columns + 1, block_size)
        assert len({table_width(n, 4096) for n in range(1, 5000)}) < 50


class TestGraphs:
    """What a replayed graph of launches would see."""

    def test_keys_hold_while_sequences_grow(self):
        cache = kvcore.KVCache(SPEC, 64, backend="cuda")
        a, b = cache.sequence(), cache.sequence()
        play(cache, [(a, 100), (b, 5)], 0)
        keys = []
        for _ in range(20):
            with cache.step([(a, 1), (b, 1)]) as step:
                keys.append(step.graph_key)
                step.mark_appended()
        assert len(set(keys)) == 1
        with cache.step([(a, 1)]) as step:
            assert step.graph_key not in keys
            step.mark_appended()
        with cache.step([(a, 2), (b, 1)]) as step:
            assert step.graph_key not in keys
            step.mark_appended()
        assert (len(a), len(b)) == (123, 26)
