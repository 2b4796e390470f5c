"""Random tiny models of transformers, and their logits next to kvcore's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import kvcore
from kvcore.models import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 90
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# Classes that are not called like their configurations.
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def random_model(
    family: str, changes: dict[str, Any], sizes: dict[str, Any] = SIZES, std: float = 0.15
) -> Any:
    """A transformers model whose weights are large enough that its logits say something."""
    config = getattr(transformers, f"{family}Config")(**(sizes | changes))
    model_class = CLASSES.get(family, f"{family}ForCausalLM")
    config._attn_implementation = "eager"  # others ignore soft caps and sinks
    config._experts_implementation = "eager"  # others have no float64
    torch.manual_seed(20)
    model = getattr(transformers, model_class)(config).float().eval()
    # Gemma's norms multiply by 1 + weight.
    norm = 0.0 if family.startswith("Gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            parameter.normal_(norm if is_norm else 0.0, std)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, std)
    return model


def logits_of(theirs: Any, ids: np.ndarray) -> np.ndarray:
    """transformers' logits at every position of one text."""
    with torch.no_grad():
        return theirs(torch.from_numpy(ids)[None]).logits[0].numpy()


def cached_logits(model: Model, ids: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    """Logits of every position, out of an fp32 cache, a chunk at a time and then one by one."""
    spec = model.cache_spec(block_size=16, k_format="fp32", v_format="fp32")
    cache = kvcore.KVCache(spec, num_blocks=16)
    sequence, out = cache.sequence(), []
    for chunk in [*chunks, *[1] * (len(ids) - sum(chunks))]:
        start = len(sequence)
        with cache.step([(sequence, chunk)]) as step:
            part = ids[start : start + chunk]
            out.append(model.decoder.forward(step, part, logits="all"))
    return np.concatenate(out)
