"""The storage formats, as the core's formats.h lists them; docs/formats.md defines their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvcore._native.blocks import format_table
from kvcore.errors import InvalidArgument, InvalidType

#: Tokens of a sealed group: what formats of kind "channel" encode at once.
GROUP_TOKENS = 32


@dataclass(frozen=True)
class Format:
    """How the K or V of one token and head is stored.

    Attributes:
        name: "fp32", "fp16", "bf16", "int8", ...
        index: the format's number in the C core.
        kind: "float"; "row", where each token is encoded alone; or "channel", where a group of 32
            tokens is encoded channel by channel.
        element_bits: bits of one element's code.
        element_metadata_bits: bits of metadata that come to one element.
        row_metadata_bytes: bytes of metadata that come to one row.
        head_dim_multiple: what head_dim must be a multiple of.
    """

    name: str
    index: int
    kind: Literal["float", "row", "channel"]
    element_bits: int
    element_metadata_bits: int
    row_metadata_bytes: int
    head_dim_multiple: int

    def code_nbytes(self, head_dim: int) -> int:
        """Bytes of the codes of one row of `head_dim` elements."""
        return head_dim * self.element_bits // 8

    def metadata_nbytes(self, head_dim: int) -> int:
        """Bytes of metadata (scales, minima, steps) that come to one row."""
        return head_dim * self.element_metadata_bits // 8 + self.row_metadata_bytes

    def row_nbytes(self, head_dim: int) -> int:
        """Bytes of one row, its metadata included."""
        return self.code_nbytes(head_dim) + self.metadata_nbytes(head_dim)

    def bits_per_element(self, head_dim: int) -> float:
        """Bits of one element, its share of the metadata included."""
        return self.row_nbytes(head_dim) * 8 / head_dim

    @property
    def is_quantized(self) -> bool:
        """Whether codes and metadata are stored instead of floats."""
        return self.kind != "float"

    @property
    def storage_dtype(self) -> np.dtype:
        """The NumPy dtype that is stored: bytes where quantized; bfloat16 as its uint16 bits."""
        return np.dtype(_STORAGE_DTYPES.get(self.name, np.uint8))

    def check_head_dim(self, head_dim: int, argument: str = "head_dim") -> None:
        """Raises unless rows of `head_dim` elements can be stored.

        Raises:
            InvalidArgument: it is not a multiple of `head_dim_multiple`.
        """
        if head_dim <= 0 or head_dim % self.head_dim_multiple:
            raise InvalidArgument(
                f"{argument}: expected a multiple of {self.head_dim_multiple}, as {self.name} "
                f"stores units of so many elements, got {head_dim}"
            )


_KINDS: tuple[Literal["float", "row", "channel"], ...] = ("float", "row", "channel")
_STORAGE_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
_ALIASES = {
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "fp8": "fp8_e4m3",
    "float8_e4m3fn": "fp8_e4m3",
}

FORMATS: dict[str, Format] = {
    name: Format(name, index, _KINDS[kind], *sizes)
    for index, (name, kind, *sizes) in enumerate(format_table())
}


def get_format(name: str, argument: str = "format") -> Format:
    """The format called `name`; `float16`, `bfloat16`, `fp8` and the like are accepted too.

    Raises:
        InvalidArgument: no format has this name.
    """
    if not isinstance(name, str):
        raise InvalidType(f"{argument}: expected a format's name, got {type(name).__name__}")
    found = FORMATS.get(_ALIASES.get(name, name))
    if found is None:
        raise InvalidArgument(f"{argument}: expected one of {', '.join(FORMATS)}, got {name!r}")
    return found
