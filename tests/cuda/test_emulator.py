"""The emulator does what the machine does, and finds what the machine would not forgive."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int32, c_void_p
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_emulator.runtime import ORDERS, EmulatedRuntime, EmulationError
from kvcore.arrays import bfloat16
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.params import Params

INF = np.float32(np.inf)


class Probe(Params):
    _fields_: ClassVar = [("x", c_void_p), ("y", c_void_p), ("n", c_int32)]


def source(*bodies: str) -> str:
    """Kernels probe_0, probe_1, ... of x and y as arrays of u32, and n, the length of x."""
    kernels = [
        f"""
        KV_KERNEL(probe_{i}, Probe, 128, 1) {{
            const s32 t = (s32)threadIdx.x, lane = t & 31;
            (void)t, (void)lane;
            {body}
        }}"""
        for i, body in enumerate(bodies)
    ]
    return f"""
        #include "device.cuh"
        struct Probe {{ u32 *x, *y; s32 n; }};
        KV_CONSTANT u32 TABLE[4] = {{1, 2, 3, 4}};
        KV_DEVICE u32 deep(u32 n) {{ volatile u32 big[4096]; big[n] = n; return deep(n) + big[n]; }}
        {"".join(kernels)}"""


def run(
    text: str,
    x: NDArray[Any],
    y: NDArray[Any],
    *,
    number: int = 0,
    order: str = "ascending",
    check: bool = True,
    blocks: int = 1,
    threads: int = 64,
    shared_bytes: int = 0,
) -> None:
    """Runs one kernel of a source."""
    runtime = EmulatedRuntime(order=order, check=check, changed={"probe.cu": text})
    kernel = Launcher(runtime).kernel("probe.cu", f"probe_{number}", Probe)
    x, y = runtime.as_array(x, "x"), runtime.as_array(y, "y")
    kernel.params.x, kernel.params.y = runtime.address(x), runtime.address(y)
    kernel.params.n = x.size
    kernel.launch((blocks, 1, 1), (threads, 1, 1), shared_bytes)


def words(count: int) -> NDArray[np.uint32]:
    return np.random.default_rng(count).integers(0, 2**32, count, dtype=np.uint32)


# ---- numbers


def test_f16_to_f32_of_all() -> None:
    x, y = np.arange(2**16, dtype=np.uint32), np.empty(2**16, np.uint32)
    body = "for (s32 i = t; i < p.n; i += 64) p.y[i] = float_as_u32(f16_to_f32(p.x[i]));"
    run(source(body), x, y, check=False)
    expected = x.astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(y.view(np.float32), expected)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_f32_to_16_bits_rounds_to_nearest_even(name: str) -> None:
    dtype = np.dtype(np.float16) if name == "f16" else bfloat16()
    halves = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    middles = ((halves[1:].astype(float) + halves[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, INF), np.nextafter(middles, -INF)]
    special = np.array([np.inf, -np.inf, np.nan, 1e38, 1e-40], np.float32)
    x = np.concatenate([middles, *near, halves, special])
    y = np.empty(x.size, np.uint32)
    body = f"for (s32 i = t; i < p.n; i += 64) p.y[i] = f32_to_{name}(u32_as_float(p.x[i]));"
    run(source(body), x, y, check=False)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    found = y.astype(np.uint16).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        ("hadd2", lambda a, b, _: a + b),
        ("hsub2", lambda a, b, _: a - b),
        ("hmul2", lambda a, b, _: a * b),
        ("hfma2", lambda a, b, c: a * b + c),
    ],
)
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_pairs_are_rounded_once(
    name: str, function: str, exact: Callable[[Any, Any, Any], Any]
) -> None:
    dtype = np.dtype(np.float16) if name == "f16" else bfloat16()
    rng = np.random.default_rng(3)
    numbers = (rng.standard_normal((3, 2048)) * 2.0 ** rng.integers(-6, 6, (3, 2048))).astype(dtype)
    x, y = numbers.reshape(-1).view(np.uint32).copy(), np.empty(1024, np.uint32)
    call = function + ("" if name == "f16" else "_bf16")
    third = ", p.x[i + 2048]" if function == "hfma2" else ""
    body = f"p.y[i] = {call}(p.x[i], p.x[i + 1024]{third});"
    run(source(f"for (s32 i = t; i < 1024; i += 64) {body}"), x, y, check=False)
    expected = exact(*numbers.astype(np.float64)).astype(dtype)
    np.testing.assert_array_equal(y.view(dtype), expected)


def test_byte_perm_chooses_bytes() -> None:
    x = np.array([0x33221100, 0xF7665544, 0x7410, 0x0F73], np.uint32)
    y = np.zeros(2, np.uint32)
    run(source("if (t < 2) p.y[t] = byte_perm(p.x[0], p.x[1], p.x[2 + t]);"), x, y)
    np.testing.assert_array_equal(y, [0xF7441100, 0x00FFF733])


# ---- warps and matrices


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_exchange_values(order: str) -> None:
    body = """
        const u32 v = p.x[t];
        u32 *y = p.y + t * 8;
        y[0] = shfl(v, lane / 2), y[1] = shfl_xor(v, 5);
        y[2] = shfl_down(v, 3), y[3] = shfl_up(v, 3);
        y[4] = ballot(v & 1), y[5] = any(v == p.x[7]) + 2 * all(v == p.x[7]);
        y[6] = (u32)reduce_max((s32)v), y[7] = (u32)reduce_add((s32)v);
    """
    x, y = words(64), np.empty((64, 8), np.uint32)
    run(source(body), x, y, order=order)
    t = np.arange(64)
    warp, lane = t // 32 * 32, t % 32
    rows = x.reshape(2, 32)
    np.testing.assert_array_equal(y[:, 0], x[warp + lane // 2])
    np.testing.assert_array_equal(y[:, 1], x[warp + (lane ^ 5)])
    np.testing.assert_array_equal(y[:, 2], x[np.where(lane + 3 < 32, t + 3, t)])
    np.testing.assert_array_equal(y[:, 3], x[np.where(lane >= 3, t - 3, t)])
    votes = ((rows & 1) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    np.testing.assert_array_equal(y[:, 4], votes.repeat(32))
    np.testing.assert_array_equal(y[:, 5], np.repeat([1, 0], 32))
    largest = rows.view(np.int32).max(axis=1).view(np.uint32)
    np.testing.assert_array_equal(y[:, 6], largest.repeat(32))
    np.testing.assert_array_equal(y[:, 7], rows.sum(axis=1, dtype=np.uint32).repeat(32))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_multiplies_matrices(name: str) -> None:
    """a . b + 1 with a [16, 16] and b [16, 8] by ldmatrix, as a kernel would read them."""
    dtype = np.dtype(np.float16) if name == "f16" else bfloat16()
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((16, 16)).astype(dtype), rng.standard_normal((16, 16)).astype(dtype)
    body = f"""
        KV_DYNAMIC_SHARED(uint4, rows); /* a, then b: 16 rows of two chunks each */
        cp_async16(rows + 2 * t, p.x + 8 * t, true);
        cp_async16(rows + 2 * t + 1, p.x + 8 * t + 4, true);
        cp_async_commit();
        cp_async_wait<0>();
        sync_warp();
        u32 a[4], b[4];
        const s32 row = lane % 8 + lane / 8 % 2 * 8;
        ldmatrix_x4(a, rows + 2 * row + lane / 16);
        ldmatrix_x4_trans(b, rows + 32 + 2 * row + lane / 16);
        for (s32 n = 0; n < 2; n++) {{
            float c[4] = {{1, 1, 1, 1}};
            mma_{name}(c, a, b[2 * n], b[2 * n + 1]);
            u32 *y = p.y + lane / 4 * 16 + 8 * n + lane % 4 * 2;
            for (s32 i = 0; i < 4; i++)
                y[i / 2 * 128 + i % 2] = float_as_u32(c[i]);
        }}
    """
    x, y = np.concatenate([a, b]).view(np.uint32).reshape(-1), np.empty((16, 16), np.uint32)
    run(source(body), x, y, threads=32, shared_bytes=1024)
    expected = 1 + a.astype(float) @ b.astype(float)
    np.testing.assert_allclose(y.view(np.float32), expected, atol=2e-6)


# ---- memory


def test_copies_come_as_late_as_waits_allow() -> None:
    body = """
        KV_SHARED u32 s[3][4];
        if (t == 0) {
            for (s32 i = 0; i < 3; i++) {
                cp_async16(s[i], p.x, i != 2);
                cp_async_commit();
            }
            cp_async_wait<2>();
            p.y[0] = s[0][0], p.y[1] = s[1][0];
            cp_async_wait<0>();
            p.y[2] = s[1][0], p.y[3] = s[2][0];
        }
    """
    x, y = np.array([7, 8, 9, 10], np.uint32), np.zeros(4, np.uint32)
    run(source(body), x, y, check=False)  # the checker lets nobody read so early
    np.testing.assert_array_equal(y, [7, 0xFFFFFFFF, 7, 0])


def test_shared_memory_begins_as_nan() -> None:
    body = """
        KV_SHARED float s[64];
        KV_DYNAMIC_SHARED(float, d);
        p.y[64 * blockIdx.x + t] = s[t] != s[t] && d[t] != d[t];
        s[t] = d[t] = 1;
    """
    y = np.zeros(128, np.uint32)
    run(source(body), y, y, blocks=2, shared_bytes=256)
    assert y.all()


# ---- what is wrong

TURN = "KV_SHARED u32 s[64]; s[t] = 1;"
WRONG = {
    "no barrier": ("race", TURN + "p.y[t] = s[t ^ 32];"),
    "a warp's sync between warps": ("race", TURN + "sync_warp(); p.y[t] = s[t ^ 32];"),
    "no warp's sync": ("race", TURN + "p.y[t] = s[t ^ 1];"),
    "a shuffle is no sync": ("race", TURN + "shfl(t, 0); p.y[t] = s[t ^ 1];"),
    "written over what was read": (
        "race",
        TURN + "sync_threads(); p.y[t] = s[t ^ 32]; s[t] = 2;",
    ),
    "two write the same": ("race", "KV_SHARED u32 s[1]; s[0] = 3; sync_threads(); p.y[t] = s[0];"),
    "a barrier of other warps": (
        "race",
        TURN + "sync_named(1 + t / 32, 32); p.y[t] = s[t ^ 32];",
    ),
    "a copy that is not waited for": (
        "race",
        """KV_SHARED u32 s[64][4]; cp_async16(s[t], p.x, true); cp_async_commit(); sync_threads();
           p.y[t] = s[t ^ 32][0]; cp_async_wait<0>();""",
    ),
    "a copy to where others read": (
        "race",
        """KV_SHARED u32 s[64][4]; s[t][0] = 1; sync_threads(); p.y[t] = s[t ^ 32][0];
           cp_async16(s[t], p.x, true); cp_async_commit();""",
    ),
    "a copy under way to where others write": (
        "where a copy of thread",
        """KV_SHARED u32 s[64][4]; cp_async16(s[t], p.x, true); cp_async_commit(); sync_threads();
           s[t ^ 32][0] = 1; sync_threads(); cp_async_wait<0>();""",
    ),
    "a barrier that half of a warp skips": (
        "divergent barrier",
        "if (lane < 16) sync_threads();\n sync_threads();",
    ),
    "barriers of two branches": (
        "divergent barrier",
        "if (t < 32)\n sync_threads();\n else\n sync_threads();",
    ),
    "a lane that does not take part": ("ended", "if (lane == 3) return; shfl(t, 0);"),
    "lanes of two minds": ("divergent warp", "if (lane < 16) sync_warp(); else shfl(t, 0);"),
    "a warp's number for a lane alone": (
        "deadlock",
        "if (lane == 0) p.y[t] = warp_id();\n sync_threads();",
    ),
    "a barrier that nobody else reaches": ("deadlock", "if (t < 32) sync_named(1, 64);"),
    "a read behind an array": ("read of 4 bytes out of bounds", "p.y[t] = p.x[p.n];"),
    "a write before an array": ("write of 4 bytes out of bounds", "p.y[-1 - t] = 0;"),
    "a copy from behind an array": (
        "read of 16 bytes out of bounds",
        "KV_SHARED u32 s[4]; if (t == 0) cp_async16(s, p.x + p.n, true);",
    ),
    "a write to what is read-only": ("read-only", "p.x[t] = 0;"),
    "behind the shared memory": ("out of bounds", "KV_DYNAMIC_SHARED(u32, d); d[1024 + t] = 0;"),
    "a copy of odd place": (
        "not aligned",
        "KV_SHARED u32 s[8]; if (t == 0) cp_async16(s + 1, p.x, true);",
    ),
    "a matrix of odd place": (
        "not aligned",
        "KV_SHARED u32 s[64]; u32 r[4]; ldmatrix_x4(r, s + 1);",
    ),
    "a matrix elsewhere": ("shared memory", "u32 r[4]; ldmatrix_x4(r, p.x);"),
    "a count before the fence": (
        "not fenced",
        "p.y[t] = 1; sync_threads(); if (t == 0) atomic_add_s32((s32 *)p.y + 70, 1);",
    ),
    "a fence before the barrier, by one": (
        "not fenced",
        """p.y[t] = 1; if (t == 0) thread_fence(); sync_threads();
           if (t == 0) atomic_add_s32((s32 *)p.y + 70, 1);""",
    ),
    "a wild pointer": ("memory fault", "p.y[t] = *(volatile u32 *)(u64)(t + 1);"),
    "a division by zero": ("arithmetic fault", "p.y[t] = (u32)(5 / (s32)(p.x[0] - p.x[0]));"),
    "an endless recursion": (
        "memory fault",
        "p.y[t] = deep(t);",
    ),
}
ALL_WRONG = source(*(body for _, body in WRONG.values()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", WRONG)
def test_finds(what: str, order: str) -> None:
    message, _ = WRONG[what]
    number = list(WRONG).index(what)
    x, y = words(80), np.zeros(80, np.uint32)
    x.flags.writeable = False
    check = "fault" not in message
    with pytest.raises(EmulationError, match=rf"{message}.*\[block 0,0,0 thread"):
        run(ALL_WRONG, x, y, number=number, order=order, check=check, shared_bytes=4096)


RIGHT = {
    "a barrier": TURN + "sync_threads(); p.y[t] = s[t ^ 32];",
    "a warp's sync": TURN + "sync_warp(); p.y[t] = s[t ^ 1];",
    "a barrier of both warps": TURN + "sync_named(1, 64); p.y[t] = s[t ^ 32];",
    "a warp's copies": """
        KV_SHARED u32 s[64][4]; cp_async16(s[t], p.x, true); cp_async_commit(); cp_async_wait<0>();
        sync_warp(); p.y[t] = s[t ^ 1][0];""",
    "threads that end early": "if (t >= 32) return; sync_threads(); p.y[t] = 1;",
    "each fences": """
        p.y[t] = 1; thread_fence(); sync_threads();
        if (t == 0) atomic_add_s32((s32 *)p.y + 70, 1);""",
    "one fences for all": """
        p.y[t] = 1; sync_threads();
        if (t == 0) { thread_fence(); atomic_add_s32((s32 *)p.y + 70, 1); }""",
    "a table of constants": "p.y[t] = TABLE[p.x[t] % 4];",
}
ALL_RIGHT = source(*RIGHT.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", RIGHT)
def test_does_not_complain_of(what: str, order: str) -> None:
    x, y = words(80), np.zeros(80, np.uint32)
    run(ALL_RIGHT, x, y, number=list(RIGHT).index(what), order=order)


def test_says_in_which_line() -> None:
    text = source(
        "p.y[t] =\n p.x[p.n + 1000];", "if (t < 32) sync_threads();\n else sync_threads();"
    )
    with pytest.raises(EmulationError, match=r"thread 0,0,0\] at probe\.cu:11$"):
        run(text, words(4), words(4))
    with pytest.raises(EmulationError, match=r"probe\.cu:(16 and at line 17|17 and at line 16)"):
        run(text, words(4), words(4), number=1)


@pytest.mark.parametrize(
    ("threads", "shared_bytes"), [(129, 0), (0, 0), (64, 227 * 1024 + 1)], ids=str
)
def test_refuses_launches(threads: int, shared_bytes: int) -> None:
    with pytest.raises(EmulationError, match="invalid launch"):
        run(source(""), words(4), words(4), threads=threads, shared_bytes=shared_bytes)


def test_goes_on_after_an_error() -> None:
    text = source("sync_threads(); if (t == 5) *(volatile u32 *)8 = 1;", "p.y[t] = 1;")
    y = np.zeros(64, np.uint32)
    for _ in range(3):
        with pytest.raises(EmulationError):
            run(text, y, y, check=False)
        run(text, y, y, number=1)
        assert y.all()
