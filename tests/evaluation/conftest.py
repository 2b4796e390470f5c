"""A small random model, and results of made-up numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from byte_model import make_model
from kvcore.evaluation import Case, Evaluation, Result
from kvcore.evaluation.results import Recall, Sizes, TextResult
from kvcore.models import Model


@pytest.fixture(scope="session")
def model() -> Model:
    return make_model(head_dim=64)


def make_result(
    case: Case, bits: float = 16.0, kl: float = 0.0, extra: float | None = 0.0
) -> Result:
    return Result(
        case=case,
        sizes=Sizes(bits, bits + 1.5, bits + 0.05, int(bits * 1440), 200),
        texts={"a": TextResult(30.0, kl, 99.0), "b": TextResult(20.0, kl, 98.0)},
        perplexity=24.5,
        perplexity_change=-0.25,
        perplexity_change_error=0.125,
        kl=kl,
        agreement=98.5,
        recall=None if extra is None else Recall(1.5 + extra, extra, 78.0),
        error_mean=(0.01, 0.03),
        error_largest=(0.5, 0.25),
        tokens_per_second=47.0,
    )


@pytest.fixture
def found() -> Callable[..., Evaluation]:
    """An evaluation of (case, bits, KL, extra loss) in turn."""

    def make(*rows: tuple[Case, float, float, float | None]) -> Evaluation:
        results = tuple(make_result(*row) for row in rows)
        has_recall = all(result.recall is not None for result in results)
        reference = make_result(Case("fp32", "fp32"), 32.0, 0.0, 0.0 if has_recall else None)
        return Evaluation("tiny", 1024, 512, 512 * has_recall, "scalar kernels", reference, results)

    return make
