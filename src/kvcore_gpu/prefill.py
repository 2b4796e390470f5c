"""The shape of prefill.cu's blocks, as kernels/prefill_layout.cuh has it."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.formats import Format

__all__ = ["MAX_HEAD_DIM", "Prefill", "serves"]

#: Longer rows of K or V are decode.cu's.
MAX_HEAD_DIM = 256
#: Of a sequence whose keys are cut, over all KV heads: about two for each multiprocessor.
MOST_BLOCKS = 256
#: Of each part of its keys. Its bits depend on both.
LEAST_KEYS = 1024


def serves(k_format: Format, v_format: Format, head_dim: int, head_dim_v: int) -> bool:
    """Whether prefill.cu can attend to such keys and values."""
    return (
        "fp32" not in (k_format.name, v_format.name) and max(head_dim, head_dim_v) <= MAX_HEAD_DIM
    )


@dataclass(frozen=True)
class Prefill:
    """A specialisation of prefill.cu.

    Attributes:
        k_format, v_format, head_dim, head_dim_v: as the layer has them; see `serves`.
        query_parts: 1 if q has K's dtype, or bfloat16 where K is quantized; else 2.
        options: whether a mask, positions, slopes, a window, a soft cap or no causality is asked
            for; sinks need none.
    """

    k_format: Format
    v_format: Format
    head_dim: int
    head_dim_v: int
    query_parts: int
    options: bool

    source = "prefill.cu"
    entry = "prefill"

    @property
    def is_quantized(self) -> bool:
        return self.k_format.is_quantized or self.v_format.is_quantized

    @property
    def _is_short(self) -> bool:
        return max(self.head_dim, self.head_dim_v) <= 128

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 query rows that a warp has."""
        return 2 if self._is_short and not self.options and self.query_parts == 1 else 1

    @property
    def keys(self) -> int:
        """Of a tile."""
        return 64 if self._is_short and not (self.is_quantized and self.row_tiles == 2) else 32

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 if self.row_tiles == 2 or self.query_parts == 2 else 256

    @property
    def rows(self) -> int:
        """Query rows of a block, (new token, query head) pairs of one KV head."""
        return self.threads // 32 * 16 * self.row_tiles

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        scalars = 4 * (2 * self.rows + 2 * self.keys) + 4 * (40 + 6 * self.threads // 32)
        query = self.query_parts * _tile_bytes(self.head_dim, self.rows)
        tiles = query + max(self._pass_bytes(encoded) for encoded in (True, False))
        sums = 4 * self.rows * _padded(self.head_dim_v)
        return scalars + max(tiles, sums)

    def _pass_bytes(self, encoded: bool) -> int:
        """A ring of two stages of K and V, and what encoded ones are expanded into."""
        total = 0
        for format, dim in ((self.k_format, self.head_dim), (self.v_format, self.head_dim_v)):
            tile = _tile_bytes(dim, self.keys)
            if format.is_quantized and encoded:
                total += 2 * self.keys * format.row_nbytes(dim) + tile
            else:
                total += 2 * tile
        return total

    def defines(self) -> dict[str, int]:
        """The macros to compile it with."""
        return {
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "K_FORMAT": self.k_format.index,
            "V_FORMAT": self.v_format.index,
            "OPTIONS": int(self.options),
            "QUERY_PARTS": self.query_parts,
            "MOST_BLOCKS": MOST_BLOCKS,
            "LEAST_KEYS": LEAST_KEYS,
            "SHARED_BYTES": self.shared_bytes,
        }

    def max_cut(self, num_rows: int, num_kv_heads: int, num_sequences: int, max_length: int) -> int:
        """Sequences at most whose keys are cut.

        Args:
            num_rows: query rows of a KV head of each sequence; 0: they differ.
            num_sequences: that have more than a few rows, at most.
            max_length: tokens of a sequence, at most.
        """
        tiles = max(1, -(-num_rows // self.rows))
        is_cut = 2 * tiles * num_kv_heads <= MOST_BLOCKS and max_length >= 2 * LEAST_KEYS
        return num_sequences if is_cut else 0


def max_sequences(num_sequences: int, num_tokens: int, max_new: int, few_tokens: int) -> int:
    """How many sequences can have more than `few_tokens` new tokens, if each has one or more and
    the longest max_new."""
    if max_new <= few_tokens:
        return 0
    spare = num_tokens - max_new - (num_sequences - 1)
    return 1 + min(num_sequences - 1, spare // few_tokens if few_tokens else num_sequences)


def _padded(head_dim: int) -> int:
    """Elements in whole steps of a product."""
    return (head_dim + 15) // 16 * 16


def _tile_bytes(head_dim: int, rows: int) -> int:
    """Rows of 16-bit numbers in shared memory, as kernels/tiles.cuh places them."""
    chunks = _padded(head_dim) // 8
    return 16 * rows * (chunks if chunks % 8 == 0 else chunks | 1)
