"""GroupSpec, and the pool of a group's raw rows: how many blocks a sequence holds in each."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore import checks
from kvcore.errors import InvalidArgument

MIN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 4096
MAX_SLOTS = 2**31 - 1
#: Token slots of a block of raw rows, and the tokens that chan4 and chan2 encode together.
RAW_BLOCK_SIZE = 32


@dataclass(frozen=True)
class GroupSpec:
    """Layers that share one pool of blocks and one block table per sequence.

    A token of a layer with a window of w reads w tokens, itself included; a group of such layers
    has retention=w. A commit at length n then releases every block that lies wholly below token
    n - retention + 1 - slack. After a step a sequence can be truncated or forked as far back as it
    still holds all that its next token reads there: by `slack` tokens, or whatever the last block
    adds.

    Attributes:
        block_size: token slots of a block, a power of two from 16 to 4096.
        retention: the widest window that `attend` may be given; None: every token is kept.
        slack: tokens kept beyond the retention, and raw rows beyond `raw_last`, for steps that are
            to be taken back in part, as in speculative decoding. Nothing where both are missing.
    """

    block_size: int = 64
    retention: int | None = None
    slack: int = 0

    def __post_init__(self) -> None:
        size = checks.integer(self.block_size, "block_size", MIN_BLOCK_SIZE, MAX_BLOCK_SIZE)
        if size & (size - 1):
            raise InvalidArgument(f"block_size: expected a power of two, got {size}")
        if self.retention is not None:
            checks.integer(self.retention, "retention", 1, MAX_SLOTS)
        checks.integer(self.slack, "slack", 0, MAX_SLOTS)

    def blocks_for(self, num_tokens: int, num_new: int = 1) -> int:
        """The most blocks that one sequence holds while it grows to `num_tokens` tokens.

        Args:
            num_tokens: its length in the end.
            num_new: the most tokens that a step adds to it.
        """
        checks.integer(num_tokens, "num_tokens", 0)
        checks.integer(num_new, "num_new", 1)
        columns = -(-num_tokens // self.block_size)
        if self.retention is None:
            return columns
        # What is kept before a step and the new tokens, wherever blocks begin.
        span = self.retention - 1 + self.slack + num_new
        return min(columns, (span + self.block_size - 2) // self.block_size + 1)

    def first_kept(self, num_tokens: int) -> int:
        """The first token that a sequence holds after it has grown to `num_tokens`."""
        if self.retention is None:
            return 0
        first = max(0, num_tokens - self.retention + 1 - self.slack)
        return first // self.block_size * self.block_size

    def blocks_held(self, num_tokens: int) -> int:
        """The blocks that one sequence holds after it has grown to `num_tokens`."""
        columns = -(-checks.integer(num_tokens, "num_tokens", 0) // self.block_size)
        return columns - self.first_kept(num_tokens) // self.block_size


@dataclass(frozen=True)
class RawPool(GroupSpec):
    """The pool of a group's raw rows: it keeps the last ones, as its retention says, and the first.

    Attributes:
        group: the group whose rows they are.
        num_first: blocks at a sequence's start that are never released.
    """

    group: int = 0
    num_first: int = 0

    def blocks_for(self, num_tokens: int, num_new: int = 1) -> int:
        columns = -(-num_tokens // self.block_size)
        return min(columns, super().blocks_for(num_tokens, num_new) + self.num_first)

    def blocks_held(self, num_tokens: int) -> int:
        released = self.first_kept(num_tokens) // self.block_size
        return super().blocks_held(num_tokens) + min(released, self.num_first)

    def most_new(self, num_blocks: int) -> int:
        """The most tokens that a step may add to one sequence of any length; 0 or less: none."""
        assert self.retention is not None
        spare = (num_blocks - self.num_first - 1) * self.block_size
        return spare + 1 - (self.retention - 1 + self.slack)
