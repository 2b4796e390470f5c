"""Greedy texts of one model on two devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcore.models import Model


def follow(
    model: Model, other: Model, prompt: Sequence[int], count: int, **formats: Any
) -> tuple[float, list[float]]:
    """Continues a prompt on one device, shows the very tokens to the other, and compares.

    Args:
        model: chooses the tokens.
        other: the same model on another device.
        count: tokens to choose.
        formats: further arguments of `Model.cache_spec`.

    Returns:
        The largest difference between their logits, and of every token that the other would have
        chosen otherwise how much less likely it was to `model`, in logits.
    """
    sequences = []
    for each in (model, other):
        spec = each.cache_spec(**formats)
        length = len(prompt) + count
        counts = [pool.blocks_for(length, length) for pool in spec.pools]
        groups = len(spec.groups)
        cache = each.device.make_cache(spec, counts[:groups], counts[groups:] or None)
        sequences.append((each, cache, cache.sequence()))
    largest, ties = 0.0, []
    tokens = np.asarray(prompt)
    for _ in range(count):
        rows = []
        for each, cache, sequence in sequences:
            with cache.step([(sequence, len(tokens))]) as step:
                logits = each.decoder.forward(step, tokens)
            rows.append(each.device.get(logits)[0])
        chosen, others = (int(row.argmax()) for row in rows)
        largest = max(largest, float(np.abs(rows[0] - rows[1]).max()))
        if others != chosen:
            ties.append(float(rows[0][chosen] - rows[0][others]))
        tokens = np.asarray([chosen])
    return largest, ties
