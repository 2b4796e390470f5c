"""Key bias and scales against what a cache holds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import kvcore
from kvcore import InvalidArgument
from kvcore.evaluation import Calibration, Text, calibrate

TEXTS = [Text("a", "It was the best of times. " * 8), Text("b", "Call me Ishmael. " * 5)]


def stored(model, text, length):
    """K and V [L, n, H, D] that a float32 cache holds after a text, one token at a time."""
    cache = kvcore.KVCache(model.cache_spec(k_format="fp32", v_format="fp32"), num_blocks=4)
    sequence = cache.sequence()
    for token in model.tokenizer.encode(text.text)[:length]:
        with cache.step([(sequence, 1)]) as step:
            model.decoder.forward(step, [token], logits="none")
    pairs = [sequence.read(layer) for layer in range(cache.spec.num_layers)]
    return (np.stack(side) for side in zip(*pairs, strict=True))


def test_statistics_are_of_what_is_cached(model):
    got = calibrate(model, TEXTS, length=100)
    (k_a, v_a), (k_b, v_b) = (stored(model, text, 100) for text in TEXTS)
    assert got.num_tokens == k_a.shape[1] + k_b.shape[1] == 185
    k, v = np.concatenate([k_a, k_b], 1), np.concatenate([v_a, v_b], 1)
    np.testing.assert_allclose(got.key_bias, k.mean(1), rtol=2**-8, atol=1e-5)
    np.testing.assert_array_equal(got.key_bias, got.key_bias.astype(ml_dtypes.bfloat16))
    np.testing.assert_allclose(got.key_scales, abs(k).max(1) / 127, rtol=1e-4)
    np.testing.assert_allclose(got.value_scales, abs(v).max(1) / 127, rtol=1e-4)
    assert got.key_bias.dtype == got.key_scales.dtype == got.value_scales.dtype == np.float32


def test_files(model, tmp_path):
    path = str(tmp_path / "tiny.npz")
    written = calibrate(model, TEXTS[:1])
    written.save(path)
    read = Calibration.load(path)
    for name, value in vars(written).items():
        np.testing.assert_array_equal(getattr(read, name), value)
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {"key_bias", "key_scales", "value_scales", "source", "num_tokens"}


def test_files_that_are_something_else(model, tmp_path):
    path = tmp_path / "other.npz"
    with pytest.raises(InvalidArgument, match=r"--calibrate` wrote at .*other"):
        Calibration.load(str(path))
    path.write_bytes(b"text")
    with pytest.raises(InvalidArgument, match="--calibrate` wrote"):
        Calibration.load(str(path))
    np.savez(path, key_bias=np.zeros(3))
    with pytest.raises(InvalidArgument, match="--calibrate` wrote"):
        Calibration.load(str(path))
    with pytest.raises(InvalidArgument, match="can be written"):
        calibrate(model, TEXTS[:1]).save(str(tmp_path / "missing" / "file.npz"))


def test_no_text(model):
    with pytest.raises(InvalidArgument, match="texts: expected at least one, got none"):
        calibrate(model, [])
    with pytest.raises(InvalidArgument, match="at least one token in empty"):
        calibrate(model, [Text("empty", "")])
