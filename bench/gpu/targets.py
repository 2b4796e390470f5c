"""What is measured on a GPU and what it shall reach; bytes and flops are bench.cases'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.cases import Case, decode
from bench.formats import is_quantized
from kvcore.formats import get_format


@dataclass(frozen=True)
class Target:
    """A case in a format.

    Attributes:
        case: the call on one layer.
        kv_format: as bench's --formats has it.
        share: of the measured copy bandwidth, for decode and append; None: no aim.
        tflops: for prefill; None: no aim.
    """

    case: Case
    kv_format: str
    share: float | None = None
    tflops: float | None = None

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.kv_format}"

    @property
    def nbytes(self) -> int:
        """Bytes that the call must move: what is read, and for an append its input as well."""
        moved = self.case.kv_bytes(self.kv_format)
        return moved + self.input_bytes if self.case.kind == "append" else moved

    @property
    def input_bytes(self) -> int:
        """Bytes of the new tokens' K and V as they come, in 16 bits."""
        return self.case.appended_rows * self.case.head_dim * 2

    def layers_beyond(self, l2_bytes: int) -> int:
        """Layers that hold `ROTATION` times as much as the second level cache."""
        return max(1, -(-ROTATION * l2_bytes // self.nbytes))


SMALL_LENGTH = 256
#: How far what is read goes beyond the second level cache before it is read again.
ROTATION = 8

DECODE = (
    Target(decode("decode-64x8k", [8192] * 64), "bf16", share=0.9),
    Target(decode("decode-16x4k", [4096] * 16), "bf16", share=0.8),
    Target(decode("decode-1x32k", [32768]), "bf16", share=0.7),
    Target(decode("decode-64x8k", [8192] * 64), "fp8_e4m3", share=0.85),
    Target(decode("decode-64x8k", [8192] * 64), "rot8", share=0.8),
    Target(decode("decode-64x8k", [8192] * 64), "int8", share=0.8),
    Target(decode("decode-64x8k", [8192] * 64), "rot4", share=0.6),
    Target(decode("decode-64x8k", [8192] * 64), "chan4/rot4"),
    Target(decode("decode-64x8k", [8192] * 64), "fp16"),
    Target(decode("decode-mha-16x4k", [4096] * 16, num_kv_heads=32), "bf16"),
)
PREFILL = (
    Target(Case("prefill-8k", "prefill", (0,), (8192,)), "bf16", tflops=330),
    Target(Case("prefill-8k", "prefill", (0,), (8192,)), "fp16", tflops=330),
    Target(Case("prefill-chunk", "prefill", (8192,), (1024,)), "bf16"),
    Target(Case("prefill-8k", "prefill", (0,), (8192,)), "rot8"),
)
APPEND = (
    Target(Case("append-8k", "append", (0,), (8192,)), "bf16", share=0.8),
    Target(Case("append-8k", "append", (0,), (8192,)), "rot8"),
    Target(Case("append-8k", "append", (0,), (8192,)), "rot4"),
    Target(Case("append-8k", "append", (0,), (8192,)), "chan4/rot4"),
)
ALL = (*DECODE, *PREFILL, *APPEND)
QUICK = ("decode-16x4k bf16", "prefill-8k bf16", "append-8k bf16")
#: Microseconds of Python for append and attend of one layer, without a graph.
STEP_MICROSECONDS = 15.0


def of_kind(kind: str, quick: bool) -> Iterator[Target]:
    """The targets of a kind, the most important ones first."""
    for target in ALL:
        if target.case.kind == kind and (not quick or target.name in QUICK):
            yield target


def small(target: Target) -> Target:
    """The same heads and formats over so few tokens that only the kernels' compilation counts."""
    case = target.case
    stored, new = (
        tuple(min(n, SMALL_LENGTH) for n in sizes[:1]) for sizes in (case.stored, case.new)
    )
    return replace(target, case=replace(case, stored=stored, new=new))


def dtype_of(target: Target) -> str:
    """Of q, k and v: the cache's own, and bfloat16 beside quantized rows."""
    if is_quantized(target.kv_format):
        return "bfloat16"
    return {"fp16": "float16", "bf16": "bfloat16"}[get_format(target.kv_format).name]
