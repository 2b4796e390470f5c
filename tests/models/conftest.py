from __future__ import annotations

from collections.abc import Callable

import pytest

import tiny_families
from kvcore.models import ModelConfig


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    """A factory of small architectures: keywords replace the defaults."""
    return tiny_families.tiny_config
