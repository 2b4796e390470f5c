from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvcore.models import ModelConfig, Rope


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    """A factory of small architectures: keywords replace the defaults."""

    def make(**changes: Any) -> ModelConfig:
        values: dict[str, Any] = {
            "family": "llama",
            "num_layers": 2,
            "hidden_size": 24,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "intermediate_size": 40,
            "vocab_size": 50,
            "max_context": 128,
            "norm_eps": 1e-5,
            "rope": Rope(16, 10000.0),
        }
        return ModelConfig(**(values | changes))

    return make
