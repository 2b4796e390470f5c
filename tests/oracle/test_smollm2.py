"""SmolLM2 against transformers, position by position and token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvcore
from kvcore.models import Model

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")

TEXT = (
    "Once upon a time, there was a little girl named Emma. In 1984 she wrote: naïve café, 日本語, "
    "🙂🙂!\n\n  def f(x):\n\treturn x + 1  # and then the story goes on, much as one would expect."
)


def cached_logits(model: Model, ids: list[int]) -> np.ndarray:
    """Logits of every position: a chunk by BLAS, a chunk by the few-rows kernel, single tokens."""
    spec = model.cache_spec(k_format="fp32", v_format="fp32")
    cache = kvcore.KVCache(spec, num_blocks=4)
    sequence, out = cache.sequence(), []
    for chunk in (40, 12, *[1] * (len(ids) - 52)):
        start = len(sequence)
        with cache.step([(sequence, chunk)]) as step:
            part = ids[start : start + chunk]
            out.append(model.decoder.forward(step, part, logits="all"))
    return np.concatenate(out)


def test_logits_at_every_position(smollm2: Model, theirs: Any) -> None:
    model = smollm2
    ids = model.tokenizer.encode(TEXT)
    assert len(ids) > 60
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        exact = theirs.double()(torch.tensor([ids])).logits[0].numpy()
    theirs.float()
    rounding = np.abs(expected - exact).max()
    for name, logits in {
        "full": model.decoder.forward_full(ids),
        "cached": cached_logits(model, ids),
    }.items():
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4, err_msg=name)
        # Logits reach 40 here, so that float32 leaves an error of about 1e-4 in anyone's.
        assert np.abs(logits - exact).max() < 2 * rounding, name
        assert (logits.argmax(-1) == expected.argmax(-1)).all(), name


def test_greedy_tokens(smollm2: Model, theirs: Any) -> None:
    model = smollm2
    prompt = model.tokenizer.encode("The three largest cities of Europe are")
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None
    )[0].tolist()
    cache = kvcore.KVCache(model.cache_spec(k_format="fp32", v_format="fp32"), num_blocks=4)
    sequence, ids, new = cache.sequence(), list(prompt), list(prompt)
    for _ in range(32):
        with cache.step([(sequence, len(new))]) as step:
            logits = model.decoder.forward(step, new)
        new = [int(np.argmax(logits[0]))]
        ids += new
    assert ids == expected
