"""The shape of simt.cu's blocks."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.formats import Format

__all__ = ["Simt", "rows_for"]

WARPS = 4


@dataclass(frozen=True)
class Simt:
    """A specialisation of simt.cu.

    Attributes:
        k_format, v_format, head_dim, head_dim_v: as the layer has them.
        rows: query rows of a block, which share what it reads.
        options: whether anything but causality and a scale is asked for; sinks need nothing.
    """

    k_format: Format
    v_format: Format
    head_dim: int
    head_dim_v: int
    rows: int
    options: bool

    source = "simt.cu"
    entry = "simt"
    threads = 32 * WARPS
    slices = 1

    @property
    def streams(self) -> int:
        """Keys of a block that are summed apart."""
        longer = max(self.head_dim, self.head_dim_v)
        lanes = 8 if longer <= 64 else 16 if longer <= 128 else 32
        return self.threads // lanes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        row = self.head_dim + 1 + self.streams * (self.head_dim_v + 2)
        return 4 * self.rows * row

    def defines(self) -> dict[str, int]:
        """The macros to compile it with."""
        return {
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "K_FORMAT": self.k_format.index,
            "V_FORMAT": self.v_format.index,
            "OPTIONS": int(self.options),
            "TILE_ROWS": self.rows,
        }


def rows_for(group: int, head_dim: int, head_dim_v: int) -> int:
    """Rows of a block: those of a token share its keys, as far as registers go."""
    longer = max(head_dim, head_dim_v)
    most = 4 if longer <= 256 else 2 if longer <= 512 else 1
    return min(most, 4 if group >= 3 else group)
