"""Counts the instructions of decode.cu's loop for a tile of 16 keys, from the compiled code.

    pip install nvidia-cuda-nvdisasm
    gpu_instructions.py [FILE]    writes the table of docs/gpu_mapping.md

Needs no GPU, and says nothing of speed. What is counted is one round of the loop as it goes nearly
always: the shortest way from its first instruction back to it that does all products of matrices,
issues all copies of a next tile and looks its block up. So every row sees every key, and no maximum
has grown. A loop within the loop counts once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from kvcore.formats import get_format
from kvcore_gpu import compiler, decode

PAGE = Path(__file__).parents[1] / "docs" / "_generated" / "gpu_instructions.md"
ARCH, SHARED_PER_BLOCK, HEAD_DIM = "sm_90", 227 << 10, 128
PAIRS = (
    ("bf16", "bf16"), ("fp8_e4m3", "fp8_e4m3"), ("int8", "int8"), ("rot8", "rot8"),
    ("rot6", "rot4"), ("int4", "int4"), ("rot4", "rot4"), ("chan4", "rot4"), ("rot3", "rot3"),
    ("chan2", "rot2"),
)  # fmt: skip
HEADER = "| K/V | instructions for 16 keys | of the kernel |\n| --- | --- | --- |"

#: Instructions that the way has as many of as it can, the first being the most important.
WANTED = ("LDGSTS", "LDG")


class Instruction(NamedTuple):
    """One of a listing: its opcode, and the numbers of those that may follow it."""

    opcode: str
    following: tuple[int, ...]


def find_nvdisasm() -> Path:
    """The disassembler, of a toolkit or of its wheel."""
    wheel = Path(sysconfig.get_path("purelib"), "nvidia")
    for path in [shutil.which("nvdisasm"), *sorted(wheel.glob("*/bin/nvdisasm"))]:
        if path is not None:
            return Path(path)
    raise FileNotFoundError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing by nvdisasm."""
    texts: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(texts)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            texts.append(code[1])
    found = []
    for i, text in enumerate(texts):
        predicate, rest = re.fullmatch(r"(@\S+\s+)?(.*)", text).groups()  # type: ignore[union-attr]
        opcode = rest.split()[0].split(".")[0]
        target = re.search(r"`\((\.L_x_\d+)\)", rest)
        jumps = opcode == "BRA" and target is not None
        always = not predicate and not re.match(r"BRA(\.DIV\S*|\S*\s+!?UP?\d|\S*\s+!?P\d)", rest)
        following = [i + 1] if not (always and (jumps or opcode in ("EXIT", "RET"))) else []
        if jumps:
            following.append(labels[target[1]])  # type: ignore[index]
        found.append(Instruction(opcode, tuple(j for j in following if j < len(texts))))
    return found


def round_of(code: list[Instruction], start: int, products: int) -> tuple[int, ...] | None:
    """Of the best way from `start` back to it, how many of each of WANTED it has, and minus its
    length; None: no way has so many products."""
    order: list[int] = []  # those that follow first
    open_, done = {start}, set()
    stack = [(start, iter(code[start].following))]
    while stack:
        at, rest = stack[-1]
        for j in rest:
            if j not in open_ and j not in done:
                open_.add(j)
                stack.append((j, iter(code[j].following)))
                break
        else:
            stack.pop()
            open_.discard(at)
            done.add(at)
            order.append(at)
    position = {at: i for i, at in enumerate(order)}
    best: dict[int, dict[int, tuple[int, ...]]] = {}  # by products still to come
    for at in order:
        own = (*(code[at].opcode == name for name in WANTED), -1)
        ways: dict[int, tuple[int, ...]] = {}
        for j in code[at].following:
            if j == start:
                ways[0] = max(ways.get(0, (0,) * len(own)), (0,) * len(own))
            elif position[j] < position[at]:
                for count, way in best[j].items():
                    ways[count] = max(ways.get(count, way), way)
        more = code[at].opcode == "HMMA"
        best[at] = {
            count + more: tuple(a + b for a, b in zip(way, own, strict=True))
            for count, way in ways.items()
            if count + more <= products
        }
    return best[start].get(products)


def count_round(code: list[Instruction], products: int) -> int:
    """The instructions of one round of the loop that has so many products and most copies."""
    starts = {j for i, one in enumerate(code) for j in one.following if j <= i}
    rounds = [way for start in starts if (way := round_of(code, start, products)) is not None]
    if not rounds:
        raise ValueError(f"no loop with {products} products")
    return -max(rounds)[-1]


def row(k_name: str, v_name: str, nvdisasm: Path) -> str:
    k_format, v_format = get_format(k_name), get_format(v_name)
    shape = decode.Decode(k_format, v_format, HEAD_DIM, HEAD_DIM, False, 1, False)
    kernel = decode.fit(shape, SHARED_PER_BLOCK)
    assert kernel is not None
    cubin = compiler.compile_kernel(kernel.source, kernel.defines(), ARCH)
    command = [str(nvdisasm), "-c", str(cubin.path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = parse(listing)
    # Of 16 x 8 x 16: keys are the 8 of K's, and the last 16 of V's.
    products = HEAD_DIM // 16 * kernel.tile // 8 + HEAD_DIM // 8 * kernel.tile // 16
    instructions = count_round(code, products) * 16 / kernel.tile
    total = sum(one.opcode != "NOP" for one in code)
    return f"| {k_name}/{v_name} | {instructions:.0f} | {total} |"


def table() -> str:
    nvdisasm = find_nvdisasm()
    return "\n".join([HEADER, *(row(*pair, nvdisasm) for pair in PAIRS)]) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(table(), encoding="utf-8")
