"""What the core runs on: threads and instruction sets."""

from __future__ import annotations

import os

from kvcore import checks
from kvcore._native import machine as _machine
from kvcore.errors import InvalidArgument, UnsupportedError

MAX_THREADS = 256


def set_num_threads(count: int, *, oversubscribe: bool = False) -> None:
    """Threads of every operation on the CPU, the caller included; 0 restores the default.

    The default is what the process may use (affinity, cgroup quota), or KVCORE_NUM_THREADS where
    that is lower. More than the process may use is cut down to that, unless `oversubscribe`, which
    is for tests and only costs time. Results do not depend on the number.
    """
    _machine.set_num_threads(
        checks.integer(count, "count", 0, MAX_THREADS),
        bool(oversubscribe),
    )


def get_num_threads() -> int:
    """Threads that operations on the CPU use."""
    count: int = _machine.get_num_threads()
    return count


def get_isa() -> str:
    """The instruction set that the kernels use, one of `available_isas()`."""
    name: str = _machine.get_isa()
    return name


def set_isa(name: str) -> None:
    """Switches the kernels' instruction set, for tests and comparisons.

    Call it while no operation runs. The variable KVCORE_ISA does the same at start-up.

    Raises:
        InvalidArgument: this build or CPU does not have it.
    """
    if name not in available_isas():
        raise InvalidArgument(f"name: expected one of {', '.join(available_isas())}, got {name!r}")
    _machine.set_isa(name)


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build and CPU can run, best first.

    Of "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16" and "neon". "avx512_vnni" is
    "avx512" with dot products of bytes for the decode of quantized caches. "avx512_bf16" is that
    with bf16 dot products for the prefill of bf16 caches, and comes first where these are expected
    to be faster.
    """
    return tuple(_machine.available_isas())


def cpu_features() -> tuple[str, ...]:
    """The CPU's features that kernels may use, as in "avx512_bf16".

    The variable KVCORE_CPU_FEATURES adds some that a hypervisor hides, as in "+avx512_bf16"; commas
    separate several. They are believed: an instruction that the CPU lacks ends the process.
    """
    return tuple(_machine.cpu_features())


def _check_claimed_features() -> None:
    for claim in filter(None, os.environ.get("KVCORE_CPU_FEATURES", "").split(",")):
        if not claim.startswith("+") or claim[1:] not in cpu_features():
            raise UnsupportedError(
                "KVCORE_CPU_FEATURES: expected features of this architecture that kvcore knows, "
                f"as in '+avx512_bf16', got {claim!r}"
            )


_check_claimed_features()
if get_isa() == "none":  # a forced one that is not there: better told now than by the first call
    raise UnsupportedError(
        f"KVCORE_ISA: expected one of {', '.join(available_isas())}, "
        f"got {os.environ.get('KVCORE_ISA')!r}"
    )
