"""How a call of attend computes: the options that users give, and the CPU's reading of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcore import arrays, checks
from kvcore._native import attention
from kvcore.errors import InvalidArgument, InvalidType

if TYPE_CHECKING:
    from kvcore._native.blocks import Plan

#: The largest float32.
MAX_FLOAT = 3.4028234663852886e38
#: The smallest float32 above 0 that is not denormal.
MIN_SOFTCAP = 2.0**-126
MAX_INT32 = 2**31 - 1


# Not frozen, which would cost every call a microsecond.
@dataclass(slots=True)
class AttendOptions:
    """How a call of attend computes, in the order in which the options act.

    i is where a query stands in its sequence, from 0, and j where a key does: `positions` for the
    new tokens, or else where a token is stored. docs/numerics.md has the arithmetic.

    Attributes:
        scale: s = (q . k) * scale; None means 1 / sqrt(head_dim).
        exact: never take a path whose bits depend on how a prompt was chunked. bf16 has one, on
            the instruction set "avx512_bf16", within 2e-3 instead of 2e-6; and quantized formats,
            which few query rows read undecoded: on "avx512_vnni" within 2e-4, else 2e-6.
        softcap: s = softcap * tanh(s / softcap), softcap > 0.
        alibi_slopes: float32 [Hq]; s -= slope * (i - j).
        causal: a token sees what is stored before it and itself; False: everything.
        mask: for each sequence a boolean [new tokens, seq_len], True where a token sees a key, or
            the same as bits, uint8 [new tokens, ceil(seq_len / 8)], the lowest bit of a byte first,
            or None; a mask stands instead of causality.
        window: of all that, only i - window < j <= i; at least 1.
        positions: int32 [T], from 0, for alibi_slopes and window.
        sinks: float32 [Hq], one more logit in a softmax's denominator, without a value.
    """

    scale: float | None = None
    exact: bool = False
    softcap: float | None = None
    alibi_slopes: Any | None = None
    causal: bool = True
    mask: Sequence[Any] | None = None
    window: int | None = None
    positions: Any | None = None
    sinks: Any | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            _check_number(self.scale, "scale", "a finite float32", -MAX_FLOAT)
        if self.softcap is not None:
            _check_number(self.softcap, "softcap", "a finite float32 above 0", MIN_SOFTCAP)
        if self.window is not None:
            checks.integer(self.window, "window", 1, MAX_INT32)
        if self.causal is not True and not isinstance(self.causal, (bool, np.bool_)):
            raise InvalidType(f"causal: expected a bool, got {type(self.causal).__name__}")

        if self.mask is not None and not isinstance(self.mask, Sequence | np.ndarray):
            raise InvalidType(
                "mask: expected a list with a boolean array or None for each sequence, "
                f"got {type(self.mask).__name__}"
            )

    @property
    def is_narrowed(self) -> bool:
        """Whether a token may see less than what is stored before it."""
        return self.window is not None or self.mask is not None

    def has_mask(self, s: int) -> bool:
        """Whether sequence s has a mask."""
        return self.mask is not None and s < len(self.mask) and self.mask[s] is not None

    def scale_for(self, head_dim: int) -> float:
        return 1.0 / math.sqrt(head_dim) if self.scale is None else float(self.scale)


def _check_number(value: Any, argument: str, expected: str, low: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidType(f"{argument}: expected a number, got {type(value).__name__}")
    if not low <= float(value) <= MAX_FLOAT:
        raise InvalidArgument(f"{argument}: expected {expected}, got {value}")


def per_head(value: Any | None, argument: str, num_heads: int) -> np.ndarray | None:
    """One finite float32 for each query head, dense."""
    if value is None:
        return None
    array = arrays.from_list(value, argument)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise InvalidType(f"{argument}: expected float32, got {array.dtype}")
    checks.shape(array.shape, (num_heads,), argument, "[Hq]")
    with np.errstate(over="ignore"):
        result = arrays.dense(array, np.float32)
    if not np.isfinite(result).all():
        raise InvalidArgument(f"{argument}: expected finite float32 values, got {array}")
    return result


def token_positions(value: Any | None, num_tokens: int) -> np.ndarray | None:
    """One position from 0 for each new token, dense int32."""
    if value is None:
        return None
    result = arrays.as_index(value, "positions", 1)
    checks.shape(result.shape, (num_tokens,), "positions", "[T]")
    if result.size and result.min() < 0:
        raise InvalidArgument(f"positions: expected at least 0, got {result.min()}")
    return result


def check_sight(
    plan: Plan,
    num_blocks: int,
    options: AttendOptions,
    positions: np.ndarray | None,
    mask: np.ndarray | None,
    mask_offsets: np.ndarray | None,
) -> None:
    """Raises if a new token sees a block that is not there; for backends that cannot say it.

    Raises:
        TokensReleased: the block was released, or is -1 in a caller's table.
    """
    window = options.window or 0
    attention.check_sight(
        plan, num_blocks, bool(options.causal), window, positions, mask, mask_offsets
    )


def packed_mask(
    value: Sequence[Any] | None, plan: Plan
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """All masks as bits in one uint8 array, and int64 [S]: where each starts, -1 for none."""
    if value is None:
        return None, None
    count = plan.num_sequences
    if len(value) != count:
        raise InvalidArgument(f"mask: expected {count} entries [S], got {len(value)}")
    offsets = np.full(count, -1, np.int64)
    parts = []
    size = 0
    shapes = zip(np.diff(plan.query_starts).tolist(), plan.seq_lens.tolist(), strict=True)
    for s, (entry, (num_new, seq_len)) in enumerate(zip(value, shapes, strict=True)):
        if entry is None:
            continue
        bits = _mask_bits(arrays.from_list(entry, f"mask[{s}]"), f"mask[{s}]", num_new, seq_len)
        offsets[s] = size
        size += bits.size
        parts.append(bits.reshape(-1))
    if not parts:
        return None, None
    return parts[0] if len(parts) == 1 else np.concatenate(parts), offsets


def _mask_bits(array: np.ndarray, argument: str, num_new: int, seq_len: int) -> np.ndarray:
    """uint8 [num_new, ceil(seq_len / 8)], dense."""
    if array.dtype == np.uint8:
        checks.shape(
            array.shape,
            (num_new, -(-seq_len // 8)),
            argument,
            "[new tokens, ceil(seq_len / 8)], bits",
        )
        return arrays.dense(array)
    if array.dtype != np.bool_:
        raise InvalidType(f"{argument}: expected bool, or uint8 bits, got {array.dtype}")
    checks.shape(array.shape, (num_new, seq_len), argument, "[new tokens, seq_len]")
    return np.packbits(array, axis=1, bitorder="little")
