"""kvcore: the KV-cache core of an LLM inference engine.

A paged, shareable key/value cache and attention that reads it in place. See `KVCache`.
"""

from __future__ import annotations

from pathlib import Path

from kvcore import ops
from kvcore._native.machine import version as _version
from kvcore.backend import Backend, available_backends, get_backend
from kvcore.cache import CacheStats, GroupStats, KVCache
from kvcore.errors import (
    BackendUnavailable,
    CacheCorrupt,
    DeviceFault,
    ForeignSequence,
    InvalidArgument,
    InvalidType,
    KVCoreError,
    MissingExtra,
    ModelFileError,
    NotFinite,
    OutOfBlocks,
    SequenceBusy,
    SequenceError,
    SequenceFreed,
    StepClosed,
    StepError,
    StepIncomplete,
    TokensReleased,
    UnsupportedError,
)
from kvcore.machine import (
    available_isas,
    cpu_features,
    get_isa,
    get_num_threads,
    set_isa,
    set_num_threads,
)
from kvcore.sequence import Sequence
from kvcore.spec import CacheSpec, GroupSpec, LayerSpec
from kvcore.step import Step

__version__: str = _version()

__all__ = [
    "Backend",
    "BackendUnavailable",
    "CacheCorrupt",
    "CacheSpec",
    "CacheStats",
    "DeviceFault",
    "ForeignSequence",
    "GroupSpec",
    "GroupStats",
    "InvalidArgument",
    "InvalidType",
    "KVCache",
    "KVCoreError",
    "LayerSpec",
    "MissingExtra",
    "ModelFileError",
    "NotFinite",
    "OutOfBlocks",
    "Sequence",
    "SequenceBusy",
    "SequenceError",
    "SequenceFreed",
    "Step",
    "StepClosed",
    "StepError",
    "StepIncomplete",
    "TokensReleased",
    "UnsupportedError",
    "available_backends",
    "available_isas",
    "cpu_features",
    "get_backend",
    "get_include",
    "get_isa",
    "get_library_dir",
    "get_num_threads",
    "ops",
    "set_isa",
    "set_num_threads",
]


def get_include() -> str:
    """The folder to give a C compiler with -I, for #include <kvcore/kvcore.h>."""
    return str(Path(__file__).parent / "include")


def get_library_dir() -> str:
    """The folder that has libkvcore, for -L and the run path."""
    return str(Path(__file__).parent / "lib")
