"""Small random models in place of SmolLM2."""

from __future__ import annotations

import pytest

from byte_model import make_model


@pytest.fixture(scope="session")
def tiny_model():
    return make_model()


@pytest.fixture(scope="session")
def windowed_model():
    return make_model(windows=(40, None))
