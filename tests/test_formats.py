"""Formats: the table, the bytes that docs/formats.md defines, and how far decoding lies off."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import formats_reference as reference
import kvcore
from core.library import ISAS, machine
from kvcore import ops
from kvcore.formats import FORMATS, get_format
from strategies import seeds

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256, 576, 1024)
NAMES = tuple(reference.FORMATS)
ROW = np.array([((37 * i + 11) % 64 - 31) / 8 for i in range(64)], np.float32)
GROUP = np.array(
    [[((37 * i + 11 * t) % 64 - 31) / 8 for i in range(64)] for t in range(1, 33)], np.float32
)
STATIC = (1 / 16 + np.arange(64) / 1024).astype(np.float32)

GOLDEN = {
    "int8": (
        "31c359ea8016a73dcf64f68c21b349db7006982dbf55e67c12a339cb60f2881eaf45d76cfe9429bb51e2"
        "780ea035c75dee841aab41d368fa9025b74ddf740a9c023d"
    ),
    "int4": ("730c952eb851ea731ca63fc862fb841dea741da63fc862fb842db740d9630c9578c070c0033f053f"),
    "fp8_e4m3": (
        "f977f17c00fc71f779ec7d62fa73f47ae6fd6af976f27bd6fc70f878ee7d5efb72f57ae97e69fa75f27b"
        "defd6ef878f07c56fb72f679ea7d66fa74f37ae2fd6c133c"
    ),
    "rot8": (
        "6361a68c90849a48b03c7c5274787955778efb5a33327e87889195c06d988198cc66797359616da75943"
        "b541a4c09a844570513c018c7491a9a2245f74afc932cd3b"
    ),
    "rot6": (
        "d838f962c3c1f6112c4e5e04bd6d0e6513c94eec0628db49a6808d70d8b026c175595e16129256a99a98"
        "295d65b9e9294b3c"
    ),
    "rot4": ("7595fb4829287a838b9297c467a787a43d6547260485769bb4a31c537abcda28ca3b"),
    "rot3": ("6ee2bd782424fd116151239adf6793469a8c2d0921e9a97cad3b"),
    "rot2": ("35591e16129256a89b88394c65f9e929603b"),
    "int8_static": (
        "58a16db4804e9261a474b485589669a57a4f8960986fa77f578d669b75a8835e906c9d7aa9866493719e"
        "7e5d896a9576a081638c6e9779a184688f72997d6287"
    ),
}
# Of a whole group the SHA-256.
GOLDEN_GROUPS = {
    "chan4": "31f4a3c7d8a245563310a9680d1f94a2c713efb3f2c2484019378be124cb2960",
    "chan2": "05b85b4a1634e3e259457c2bd3219abd51c694f47be5ebb5927623429c715408",
}


def head_dims(name: str) -> tuple[int, ...]:
    return tuple(d for d in HEAD_DIMS if d % reference.FORMATS[name][1] == 0)


def hard_rows(rng: np.random.Generator, count: int, head_dim: int) -> np.ndarray:
    """Normal rows of all magnitudes, and the rows that encoders stumble over."""
    x = rng.standard_normal((count, head_dim))
    x *= 10.0 ** rng.uniform(-6, 6, (count, 1))
    hard = rng.permutation(count)[:12]
    x[hard[0]] = 0
    x[hard[1]] = -0.0
    x[hard[2]] = rng.standard_normal()
    x[hard[3]] = rng.integers(1, 99, head_dim) * 2.0**-149
    x[hard[4]] *= 1e-39 / np.abs(x[hard[4]]).max()
    x[hard[5]] *= 1e30 / np.abs(x[hard[5]]).max()
    x[hard[6], rng.integers(head_dim)] = 1e30
    x[hard[7]] = reference.signs(head_dim)
    x[hard[8]] = rng.integers(-2, 3, head_dim) / 2
    x[hard[9]] *= 8.5e37 / np.abs(x[hard[9]]).max()
    x[hard[10], : head_dim // 2] = 0
    x[hard[11]] = 2.0**-149
    return x.astype(np.float32)


def channels(rng: np.random.Generator, name: str, head_dim: int, with_bias: bool) -> dict:
    given = {}
    if with_bias:
        given["bias"] = rng.standard_normal(head_dim).astype(np.float32)
    if name == "int8_static":
        given["scales"] = np.exp(rng.standard_normal(head_dim) - 4).astype(np.float32)
    return given


class TestTable:
    @pytest.mark.parametrize("name", NAMES)
    def test_sizes(self, name):
        form = FORMATS[name]
        assert form.is_quantized and form.storage_dtype == np.uint8
        assert form.kind == ("channel" if name.startswith("chan") else "row")
        assert form.head_dim_multiple == reference.FORMATS[name][1]
        for head_dim in head_dims(name):
            assert form.row_nbytes(head_dim) == reference.row_bytes(name, head_dim)
            assert form.code_nbytes(head_dim) + form.metadata_nbytes(head_dim) == form.row_nbytes(
                head_dim
            )
            assert form.bits_per_element(head_dim) == 8 * form.row_nbytes(head_dim) / head_dim
            form.check_head_dim(head_dim)

    def test_bits_as_the_page_says(self):
        found = {name: FORMATS[name].bits_per_element(64) for name in NAMES}
        for names, bits in re.findall(r"^\| ([a-z0-9_, ]+?) \| \w+ \| ([0-9., ]+) /", text(), re.M):
            split, sizes = names.split(", "), [float(b) for b in bits.split(", ")]
            for name, size in zip(split, sizes * (len(split) // len(sizes)), strict=True):
                assert found.pop(name, size) == size
        assert not found

    def test_head_dims_that_do_not_fit_are_named(self):
        with pytest.raises(kvcore.InvalidArgument, match=r"^head_dim: .* multiple of 64.* rot3"):
            FORMATS["rot3"].check_head_dim(96)
        with pytest.raises(kvcore.InvalidArgument, match=r"^v: "):
            FORMATS["int8"].check_head_dim(0, "v")

    def test_aliases(self):
        assert get_format("fp8") is get_format("float8_e4m3fn") is FORMATS["fp8_e4m3"]


def text() -> str:
    return DOCS.read_text()


@pytest.mark.parametrize("isa", ISAS)
class TestGolden:
    @pytest.mark.parametrize("name", GOLDEN)
    def test_rows(self, isa, name):
        given = {"scales": STATIC} if name == "int8_static" else {}
        with machine(isa):
            assert ops.quantize(ROW, name, **given).tobytes().hex() == GOLDEN[name]

    @pytest.mark.parametrize("name", GOLDEN_GROUPS)
    def test_groups(self, isa, name):
        with machine(isa):
            data = ops.quantize(GROUP, name).tobytes()
        assert hashlib.sha256(data).hexdigest() == GOLDEN_GROUPS[name]

    def test_those_on_the_page(self, isa):
        lines = re.findall(r"^(\w+) ([0-9a-f]{40,})$", text(), re.M)
        assert len(lines) == 4
        with machine(isa):
            for name, data in lines:
                assert ops.quantize(ROW, name).tobytes().hex() == data


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(data=st.data(), seed=seeds, with_bias=st.booleans())
def test_bytes_and_decoded_bits_are_the_reference_s_on_every_isa(name, data, seed, with_bias):
    rng = np.random.default_rng(seed)
    head_dim = data.draw(st.sampled_from(head_dims(name)))
    x = hard_rows(rng, 32, head_dim)
    given = channels(rng, name, head_dim, with_bias)
    expected = reference.encode(name, x, **given)
    with np.errstate(over="ignore", invalid="ignore"):
        decoded = reference.decode(name, expected, head_dim, **given)
    for isa in ISAS:
        with machine(isa):
            code = ops.quantize(x, name, **given)
            assert np.array_equal(code, expected), isa
            assert np.array_equal(ops.dequantize(code, name, **given), decoded, equal_nan=True), isa


def ideal_scale(name: str, y: np.ndarray, level: np.ndarray) -> np.ndarray:
    """float64 [T]: a row's scale before it is rounded, from the transformed row."""
    if name in ("rot4", "rot3", "rot2"):
        return (np.abs(y) * np.abs(level)).sum(-1) / (level * level).sum(-1)
    reach = {"int8": 127, "fp8_e4m3": 448, "rot8": 127, "rot6": 64}[name]
    return np.abs(y).max(-1) / reach


@pytest.mark.parametrize("head_dim", [64, 192])
@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_those_of_float64(name, head_dim):
    """Each code is the nearest, and each scale the nearest bfloat16 or the next above."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, head_dim)).astype(np.float32)
    given = channels(rng, name, head_dim, False)
    code = ops.quantize(x, name, **given)
    level = reference.levels(name, code, head_dim)
    y, spacing, slack = x.astype(np.float64), 1.0, 1e-4
    if name in reference.ROTATED:
        size = reference.rotation_size(head_dim)
        y = y * reference.signs(head_dim) @ reference.hadamard_matrix(head_dim) / size
    if name == "int8_static":
        u = np.clip(y / given["scales"], -127, 127)
    elif name == "int4" or name in reference.CHANNEL_FORMATS:
        lo, step = reference.ranges(name, code, head_dim)
        u = (y - lo) / step
        tokens, elements = (1, 32) if name == "int4" else (32, 1)
        groups = y.reshape(64 // tokens, tokens, head_dim // elements, elements)
        least, most = groups.min((1, 3)), groups.max((1, 3))
        if name == "chan2":
            cut = (most - least) * 0.075
            least, most = least + cut, most - cut
            u = np.clip(u, 0, 3)
        lo, step = lo[::tokens, ::elements], step[::tokens, ::elements]
        slightly = 1e-6 * (most - least)
        assert (lo <= least + slightly).all()
        assert (lo >= least - np.abs(least) / 128 - slightly).all()
        exact = (most - lo) / (2 ** reference.FORMATS[name][0] - 1)
        assert (step >= exact * (1 - 1e-6)).all() and (step <= exact * (1 + 1 / 127)).all()
    else:
        scale = reference.split(name, code, head_dim)[1][:, 0]
        ratio = scale / ideal_scale(name, y, level)
        nearest = reference.FORMATS[name][0] in reference.LEVELS
        low, high = (1 - 1 / 255, 1 + 1 / 255) if nearest else (1 - 1e-6, 1 + 1 / 127)
        assert (ratio >= low).all() and (ratio <= high).all()
        u = y / scale[:, None]
        if nearest:
            unit = float(reference.UNIT[reference.FORMATS[name][0]])
            u = y * unit / np.sqrt((y * y).mean(-1, keepdims=True))
    if name == "fp8_e4m3":
        grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        spacing, slack = 2 * np.abs(np.abs(u)[..., None] - grid).min(-1), 1e-3
    elif name in ("rot4", "rot3", "rot2"):
        table = np.array(reference.LEVELS[reference.FORMATS[name][0]], np.float64)
        spacing = 2 * np.abs(np.abs(u)[..., None] - table).min(-1)
        assert (np.sign(u) == np.sign(level)).all()
    elif name == "rot6":
        spacing = 2.0
    assert (np.abs(u - level) <= spacing / 2 + slack).all()


# ---- how far off


def worst_error(name: str, x: np.ndarray, decoded: np.ndarray) -> float:
    """The largest error, in parts of what docs/formats.md allows."""
    error, x = np.abs(decoded - x), x.astype(np.float64)
    most = np.abs(x).max(-1, keepdims=True)
    if name == "int8":
        bound = most / 252
    elif name == "fp8_e4m3":
        bound = np.maximum(np.abs(x) / 16, most / 2**18)
    else:
        tokens, elements = (1, 32) if name == "int4" else (32, 1)
        shape = (len(x) // tokens, tokens, x.shape[1] // elements, elements)
        groups = x.reshape(shape)
        least, top = groups.min((1, 3), keepdims=True), groups.max((1, 3), keepdims=True)
        reach = np.broadcast_to(top - least + np.abs(least) / 128, shape).reshape(x.shape)
        bound = reach / (6.9 if name == "chan2" else 29.5)
    # Decoding rounds, once, what the minimum and the step add up to.
    bound = bound + np.abs(x) * 2.0**-23
    return float(np.max(error / np.where(bound > 0, bound, 1)))


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "int4", "chan4", "chan2"])
@given(seed=seeds, head_dim=st.sampled_from((64, 96, 128, 256)))
def test_errors_are_bounded(name, seed, head_dim):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, head_dim)) * np.exp(rng.standard_normal((64, 1)) * 3)
    x[:, rng.integers(head_dim)] *= 30
    x[rng.integers(64)] += rng.standard_normal() * 100
    x = x.astype(np.float32)
    assert worst_error(name, x, ops.dequantize(ops.quantize(x, name), name)) <= 1


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("int8", 0.0066), ("fp8_e4m3", 0.026), ("int4", 0.079), ("rot8", 0.0066),
        ("rot6", 0.0265), ("rot4", 0.097), ("rot3", 0.185), ("rot2", 0.342), ("chan4", 0.080),
    ],
)  # fmt: skip
def test_errors_of_normal_rows(name, part):
    x = np.random.default_rng(0).standard_normal((4096, 128)).astype(np.float32)
    lost = np.linalg.norm(ops.dequantize(ops.quantize(x, name), name) - x, axis=1)
    assert (lost / np.linalg.norm(x, axis=1)).mean() <= part


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30, 2.0**-115])
def test_rotation_and_powers_of_two_keep_the_error_at_any_magnitude(name, magnitude):
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    given = {"scales": np.full(128, 0.03, np.float32)} if name == "int8_static" else {}
    lost = ops.dequantize(ops.quantize(x, name, **given), name, **given) - x
    if given:
        given["scales"] = given["scales"] * np.float32(magnitude)
    scaled = (x * np.float32(magnitude)).astype(np.float32)
    far = ops.dequantize(ops.quantize(scaled, name, **given), name, **given) - scaled
    assert np.linalg.norm(far / np.float32(magnitude)) <= 1.1 * np.linalg.norm(lost)


def test_denormal_rows_keep_what_a_denormal_scale_can_hold():
    x = np.random.default_rng(0).integers(-(2**22), 2**22, (64, 64)) * 2.0**-149
    decoded = ops.dequantize(ops.quantize(x.astype(np.float32), "int8"), "int8")
    assert (np.abs(decoded - x) <= np.abs(x).max(-1, keepdims=True) / 254 + 2.0**-134).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_a_bias_comes_back(name):
    bias = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    given = {"scales": STATIC} if name == "int8_static" else {}
    zeros = np.zeros((32, 64), np.float32)
    assert not ops.dequantize(ops.quantize(zeros, name, **given), name, **given).any()
    rows = np.tile(bias, (32, 1))
    code = ops.quantize(rows, name, bias=bias, **given)
    assert np.array_equal(ops.dequantize(code, name, bias=bias, **given), rows)


@pytest.mark.parametrize("name", ["int8", "rot8", "int4", "chan4"])
def test_one_huge_outlier_leaves_its_scale_alone_large(name):
    x = np.ones((32, 64), np.float32)
    x[5, 7] = 1e30
    decoded = ops.dequantize(ops.quantize(x, name), name)
    assert np.isfinite(decoded).all() and decoded[5, 7] == pytest.approx(1e30, rel=0.03)
    others = np.ones_like(x, bool)
    others[:, 7] = others[5] = False
    assert np.abs(decoded[others] - 1).max() < 0.1


# ---- plain arrays


@pytest.mark.parametrize("name", NAMES)
def test_bytes_depend_on_neither_dtype_nor_threads_nor_neighbours(name):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((640, 128)).astype(np.float32).astype(ml_dtypes.bfloat16)
    given = channels(rng, name, 128, True)
    expected = ops.quantize(x.astype(np.float32), name, **given)
    unit = len(x) // len(expected)
    few = slice(32 // unit, 64 // unit)
    for threads in (1, 3):
        with machine(ISAS[0], threads):
            assert np.array_equal(ops.quantize(x, name, **given), expected)
            back = ops.dequantize(expected, name, **given)
            assert np.array_equal(ops.quantize(x[32:64], name, **given), expected[few])
            assert np.array_equal(ops.dequantize(expected[few], name, **given), back[32:64])


def test_shapes():
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 32)).astype(np.float32)
    assert ops.quantize(x, "int8").shape == (2, 3, 64, 34)
    code = ops.quantize(x, "chan4")
    assert code.shape == (2, 3, 2, 32 * 20)
    assert ops.dequantize(code, "chan4").shape == x.shape
    assert np.array_equal(ops.quantize(x[1, 2], "chan4"), code[1, 2])
    assert ops.quantize(x[:0], "rot4").shape == (0, 3, 64, 18)
    assert ops.dequantize(ops.quantize(x[0, 0, 0], "rot4"), "rot4").shape == (32,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name, dtype, value):
    x = np.ones((32, 64), dtype)
    x[31, 63] = value
    given = {"scales": STATIC} if name == "int8_static" else {}
    with pytest.raises(kvcore.NotFinite, match=f"^x: expected finite numbers for {name}"):
        ops.quantize(x, name, **given)


X, BYTES = np.zeros((32, 64), np.float32), np.zeros((2, 66), np.uint8)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("x", lambda: ops.quantize(X[:, :48], "rot4")),
        ("x", lambda: ops.quantize(np.zeros((1, 2048), np.float32), "int8")),
        ("x", lambda: ops.quantize(X[:31], "chan4")),
        ("x", lambda: ops.quantize(X[0], "chan2")),
        ("scales", lambda: ops.quantize(X, "int8_static")),
        ("scales", lambda: ops.quantize(X, "int8", scales=STATIC)),
        ("scales", lambda: ops.quantize(X, "int8_static", scales=STATIC[:8])),
        ("scales", lambda: ops.quantize(X, "int8_static", scales=STATIC - 1)),
        ("scales", lambda: ops.quantize(X, "int8_static", scales=STATIC / 0.0 * 0)),
        ("bias", lambda: ops.quantize(X, "bf16", bias=STATIC)),
        ("bias", lambda: ops.quantize(X, "rot4", bias=STATIC[:1])),
        ("bias", lambda: ops.quantize(X, "rot4", bias=np.full(64, np.nan))),
        ("code", lambda: ops.dequantize(BYTES, "rot3")),
        ("code", lambda: ops.dequantize(BYTES[:, :65], "int8")),
        ("code", lambda: ops.dequantize(BYTES[0], "chan4")),
        ("scales", lambda: ops.dequantize(BYTES[:, :64], "int8_static")),
        ("bias", lambda: ops.dequantize(BYTES, "int8", bias=STATIC[:8])),
    ],
)
def test_errors_name_the_argument(argument, call):
    with (
        np.errstate(all="ignore"),
        pytest.raises(kvcore.InvalidArgument, match=f"^{argument}: expected"),
    ):
        call()


def test_bytes_are_asked_for():
    with pytest.raises(kvcore.InvalidType, match=r"^code: expected uint8 for rot4"):
        ops.dequantize(X, "rot4")
    with pytest.raises(kvcore.InvalidType, match=r"^scales: "):
        ops.quantize(X, "int8_static", scales=np.array(["1"] * 64))
