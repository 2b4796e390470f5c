"""What is evaluated: pairs of formats, with and without raw rows, with and without a key bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcore.errors import InvalidArgument
from kvcore.evaluation.calibration import Calibration
from kvcore.formats import get_format

if TYPE_CHECKING:
    from kvcore.models import Model
    from kvcore.spec import CacheSpec

BIAS = "+bias"
RAW_CHOICES = ("both", "with", "without")


@dataclass(frozen=True)
class Case:
    """One way to store a model's keys and values.

    Attributes:
        k_format, v_format: as in `CacheSpec`.
        key_bias: subtract the calibrated mean key before keys are encoded.
        raw_first, raw_last: as in `CacheSpec`.
    """

    k_format: str
    v_format: str
    key_bias: bool = False
    raw_first: int = 0
    raw_last: int = 0

    @property
    def name(self) -> str:
        return f"{self.k_format}{BIAS if self.key_bias else ''}/{self.v_format}"

    @property
    def is_quantized(self) -> bool:
        return any(get_format(name).is_quantized for name in (self.k_format, self.v_format))

    @property
    def has_raw_rows(self) -> bool:
        """Whether raw rows were asked for; formats of sealed groups have some in any case."""
        return self.raw_first > 0 or self.raw_last > 0

    @property
    def calibrated(self) -> list[str]:
        """The fields of a `Calibration` that the case needs."""
        needed = {
            "key_bias": self.key_bias,
            "key_scales": self.k_format == "int8_static",
            "value_scales": self.v_format == "int8_static",
        }
        return [name for name, is_needed in needed.items() if is_needed]

    def spec(self, model: Model, block_size: int, calibration: Calibration | None) -> CacheSpec:
        """The cache of this case.

        Raises:
            InvalidArgument: it needs a calibration and there is none.
        """
        if calibration is None and self.calibrated:
            raise InvalidArgument(f"calibration: expected one, which {self.name} needs")
        options: dict[str, Any] = {name: getattr(calibration, name) for name in self.calibrated}
        if self.is_quantized:
            options |= {"raw_first": self.raw_first, "raw_last": self.raw_last}
        return model.cache_spec(block_size, self.k_format, self.v_format, **options)


def parse_cases(
    formats: str, raw: str = "both", raw_first: int = 4, raw_last: int = 32
) -> list[Case]:
    """Cases of a text like "rot4+bias/rot4,chan4/rot4,int8".

    Args:
        formats: pairs K/V, or one name for both; "+bias" behind the K format asks for a key bias.
        raw: "with" raw rows, "without", or "both", one after the other.
        raw_first, raw_last: which raw rows.

    Raises:
        InvalidArgument: naming what is wrong.
    """
    if raw not in RAW_CHOICES:
        raise InvalidArgument(f"raw: expected one of {', '.join(RAW_CHOICES)}, got {raw!r}")
    cases = []
    for pair in filter(None, (part.strip() for part in formats.split(","))):
        case = _parse_pair(pair)
        if raw != "with" or not case.is_quantized:
            cases.append(case)
        if raw != "without" and case.is_quantized:
            cases.append(Case(case.k_format, case.v_format, case.key_bias, raw_first, raw_last))
    if not cases:
        raise InvalidArgument("formats: expected at least one pair like rot8/rot8, got none")
    return list(dict.fromkeys(cases))


def _parse_pair(pair: str) -> Case:
    k_name, slash, v_name = pair.partition("/")
    k_format, plus, bias = k_name.partition("+")
    if f"{plus}{bias}" not in ("", BIAS):
        raise InvalidArgument(f"formats: expected K{BIAS}/V, got {pair!r}")
    v_format = v_name if slash else k_format
    names: Sequence[str] = [get_format(name, "formats").name for name in (k_format, v_format)]
    if plus and not get_format(names[0]).is_quantized:
        raise InvalidArgument(f"formats: expected {BIAS} on a quantized key format, got {pair!r}")
    if plus and names[0] == "int8_static":
        raise InvalidArgument(
            f"formats: expected int8_static without {BIAS}, as its scales are of whole keys, "
            f"got {pair!r}"
        )
    return Case(names[0], names[1], bool(plus))
