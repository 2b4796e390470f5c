"""The machine's own limits: how fast it reads memory, and how fast it multiplies and adds."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvcore
from bench.machine import affinity, l2_bytes
from bench.measure import Timing
from bench.probe import compile_probe

SOURCE = Path(__file__).with_name("roof.c")
L2_PASSES = 400
FLAGS = ("-march=native", "-ffp-contract=fast", "-pthread")


@dataclass(frozen=True)
class Limits:
    """The best of several rounds: others' load takes from it and adds nothing.

    Attributes:
        read_gbs: GB/s (1e9 bytes) read from memory.
        l2_gbs: the same of data that lies in the cores' second level caches.
        fma_gflops: 1e9 float32 flops a second, by fused multiply-adds on registers.
    """

    num_threads: int
    read_gbs: float
    l2_gbs: float
    fma_gflops: float


class Roof:
    """The compiled probe.

    Args:
        num_threads: threads that read or compute, the caller included; each of the others on a
            CPU of its own.

    Raises:
        RuntimeError: there is no working C compiler ($CC, else cc).
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._library = _compile()
        cpus = affinity()
        pinned = len(cpus) >= num_threads
        self._cpus = (ctypes.c_int * num_threads)(*cpus[:num_threads]) if pinned else None

    def read(self, arrays: Sequence[np.ndarray]) -> Timing:
        """Reads dense arrays once."""
        count = len(arrays)
        pointers = (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays))
        lengths = (ctypes.c_size_t * count)(*(array.nbytes // 4 for array in arrays))
        return _timed(
            self._library.roof_read, pointers, lengths, count, self.num_threads, self._cpus
        )

    def compute(self, flops: float) -> Timing:
        """Does that many flops, shared by the threads."""
        iterations = max(1, round(flops / self.num_threads / self._library.roof_flops()))
        return _timed(self._library.roof_fma, iterations, self.num_threads, self._cpus)

    def compute_dots(self, flops: float) -> Timing:
        """As `compute`, by dot products of bf16 pairs, for the ISA "avx512_bf16"."""
        iterations = max(1, round(flops / self.num_threads / self._library.roof_flops() / 2))
        return _timed(self._library.roof_dot, iterations, self.num_threads, self._cpus)

    def limits(self, nbytes: int, rounds: int = 9) -> Limits:
        """Reads `nbytes` and computes for a tenth of a second or so, `rounds` times each."""
        memory = np.ones(nbytes // 4, np.float32)
        flops = 2e9 * self.num_threads
        flops *= 0.1 / self.compute(flops).seconds
        reads = [self.read([memory]).seconds for _ in range(rounds)]
        cached = [memory[: self.num_threads * l2_bytes() // 8]] * L2_PASSES
        hits = [self.read(cached).seconds for _ in range(rounds)]
        computes = [self.compute(flops).seconds for _ in range(rounds)]
        return Limits(
            num_threads=self.num_threads,
            read_gbs=memory.nbytes / min(reads) / 1e9,
            l2_gbs=sum(array.nbytes for array in cached) / min(hits) / 1e9,
            fma_gflops=flops / min(computes) / 1e9,
        )


def _compile() -> ctypes.CDLL:
    flags = list(FLAGS)
    if kvcore.get_isa() == "avx2":  # a limit is that of the instructions that may be used
        flags.append("-mno-avx512f")
    dots = "avx512_bf16" in kvcore.available_isas()
    if dots:
        flags.append("-mavx512bf16")  # where a hypervisor hides it, the compiler does not see it
    library = compile_probe(SOURCE, flags)
    library.roof_read.restype = library.roof_fma.restype = ctypes.c_double
    library.roof_read.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    library.roof_fma.argtypes = [
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    if dots:
        library.roof_dot.restype = library.roof_fma.restype
        library.roof_dot.argtypes = library.roof_fma.argtypes
    return library


def _timed(function: Any, *arguments: Any) -> Timing:
    waited = ctypes.c_double()
    seconds = function(*arguments, ctypes.byref(waited))
    if seconds < 0:
        raise RuntimeError("the system gave the probe no thread")
    return Timing(seconds, waited.value)
