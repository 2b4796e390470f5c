"""Writes the table of docs/gpu_mapping.md from the compile logs: gpu_resources.py [FILE].

Compiles the attention kernels with NVRTC for sm_90 and needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvcore.formats import get_format
from kvcore_gpu import compiler, decode, prefill

PAGE = Path(__file__).parents[1] / "docs" / "_generated" / "gpu_resources.md"
ARCH = "sm_90"
PAIRS = (
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("fp8_e4m3", "fp8_e4m3"),
    ("rot8", "rot8"),
    ("rot6", "rot4"),
    ("chan4", "rot4"),
)
HEAD_DIMS = (64, 128, 256)
#: Of a multiprocessor of compute capability 9.0.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SHARED, SHARED_PER_BLOCK, RESERVED = 228 << 10, 227 << 10, 1024
REGISTER_UNIT = 256  # of a warp

HEADER = (
    "| kernel | K/V | head_dim | registers | shared memory, KB | threads | blocks a "
    "multiprocessor | warps of 64 | KB under way |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def blocks_per_multiprocessor(registers: int, shared: int, threads: int) -> int:
    """How many blocks fit at once."""
    warps = threads // 32
    of_a_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // (of_a_warp * warps)
    by_shared = SHARED // (shared + RESERVED)
    return min(by_registers, by_shared, THREADS // threads, BLOCKS)


def row(kernel: decode.Decode | prefill.Prefill, in_flight: int) -> str:
    cubin = compiler.compile_kernel(kernel.source, kernel.defines(), ARCH)
    found = cubin.resources[kernel.entry]
    shared = found.shared + kernel.shared_bytes
    blocks = blocks_per_multiprocessor(found.registers, shared, kernel.threads)
    formats = f"{kernel.k_format.name}/{kernel.v_format.name}"
    return (
        f"| {kernel.entry} | {formats} | {kernel.head_dim} | {found.registers} | "
        f"{shared / 1024:.1f} | {kernel.threads} | {blocks} | {blocks * kernel.threads // 32} | "
        f"{blocks * in_flight / 1024:.0f} |"
    )


def table() -> str:
    rows = [HEADER]
    for k_name, v_name in PAIRS:
        k_format, v_format = get_format(k_name), get_format(v_name)
        for dim in HEAD_DIMS:
            few = decode.fit(
                decode.Decode(k_format, v_format, dim, dim, False, 1, False), SHARED_PER_BLOCK
            )
            assert few is not None
            token = k_format.row_nbytes(dim) + v_format.row_nbytes(dim)
            ahead = decode.WARPS * (few.stages - 1) * few.tile * token
            rows.append(row(few, ahead))
    for k_name, v_name in PAIRS:
        k_format, v_format = get_format(k_name), get_format(v_name)
        for dim in HEAD_DIMS:
            many = prefill.Prefill(k_format, v_format, dim, dim, 1, False)
            token = k_format.row_nbytes(dim) + v_format.row_nbytes(dim)
            rows.append(row(many, many.keys * token))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(table(), encoding="utf-8")
