"""What all tests share: hypothesis profiles. Markers and warnings are set in pyproject.toml."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Shared machines stall: a test that takes long is not thereby wrong.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}

settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("quick", max_examples=20, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
