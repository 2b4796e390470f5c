"""What every reader of model files shares: typed look-ups that name the file and the key."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from kvcore.errors import MissingExtra, ModelFileError

T = TypeVar("T", int, float, str, bool)

_KIND_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


class Fields:
    """Keys and values of a model file, read with the type that the caller expects.

    Args:
        file: named in every message.
        values: what the file holds. A value of None counts as absent.
    """

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is, or the default when it is absent."""
        value = self.values.get(key)
        return default if value is None else value

    def typed(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value as a `kind`; ModelFileError when it is another, or absent and no default."""
        value = self.get(key, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and number:
            return kind(value)
        if kind is int and number and value == int(value):
            return kind(value)
        if kind in (str, bool) and isinstance(value, kind):
            return value
        came = "nothing" if value is None else repr(value)[:80]
        raise self.error(key, _KIND_NAMES[kind], came)

    def nullable(self, key: str, kind: type[T], default: T | None) -> T | None:
        """The value as a `kind`; None when the file says so, the default when it is absent."""
        if key in self.values and self.values[key] is None:
            return None
        return default if key not in self.values else self.typed(key, kind)

    def positive(self, key: str, default: int | None = None) -> int:
        """The value as an integer above 0."""
        value = self.typed(key, int, default)
        if value <= 0:
            raise self.error(key, "a positive integer", value)
        return value

    def error(self, key: str, expected: str, came: object) -> ModelFileError:
        """A ModelFileError about one key."""
        return ModelFileError(f"{self.file}: {key}: {expected} expected, got {came}")


def require(module: str, package: str | None = None) -> Any:
    """Imports a module of the "models" extra, or raises MissingExtra with the command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"reading this model needs the package {package or module}: "
            'pip install "kvcore[models]"'
        ) from error
