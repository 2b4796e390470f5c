"""The shape of decode.cu's blocks, which kernels/decode_layout.cuh has too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcore.formats import GROUP_TOKENS, Format

__all__ = ["Decode", "fit", "serves"]

WARPS = 4
MAX_STAGES = 4
#: What the driver keeps of a multiprocessor's shared memory for each block.
RESERVED_BYTES = 1024
#: Shared memory of a block beside `Decode.shared_bytes`, at most.
STATIC_BYTES = 128


def serves(k_format: Format, v_format: Format) -> bool:
    """Whether decode.cu can attend to such keys and values."""
    return "fp32" not in (k_format.name, v_format.name)


@dataclass(frozen=True)
class Decode:
    """A specialisation of decode.cu.

    Attributes:
        k_format, v_format, head_dim, head_dim_v: as the layer has them; see `serves`.
        v_in_k: V is the first head_dim_v elements of K.
        query_parts: 1 if q has K's dtype, or bfloat16 where K is quantized; else 2.
        options: whether more than causality and a scale above 0 is asked for; sinks need nothing.
        stages: tiles in a warp's ring.
    """

    k_format: Format
    v_format: Format
    head_dim: int
    head_dim_v: int
    v_in_k: bool
    query_parts: int
    options: bool
    stages: int = 1

    source = "decode.cu"
    entry = "decode"
    threads = 32 * WARPS
    rows = 16

    @property
    def is_quantized(self) -> bool:
        return self.k_format.is_quantized or self.v_format.is_quantized

    @property
    def tile(self) -> int:
        """Keys of a tile; 16 of raw rows."""
        return GROUP_TOKENS if self.k_format.kind == "channel" else 16

    @property
    def slice_dim(self) -> int:
        """Elements of V that a block sums."""
        return -(-self.head_dim_v // 16) * 16 if self.head_dim_v <= 256 else 256

    @property
    def slices(self) -> int:
        """Blocks that share the elements of V."""
        return -(-self.head_dim_v // self.slice_dim)

    @property
    def blocks(self) -> int:
        """Blocks that are to share a multiprocessor, as far as registers go. Decoding codes takes
        many instructions, and more warps to hide how long each takes."""
        rows_alone = self.k_format.kind == self.v_format.kind == "row"
        longer = max(self.head_dim, self.head_dim_v)
        return 3 if longer <= 64 or (longer <= 128 and rows_alone and not self.options) else 2

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        scalars = 4 * (2 * self.rows + 3 * WARPS * self.rows)
        query = self.query_parts * _tile_bytes(self.head_dim, self.rows)
        ring = self.stages * self._stage_bytes(encoded=True)
        if self.is_quantized:
            ring = max(ring, self._stage_bytes(encoded=False))  # of raw rows
        sums = 4 * WARPS * self.rows * (self.slice_dim + 8)
        return scalars + query + max(WARPS * ring, sums)

    def _stage_bytes(self, encoded: bool) -> int:
        k = self._operand_bytes(self.k_format, self.head_dim, self.head_dim, encoded)
        if self.v_in_k:
            return k
        return k + self._operand_bytes(self.v_format, self.head_dim_v, self.slice_dim, encoded)

    def _operand_bytes(self, format: Format, dim: int, float_dim: int, encoded: bool) -> int:
        if not (format.is_quantized and encoded):
            return _tile_bytes(float_dim, self.tile if encoded else 16)
        codes = format.code_nbytes(dim)
        if format.kind == "row" and codes >= 32 and codes & (codes - 1) == 0:
            codes += 16  # rows lie in different banks
        return _round16(self.tile * codes) + _round16(self.tile * format.metadata_nbytes(dim))

    def defines(self) -> dict[str, int]:
        """The macros to compile it with."""
        return {
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "K_FORMAT": self.k_format.index,
            "V_FORMAT": self.v_format.index,
            "V_IN_K": int(self.v_in_k),
            "OPTIONS": int(self.options),
            "QUERY_PARTS": self.query_parts,
            "STAGES": self.stages,
            "MIN_BLOCKS": self.blocks,
            "SHARED_BYTES": self.shared_bytes,
        }


def fit(shape: Decode, shared_per_block: int) -> Decode | None:
    """The shape with the longest ring with which as many blocks share a multiprocessor as are to,
    or, where none is short enough, fewer; None where not even one block fits."""
    for blocks in range(shape.blocks, 0, -1):
        limit = (shared_per_block + RESERVED_BYTES) // blocks - RESERVED_BYTES - STATIC_BYTES
        for stages in range(MAX_STAGES, 1 if blocks > 1 else 0, -1):
            fitted = replace(shape, stages=stages)
            if fitted.shared_bytes <= limit:
                return fitted
    return None


def _tile_bytes(dim: int, rows: int) -> int:
    """Rows of 16-bit numbers in shared memory, as kernels/tiles.cuh places them."""
    chunks = (dim + 15) // 16 * 2
    return 16 * rows * (chunks if chunks % 8 == 0 else chunks | 1)


def _round16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16
