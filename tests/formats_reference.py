"""docs/formats.md once more, in NumPy: encoders to the bit, decoders in float64.

Rows are float32 [T, D]; bytes are uint8 [T, row_bytes], [G, 32 * row_bytes] for channel formats.
Encoders work on whole arrays, one IEEE float32 operation after the other, as the page says.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

F32, F64 = np.float32, np.float64
BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn

#: name: (bits, what head_dim must be a multiple of)
ROW_FORMATS = {
    "int8": (8, 16),
    "int4": (4, 32),
    "fp8_e4m3": (8, 16),
    "int8_static": (8, 16),
    "rot8": (8, 16),
    "rot6": (6, 64),
    "rot4": (4, 32),
    "rot3": (3, 64),
    "rot2": (2, 64),
}
CHANNEL_FORMATS = {"chan4": (4, 32), "chan2": (2, 32)}
FORMATS = ROW_FORMATS | CHANNEL_FORMATS
ROTATED = ("rot8", "rot6", "rot4", "rot3", "rot2")

LEVELS = {
    4: [6, 18, 31, 44, 58, 75, 96, 127],
    3: [14, 45, 79, 127],
    2: [38, 127],
}
UNIT = {4: F32(46.47), 3: F32(59.02), 2: F32(84.11)}
LARGEST = np.finfo(F32).max


def row_bytes(name: str, head_dim: int) -> int:
    bits, _ = FORMATS[name]
    if name in ("int4", "chan4", "chan2"):
        return head_dim * (bits + 1) // 8
    return head_dim * bits // 8 + (0 if name == "int8_static" else 2)


# ---- numbers


def bf16(x: np.ndarray, towards: str) -> np.ndarray:
    """float32 to bfloat16, "nearest", "up" or "down"; finite, and a zero is +0."""
    near = np.asarray(x, F32).astype(BF16)
    if towards != "nearest":
        wrong = near.astype(F32) < x if towards == "up" else near.astype(F32) > x
        infinity = BF16(np.inf if towards == "up" else -np.inf)
        near = np.where(wrong, np.nextafter(near, infinity), near)
    top = ml_dtypes.finfo(BF16).max
    near = np.clip(near.astype(F32), -F32(top), F32(top)).astype(BF16)
    return np.where(near == 0, BF16(0), near)


def exponents(absmax: np.ndarray) -> np.ndarray:
    _, exponent = np.frexp(absmax)
    return np.where(absmax == 0, -126, np.clip(exponent - 1, -126, 126)).astype(np.int32)


def times_power(x: np.ndarray, exponent: np.ndarray | int) -> np.ndarray:
    return (x * np.ldexp(F32(1), exponent).astype(F32)).astype(F32)


def inverse(x: np.ndarray) -> np.ndarray:
    return np.divide(F32(1), x, out=np.zeros_like(x), where=x != 0)


def sum16(x: np.ndarray) -> np.ndarray:
    """Lane l takes elements l, l + 16, ...; then halves."""
    lanes = np.zeros((*x.shape[:-1], 16), F32)
    for part in np.split(x, x.shape[-1] // 16, axis=-1):
        lanes = lanes + part
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


@cache
def signs(count: int) -> np.ndarray:
    mask = 2**64 - 1
    state, result = int.from_bytes(b"kvcore", "big"), []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        result.append(1 - 2 * ((z ^ z >> 31) >> 63))
    return np.array(result, F32)


def rotation_size(head_dim: int) -> int:
    return next(2**k for k in range(10, -1, -1) if head_dim % 2**k == 0)


def walsh_hadamard(x: np.ndarray) -> np.ndarray:
    """In blocks; pairs at distance 1, then 2, then 4, ... in x's own precision."""
    size = rotation_size(x.shape[-1])
    y = x.copy()
    indices = np.arange(x.shape[-1])
    h = 1
    while h < size:
        lower = indices[indices & h == 0]
        a, b = y[..., lower], y[..., lower + h]
        y[..., lower], y[..., lower + h] = a + b, a - b
        h *= 2
    return y


@cache
def hadamard_matrix(head_dim: int) -> np.ndarray:
    """[D, D] of 1, -1 and 0, from the definition: (-1)^popcount(i & j) within a block."""
    size = rotation_size(head_dim)
    i, j = np.indices((head_dim, head_dim))
    parity = i % size & j % size
    for shift in (8, 4, 2, 1):
        parity ^= parity >> shift
    parity &= 1
    return np.where(i // size == j // size, 1 - 2 * parity, 0).astype(F64)


# ---- planes


def planes(bits: int) -> list[int]:
    return {6: [4, 2], 3: [2, 1]}.get(bits, [bits])


@cache
def plane_places(head_dim: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The byte and the shift of each element in a plane."""
    byte, shift, per_unit = [], [], 128 // width
    for i in range(head_dim):
        unit = i // per_unit
        m = min(16, head_dim * width // 8 - 16 * unit)
        byte.append(16 * unit + i % per_unit % m)
        shift.append(width * (i % per_unit // m))
    return np.array(byte), np.array(shift)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    parts, low = [], 0
    for width in planes(bits):
        byte, shift = plane_places(codes.shape[-1], width)
        plane = np.zeros((len(codes), codes.shape[-1] * width // 8), np.uint8)
        for i, (b, s) in enumerate(zip(byte, shift, strict=True)):
            plane[:, b] |= ((codes[:, i] >> low & 2**width - 1) << s).astype(np.uint8)
        parts.append(plane)
        low += width
    return np.concatenate(parts, axis=1)


def unpack(data: np.ndarray, bits: int, head_dim: int) -> np.ndarray:
    codes, low, at = np.zeros((len(data), head_dim), np.int64), 0, 0
    for width in planes(bits):
        byte, shift = plane_places(head_dim, width)
        codes |= (data[:, at + byte].astype(np.int64) >> shift & 2**width - 1) << low
        low, at = low + width, at + head_dim * width // 8
    return codes


@cache
def channel_places(bits: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The byte and the shift of each [token, channel] of a group."""
    t, c = np.indices((32, head_dim))
    half = c >= head_dim // 2 if bits == 2 else np.zeros_like(c, bool)
    line = np.where(half, c - head_dim // 2, c) // 4
    return 64 * line + 4 * (t % 16) + c % 4, bits * (t // 16) + 4 * half


# ---- encoders


def encode(
    name: str, x: np.ndarray, bias: np.ndarray | None = None, scales: np.ndarray | None = None
) -> np.ndarray:
    x = np.asarray(x, F32)
    if bias is not None:
        with np.errstate(over="ignore"):
            x = np.clip(x - bias, -LARGEST, LARGEST)
    if name in CHANNEL_FORMATS:
        return _encode_groups(x.reshape(-1, 32, x.shape[-1]), CHANNEL_FORMATS[name][0])
    if name == "int8_static":
        with np.errstate(over="ignore"):
            return (np.rint(np.clip(x / scales, -127, 127)) + 128).astype(np.uint8)
    if name == "int4":
        return _encode_int4(x)
    bits, head_dim = FORMATS[name][0], x.shape[-1]
    e = exponents(np.abs(x).max(-1))
    y, n = times_power(x, -e[:, None]), 1
    if name in ROTATED:
        n = rotation_size(head_dim)
        y = walsh_hadamard(y * signs(head_dim))
    if bits in LEVELS:
        codes, scale = _choose(y, bits)
        stored = bf16(times_power(scale / F32(n), e), "nearest")
        return _rows(pack(codes, bits), stored)
    reach = F32({"int8": 127, "fp8_e4m3": 448, "rot8": 127, "rot6": 64}[name])
    stored = bf16(times_power(np.abs(y).max(-1) / reach / F32(n), e), "up")
    u = (
        y
        * inverse(times_power(stored.astype(F32), -e) * F32(n) * F32(2 if bits == 6 else 1))[
            :, None
        ]
    )
    if name == "fp8_e4m3":
        return _rows(u.astype(E4M3).view(np.uint8), stored)
    if name == "rot6":
        return _rows(pack(np.minimum(np.trunc(u + F32(32)), 63).astype(np.int64), 6), stored)
    return _rows((np.rint(u) + 128).astype(np.uint8), stored)


def _choose(y: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    levels = np.array(LEVELS[bits])
    rms = np.sqrt(sum16(y * y) / F32(y.shape[-1]))
    u = y * (UNIT[bits] * np.where(rms > 0, 1, 0) / np.where(rms > 0, rms, 1)).astype(F32)[:, None]
    number = np.searchsorted((levels[:-1] + levels[1:]) / 2, np.abs(u).astype(F64), side="right")
    level = levels[number]
    scale = sum16(np.abs(y) * level.astype(F32)) / (level * level).sum(-1).astype(F32)
    half = len(levels)
    return np.where(u >= 0, half + number, half - 1 - number), scale


def _range(
    x: np.ndarray, levels: int, clip: float = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, lo and step over the last axis."""
    e = exponents(np.abs(x).max(-1))
    y = times_power(x, -e[..., None])
    least, most = y.min(-1), y.max(-1)
    cut = (most - least) * F32(clip)
    least, most = least + cut, most - cut
    lo = bf16(times_power(least, e), "down")
    start = times_power(lo.astype(F32), -e)
    width = np.maximum(most - start, F32(0))
    step = bf16(times_power(width / F32(levels), e), "up")
    u = (y - start[..., None]) * inverse(times_power(step.astype(F32), -e))[..., None]
    return np.clip(np.rint(u), 0, levels).astype(np.int64), lo, step


def _encode_int4(x: np.ndarray) -> np.ndarray:
    codes, lo, step = _range(x.reshape(len(x), -1, 32), 15)
    return _rows(pack(codes.reshape(x.shape), 4), np.concatenate([lo, step], axis=1))


def _encode_groups(x: np.ndarray, bits: int) -> np.ndarray:
    groups, _, head_dim = x.shape
    clip = 0.075 if bits == 2 else 0
    codes, lo, step = _range(np.ascontiguousarray(x.transpose(0, 2, 1)), 2**bits - 1, clip)
    byte, shift = channel_places(bits, head_dim)
    data = np.zeros((groups, 32 * head_dim * bits // 8), np.uint8)
    for t in range(32):
        for c in range(head_dim):
            data[:, byte[t, c]] |= (codes[:, c, t] << shift[t, c]).astype(np.uint8)
    return _rows(data, np.concatenate([lo, step], axis=1))


def _rows(codes: np.ndarray, metadata: np.ndarray) -> np.ndarray:
    stored = np.ascontiguousarray(metadata).view(np.uint8).reshape(len(codes), -1)
    return np.concatenate([codes, stored], axis=1)


# ---- decoders: what the bytes mean, in float64 until the end


def split(name: str, data: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the codes, and the metadata as float64."""
    tokens = 32 if name in CHANNEL_FORMATS else 1
    at = tokens * head_dim * FORMATS[name][0] // 8
    return data[:, :at], np.ascontiguousarray(data[:, at:]).view(BF16).astype(F64)


def levels(name: str, data: np.ndarray, head_dim: int) -> np.ndarray:
    """float64 [T, D]: what the codes stand for."""
    bits = FORMATS[name][0]
    codes, _ = split(name, data, head_dim)
    if name in CHANNEL_FORMATS:
        byte, shift = channel_places(bits, head_dim)
        return (codes[:, byte] >> shift & 2**bits - 1).reshape(-1, head_dim).astype(F64)
    if name == "fp8_e4m3":
        return codes.view(E4M3).astype(F64)
    number = unpack(codes, bits, head_dim)
    if name in ROTATED and bits in LEVELS:
        half = np.array(LEVELS[bits], F64)
        return np.concatenate([-half[::-1], half])[number]
    if name == "rot6":
        return 2.0 * number - 63
    return number - (128.0 if bits == 8 else 0.0)


def ranges(name: str, data: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [T, D] each: minima and steps of int4 and the channel formats."""
    _, metadata = split(name, data, head_dim)
    lo, step = np.split(metadata, 2, axis=1)
    if name == "int4":
        return np.repeat(lo, 32, axis=1), np.repeat(step, 32, axis=1)
    return np.repeat(lo, 32, axis=0), np.repeat(step, 32, axis=0)


def decode(
    name: str,
    data: np.ndarray,
    head_dim: int,
    bias: np.ndarray | None = None,
    scales: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [T, D]: the exact product rounded once, and once more where a bias is added."""
    x = levels(name, data, head_dim)
    if name == "int4" or name in CHANNEL_FORMATS:
        lo, step = ranges(name, data, head_dim)
        x = lo + step * x
    elif name == "int8_static":
        x = x * np.asarray(scales, F64)
    else:
        x = x * split(name, data, head_dim)[1]
    if name in ROTATED:
        x = (x @ hadamard_matrix(head_dim)) * signs(head_dim)
    x = x.astype(F32)
    return x if bias is None else x + np.asarray(bias, F32)
