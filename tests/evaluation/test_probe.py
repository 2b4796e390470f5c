"""A whole evaluation of a small random model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import kvcore
from kvcore import InvalidArgument
from kvcore.evaluation import Case, Text, calibrate, evaluate, packaged_texts, parse_cases

LENGTH = 150
TEXTS = packaged_texts()[:2]
BF16 = Case("bf16", "bf16")


def logits_of(model, tokens, case):
    """The logits [n, vocab] of a text, token by token out of a cache."""
    cache = kvcore.KVCache(case.spec(model, 16, None), num_blocks=20)
    sequence, rows = cache.sequence(), []
    for token in tokens:
        with cache.step([(sequence, 1)]) as step:
            rows.append(model.decoder.forward(step, [token])[0])
    return np.stack(rows).astype(np.float64)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_numbers_are_those_of_the_formulas(model):
    found = evaluate(model, [BF16], TEXTS, length=LENGTH, chunk=64, recall_length=0)
    [result] = found.results
    nll, reference_nll, kl, agrees = [], [], [], []
    for text in TEXTS:
        tokens = model.tokenizer.encode(text.text)[:LENGTH]
        p = log_softmax(logits_of(model, tokens, Case("fp32", "fp32")))
        q = log_softmax(logits_of(model, tokens, BF16))
        places = np.arange(LENGTH - 1), tokens[1:]
        nll.append(-q[places])
        reference_nll.append(-p[places])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agrees.append(p.argmax(-1) == q.argmax(-1))
        assert result.texts[text.name].kl == pytest.approx(kl[-1].mean(), rel=0.02)
    assert found.reference.perplexity == pytest.approx(np.exp(np.mean(reference_nll)), rel=1e-4)
    assert result.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert result.kl == pytest.approx(np.mean(kl), rel=0.02)
    assert result.agreement == pytest.approx(100 * np.mean(agrees), abs=0.7)
    assert result.recall is None
    assert result.sizes.bits_per_element == 16
    assert result.sizes.bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert 0 < max(result.error_mean) < max(result.error_largest) < 0.1


def test_float32_loses_nothing(model):
    found = evaluate(model, [Case("fp32", "fp32")], TEXTS, length=LENGTH, recall_length=40)
    [result] = found.results
    assert result.kl == result.perplexity_change == result.recall.extra == 0
    assert result.agreement == 100
    assert result.error_largest == (0, 0)
    assert result.recall == found.reference.recall
    assert result.perplexity == found.reference.perplexity


def without_speed(result):
    return dataclasses.replace(result, tokens_per_second=0.0)


def test_cases_do_not_disturb_one_another(model):
    options = {"texts": TEXTS[:1], "length": LENGTH, "chunk": 64, "recall_length": 40}
    cases = [Case("fp16", "fp16"), BF16]
    together = evaluate(model, cases, **options)
    alone = [evaluate(model, [case], **options).results[0] for case in cases]
    assert list(map(without_speed, together.results)) == list(map(without_speed, alone))


def test_recall_is_of_the_second_copy(model):
    """Where nothing was seen before, a random model knows no token."""
    found = evaluate(model, [BF16], TEXTS, length=LENGTH, recall_length=60)
    assert found.reference.recall.nll == pytest.approx(np.log(256), rel=0.5)
    assert found.recall_length == 60


def test_progress_reaches_its_end(model):
    calls = []
    evaluate(
        model, [BF16], TEXTS[:1], length=100, chunk=40, recall_length=30,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (440, 440)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "length: expected 2 to 499, got 1"),
        ({"length": 500}, "length: expected 2 to 499, got 500"),
        ({"recall_length": 250}, "recall_length: expected 0 to 249, got 250"),
        ({"chunk": 0}, "chunk: expected at least 1"),
        ({"texts": []}, "texts: expected at least one"),
        ({"texts": [*TEXTS, TEXTS[0]]}, "with different names"),
        ({"texts": [Text("a", "short")]}, "at most the 5 tokens of a, got 100"),
    ],
)
def test_bad_arguments(model, changes, message):
    options = {"texts": TEXTS, "length": 100, "recall_length": 20, **changes}
    with pytest.raises(InvalidArgument, match=message):
        evaluate(model, [BF16], **options)


@pytest.fixture(scope="module")
def quantized(model):
    """Results by case of a text in steps of 64 tokens."""
    pairs = ("rot8+bias/rot8", "chan4/rot4", "int8_static/int8", "rot4/rot4")
    cases = parse_cases(",".join(pairs))
    found = evaluate(
        model, cases, TEXTS, length=LENGTH, chunk=64, recall_length=40,
        calibration=calibrate(model),
    )  # fmt: skip
    return {(result.case.name, result.case.has_raw_rows): result for result in found.results}


def test_fewer_bits_cost_more(quantized):
    names = ("rot8+bias/rot8", "rot4/rot4")
    for has_raw in (False, True):
        wide, narrow = (quantized[name, has_raw] for name in names)
        assert 0 < 10 * wide.kl < narrow.kl
        assert wide.error_mean < narrow.error_mean
        assert (wide.sizes.bits_per_element, narrow.sizes.bits_per_element) == (8.25, 4.25)
        assert wide.recall.extra < 0.1


def test_raw_rows_help_and_cost(quantized):
    for name in {name for name, _ in quantized}:
        without, with_raw = quantized[name, False], quantized[name, True]
        assert with_raw.kl < without.kl
        assert np.mean(with_raw.error_mean) < np.mean(without.error_mean)
        assert with_raw.sizes.bits_per_element == without.sizes.bits_per_element
        assert with_raw.sizes.bits_at_length > without.sizes.bits_at_length
        assert with_raw.sizes.bits_at_32k < without.sizes.bits_at_32k + 0.1


@pytest.mark.parametrize("chunk", [40, LENGTH])
def test_steps_do_not_matter(model, quantized, chunk):
    cases = parse_cases("chan4/rot4,rot4/rot4")
    found = evaluate(model, cases, TEXTS, length=LENGTH, chunk=chunk, recall_length=40)
    for result in found.results:
        other = quantized[result.case.name, result.case.has_raw_rows]
        assert result.kl == pytest.approx(other.kl, rel=1e-3)
        np.testing.assert_allclose(result.error_mean, other.error_mean, rtol=1e-3)
        assert result.recall.nll == pytest.approx(other.recall.nll, rel=1e-4)
