"""What formats cost in accuracy: real text through a real model, by the public interface alone.

`evaluate` runs a model over caches in several formats, beside one in float32 that all are compared
with; `calibrate` computes the constants that some formats want.
"""

from __future__ import annotations

from kvcore.evaluation.calibration import Calibration, calibrate
from kvcore.evaluation.cases import Case, parse_cases
from kvcore.evaluation.probe import evaluate
from kvcore.evaluation.results import Evaluation, Result
from kvcore.evaluation.texts import Text, packaged_texts, read_texts

__all__ = [
    "Calibration",
    "Case",
    "Evaluation",
    "Result",
    "Text",
    "calibrate",
    "evaluate",
    "packaged_texts",
    "parse_cases",
    "read_texts",
]
