"""Texts to run models over: seven short excerpts in the public domain, or files of the caller's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import InvalidArgument

if TYPE_CHECKING:
    from kvcore.models import Model

TESTED = ("sotu-1862", "sotu-1941", "moby-dick-42", "kjv-1-samuel-17")
CALIBRATING = ("calibration-sotu-1905", "calibration-moby-dick-1", "calibration-kjv-ruth")


@dataclass(frozen=True)
class Text:
    """A text and what to call it."""

    name: str
    text: str


def packaged_texts(names: Iterable[str] = TESTED) -> list[Text]:
    """Excerpts that come with kvcore, a little over 1,024 tokens each (docs/accuracy.md)."""
    folder = files("kvcore.evaluation") / "data"
    return [Text(name, (folder / f"{name}.txt").read_text(encoding="utf-8")) for name in names]


def read_texts(paths: Iterable[str]) -> list[Text]:
    """Files of UTF-8 text.

    Raises:
        InvalidArgument: a file cannot be read.
    """
    texts = []
    for path in map(Path, paths):
        try:
            texts.append(Text(path.name, path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InvalidArgument(
                f"texts: expected a readable text file at {path}: {reason}"
            ) from None
    return texts


def encode_text(model: Model, text: Text, length: int) -> NDArray[np.int32]:
    """The first `length` tokens of a text, int32 [length].

    Raises:
        InvalidArgument: the text is shorter.
    """
    tokens = model.tokenizer.encode(text.text)
    if len(tokens) < length:
        raise InvalidArgument(
            f"length: expected at most the {len(tokens)} tokens of {text.name}, got {length}; "
            "give longer texts"
        )
    return np.asarray(tokens[:length], np.int32)
