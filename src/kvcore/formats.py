"""The storage formats, as the core's formats.h lists them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvcore._native.blocks import format_table
from kvcore.errors import InvalidArgument, InvalidType


@dataclass(frozen=True)
class Format:
    """How one row (the K or V of one token and head) is stored.

    Attributes:
        name: "fp32", "fp16", "bf16", ...
        index: the format's number in the C core.
        element_bits: bits of one element.
        row_metadata_bytes: bytes a row carries beside its elements.
    """

    name: str
    index: int
    element_bits: int
    row_metadata_bytes: int

    def row_nbytes(self, head_dim: int) -> int:
        """Bytes of one row of `head_dim` elements."""
        return head_dim * self.element_bits // 8 + self.row_metadata_bytes

    @property
    def storage_dtype(self) -> np.dtype:
        """The NumPy dtype of stored elements; bfloat16 is kept as its uint16 bits."""
        return np.dtype(_STORAGE_DTYPES[self.name])


_STORAGE_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
_ALIASES = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}

FORMATS: dict[str, Format] = {
    name: Format(name, index, bits, metadata)
    for index, (name, bits, metadata) in enumerate(format_table())
}


def get_format(name: str, argument: str = "format") -> Format:
    """The format called `name`; `float16`, `bfloat16` and `float32` are accepted too.

    Raises:
        InvalidArgument: no format has this name.
    """
    if not isinstance(name, str):
        raise InvalidType(f"{argument}: expected a format's name, got {type(name).__name__}")
    found = FORMATS.get(_ALIASES.get(name, name))
    if found is None:
        raise InvalidArgument(f"{argument}: expected one of {', '.join(FORMATS)}, got {name!r}")
    return found
