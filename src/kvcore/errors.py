"""The exceptions of kvcore: one tree, and one table from C statuses to them."""

from __future__ import annotations


class KVCoreError(Exception):
    """The root of every exception that kvcore raises on purpose."""


class InvalidArgument(KVCoreError, ValueError):
    """An argument has a value, shape or layout that the call does not accept."""


class InvalidType(KVCoreError, TypeError):
    """An argument has a type or dtype that the call does not accept."""


class NotFinite(InvalidArgument):
    """A NaN or an infinity was to be stored in a quantized format, which has none."""


class OutOfBlocks(KVCoreError):
    """A pool has too few blocks for what was asked; nothing was changed.

    Attributes:
        group: the group whose pool is short, or the number of a pool of raw rows.
        needed: blocks that the call needs.
        available: blocks that are free or cached.
        raw_of: the group whose raw rows lie in the pool; None: it is a group's own.
    """

    def __init__(self, group: int, needed: int, available: int, raw_of: int | None = None) -> None:
        counts = f"{needed} blocks needed, {available} available (free or cached); "
        if raw_of is None:
            text = (
                f"group {group}: {counts}free or truncate sequences, or create the cache with more "
                "blocks"
            )
        else:
            text = (
                f"raw rows of group {raw_of}: {counts}add fewer tokens in one step, free "
                "sequences, or create the cache with more num_raw_blocks"
            )
        super().__init__(text)
        self.group = group
        self.needed = needed
        self.available = available
        self.raw_of = raw_of


class SequenceError(KVCoreError):
    """A sequence cannot be used the way the call asks."""


class SequenceFreed(SequenceError):
    """The sequence was freed."""


class SequenceBusy(SequenceError):
    """The sequence is in an open step."""


class ForeignSequence(SequenceError, ValueError):
    """The sequence belongs to another cache."""


class TokensReleased(SequenceError, ValueError):
    """A call needs tokens or raw rows whose blocks were released behind a group's retention."""


class StepError(KVCoreError):
    """A step is used out of order."""


class StepClosed(StepError):
    """The step was committed or rolled back."""


class StepIncomplete(StepError):
    """A layer was not appended, so the step was rolled back."""


class CacheCorrupt(KVCoreError):
    """The cache's books do not balance: a bug in kvcore, or a program wrote over its memory."""


class UnsupportedError(KVCoreError):
    """This build, CPU or backend has no code for the request."""


class BackendUnavailable(KVCoreError):
    """A backend cannot be used here; the message says what is missing."""


class DeviceFault(KVCoreError):
    """A CUDA device reported an error; what the cache holds there cannot be relied on any more."""


class MissingExtra(KVCoreError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class ModelFileError(KVCoreError, ValueError):
    """A model file is missing, truncated, corrupt or of a kind that kvcore does not read."""


#: What a status of the C core becomes in Python, by the status's name.
STATUS_EXCEPTIONS: dict[str, type[Exception]] = {
    "ERR_NULL": InvalidArgument,
    "ERR_VALUE": InvalidArgument,
    "ERR_RANGE": InvalidArgument,
    "ERR_OVERFLOW": InvalidArgument,
    "ERR_UNSUPPORTED": UnsupportedError,
    "ERR_NO_MEMORY": MemoryError,
    "ERR_OUT_OF_BLOCKS": OutOfBlocks,
    "ERR_STALE_SEQUENCE": SequenceFreed,
    "ERR_FOREIGN_SEQUENCE": ForeignSequence,
    "ERR_SEQUENCE_BUSY": SequenceBusy,
    "ERR_DUPLICATE_SEQUENCE": InvalidArgument,
    "ERR_STEP_CLOSED": StepClosed,
    "ERR_STEP_INCOMPLETE": StepIncomplete,
    "ERR_ALREADY_APPENDED": StepError,
    "ERR_NOT_APPENDED": StepError,
    "ERR_NO_STORAGE": StepError,
    "ERR_RELEASED": TokensReleased,
    "ERR_CORRUPT": CacheCorrupt,
    "ERR_NOT_FINITE": NotFinite,
}
