from __future__ import annotations

import math

import numpy as np
import pytest

from kvcore.errors import InvalidArgument
from kvcore.models.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    Rope,
    RopeScaling,
    Rotation,
    YarnScaling,
    inverse_frequencies,
    yarn_attention_factor,
)

THETA, DIM = 500000.0, 64
PLAIN = [THETA ** (-2 * i / DIM) for i in range(DIM // 2)]


def test_plain_frequencies() -> None:
    inv_freq, factor = inverse_frequencies(Rope(DIM, THETA))
    np.testing.assert_allclose(inv_freq, PLAIN, rtol=1e-14)
    assert factor == 1.0


def test_linear_and_given_factors_divide() -> None:
    inv_freq, _ = inverse_frequencies(Rope(DIM, THETA, LinearScaling(4.0)))
    np.testing.assert_allclose(inv_freq, np.array(PLAIN) / 4, rtol=1e-14)
    factors = tuple(float(1 + i) for i in range(DIM // 2))
    inv_freq, _ = inverse_frequencies(Rope(DIM, THETA, FrequencyFactors(factors)))
    np.testing.assert_allclose(inv_freq, np.array(PLAIN) / factors, rtol=1e-14)


def test_llama3_by_wavelength() -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    expected, zones = [], set()
    for frequency in PLAIN:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
            zones.add("kept")
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
            zones.add("stretched")
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
            zones.add("blended")
    assert zones == {"kept", "stretched", "blended"}
    inv_freq, factor = inverse_frequencies(Rope(DIM, THETA, scaling))
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-12)
    assert factor == 1.0


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_by_rotations(truncate: bool) -> None:
    scaling = YarnScaling(
        factor=4.0, original_context=4096, attention_factor=1.25, truncate=truncate
    )

    def correction(rotations: float) -> float:
        return DIM * math.log(4096 / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = correction(32), correction(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    expected = []
    for i, frequency in enumerate(PLAIN):
        ramp = min(max((i - low) / (high - low), 0), 1)
        expected.append(frequency / 4 * ramp + frequency * (1 - ramp))
    inv_freq, factor = inverse_frequencies(Rope(DIM, THETA, scaling))
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-12)
    assert factor == 1.25


@pytest.mark.parametrize(
    ("theta", "scaling"),
    [
        (-1.0, None),
        (0.0, None),
        (math.nan, None),
        (math.inf, None),
        (THETA, LinearScaling(0.0)),
        (THETA, LinearScaling(-2.0)),
        (THETA, LinearScaling(math.nan)),
        (1.0, YarnScaling(4.0, 4096)),
        (THETA, YarnScaling(4.0, 4096, beta_slow=0.0)),
        (THETA, YarnScaling(4.0, 4096, attention_factor=math.nan)),
        (THETA, FrequencyFactors((1.0, 2.0))),
    ],
)
def test_impossible_frequencies(theta: float, scaling: RopeScaling | None) -> None:
    with pytest.raises(InvalidArgument, match="rope"):
        Rope(DIM, theta, scaling)


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_attention_factor(40.0, 1.0, 1.0) == 1.0
    expected = (0.0707 * math.log(40) + 1) / (0.1 * 0.5 * math.log(40) + 1)
    assert yarn_attention_factor(40.0, 0.707, 0.5) == pytest.approx(expected)


def test_rotation_turns_pairs_as_complex_numbers() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 2, DIM)).astype(np.float32)
    positions = np.array([0, 7, 100_000])
    inv_freq, _ = inverse_frequencies(Rope(DIM, THETA))
    pairs = x[..., : DIM // 2].astype(np.complex128) + 1j * x[..., DIM // 2 :]
    turned = 1.5 * pairs * np.exp(1j * positions[:, None, None] * inv_freq)
    out = np.empty_like(x)
    Rotation(np, positions, inv_freq, 1.5).apply(x.copy(), out)
    np.testing.assert_allclose(out, np.concatenate((turned.real, turned.imag), -1), atol=2e-6)


def test_elements_beyond_the_rotation_stay() -> None:
    x = np.random.default_rng(5).standard_normal((3, 2, DIM + 12)).astype(np.float32)
    inv_freq, factor = inverse_frequencies(Rope(DIM, THETA))
    rotation = Rotation(np, np.array([0, 7, 100_000]), inv_freq, factor)
    out, turned = np.full_like(x, np.nan), np.empty((3, 2, DIM), np.float32)
    rotation.apply(x[..., :DIM].copy(), turned)
    for rows in (slice(0, 1), slice(1, 3)):
        rotation.apply(x.copy(), out, rows)
    np.testing.assert_array_equal(out, np.concatenate((turned, x[..., DIM:]), axis=-1))


def test_factors_have_a_temperature() -> None:
    _, factor = inverse_frequencies(Rope(4, THETA, FrequencyFactors((1.0, 2.0), 1.5)))
    assert factor == 1.5
