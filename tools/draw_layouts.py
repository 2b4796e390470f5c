"""Draws the pictures of docs/guide/memory.md: draw_layouts.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

SEQUENCES = {"A": "#1b6ca8", "B": "#d1672c", "C": "#3a8f5c"}
EMPTY, RAW, CODES, METADATA = "#f2f4f6", "#9dc3e6", "#1b6ca8", "#d1672c"


class Picture:
    """A drawing in units of cells, y downwards."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width * 0.42, height * 0.42))
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def cell(self, x: float, y: float, color: str, text: str = "", width: float = 1) -> None:
        box = Rectangle((x, y), width, 0.9, facecolor=color, edgecolor="#555b61", linewidth=0.6)
        self.axes.add_patch(box)
        dark = color not in (EMPTY, RAW)
        self.axes.text(
            x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=8,
            color="white" if dark else "#1c2024",
        )  # fmt: skip

    def label(self, x: float, y: float, text: str, **style: Any) -> None:
        self.axes.text(x, y, text, **{"va": "center", "fontsize": 9, **style})

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "->", "color": "#777d83", "linewidth": 0.8}
        self.axes.annotate("", xy=end, xytext=start, arrowprops=style)

    def save(self, path: Path) -> None:
        self.figure.savefig(path, metadata={"Date": None, "Creator": None})


def contiguous() -> Picture:
    """Each sequence has room for the longest text from the start."""
    picture = Picture(19, 4.4)
    for row, (name, length) in enumerate({"A": 11, "B": 5, "C": 8}.items()):
        picture.label(0.2, row * 1.3 + 0.75, name, fontweight="bold")
        for slot in range(16):
            held = slot < length
            text = f"{slot}" if held else ""
            picture.cell(1 + slot, row * 1.3 + 0.3, SEQUENCES[name] if held else EMPTY, text)
    picture.label(1, 4.15, "token slots; the empty ones are taken, and hold nothing")
    return picture


def paged() -> Picture:
    """Sequences are rows of block numbers; B shares A's first block."""
    picture = Picture(20, 8.2)
    tables = {"A": (2, 0, 5), "B": (2, 4), "C": (1, 3)}
    picture.label(0.2, 0.4, "block tables", fontweight="bold")
    places: dict[tuple[str, int], tuple[float, float]] = {}
    for row, (name, blocks) in enumerate(tables.items()):
        x = 0.6 + row * 6.4
        picture.label(x, 1.35, name, fontweight="bold")
        for column, block in enumerate(blocks):
            picture.cell(x + 0.7 + column, 0.9, SEQUENCES[name], str(block))
            places[name, block] = (x + 1.2 + column, 1.85)
    picture.label(0.2, 3.9, "blocks of 4 slots", fontweight="bold")
    contents = {
        0: ("A", 4, 4), 1: ("C", 0, 4), 2: ("A", 0, 4), 3: ("C", 4, 3), 4: ("B", 4, 1),
        5: ("A", 8, 3), 6: None, 7: None,
    }  # fmt: skip
    for block, content in contents.items():
        x, y = 0.6 + block % 4 * 4.8, 4.7 + block // 4 * 1.7
        picture.label(x - 0.35, y + 0.45, str(block), fontsize=8)
        for slot in range(4):
            held = content is not None and slot < content[2]
            color = SEQUENCES[content[0]] if held and content else EMPTY
            text = f"{content[1] + slot}" if held and content else ""
            picture.cell(x + slot, y, color, text)
        for name, blocks in tables.items():
            if block in blocks and block < 4:
                picture.arrow(places[name, block], (x + 2, y - 0.05))
    return picture


def quantized() -> Picture:
    """A tile of a row format: the codes of all tokens, then their scales; raw rows beside it."""
    picture = Picture(20, 5.4)
    picture.label(0.2, 0.5, "tile of one block and head, rot4: codes of every token, then scales",
                  fontweight="bold")  # fmt: skip
    for token in range(6):
        picture.cell(0.4 + token * 2.2, 1.0, CODES, f"codes {token}", 2.2)
    for token in range(6):
        picture.cell(13.8 + token * 0.9, 1.0, METADATA, f"s{token}", 0.9)
    picture.label(0.2, 3.0, "raw rows in bf16, in blocks of 32 of a pool of their own",
                  fontweight="bold")  # fmt: skip
    labels = ("first 4", "", "", "...", "", "", "last 32 to 63")
    for i, text in enumerate(labels):
        raw = i in (0, 6)
        picture.cell(0.4 + i * 2.7, 3.5, RAW if raw else EMPTY, text if raw or i == 3 else "", 2.7)
    picture.label(0.4, 4.95, "between them tokens are read encoded, and their raw blocks released")
    return picture


def sealed() -> Picture:
    """A channel format: 32 tokens become one group when the last of them is there."""
    picture = Picture(20, 6.2)
    picture.label(0.2, 0.5, "tokens 0 to 31: sealed", fontweight="bold")
    for line in range(4):
        picture.cell(0.4, 1.0 + line * 0.95, CODES,
                     f"channels {4 * line} to {4 * line + 3}, 32 tokens", 9)  # fmt: skip
    picture.cell(0.4, 4.9, METADATA, "minimum of each channel", 4.5)
    picture.cell(4.9, 4.9, METADATA, "step of each channel", 4.5)
    picture.label(10.4, 0.5, "tokens 32 to 40: not yet", fontweight="bold")
    for token in range(9):
        picture.cell(10.4 + token % 5 * 1.9, 1.0 + token // 5, RAW, f"row {32 + token}", 1.9)
    picture.label(10.4, 3.6, "raw rows, read as they came")
    picture.label(10.4, 4.4, "token 63 completes the group:")
    picture.label(10.4, 5.0, "its 32 rows are encoded together")
    return picture


PICTURES = {"contiguous": contiguous, "paged": paged, "quantized": quantized, "sealed": sealed}


def main(folder: Path) -> None:
    settings = {"svg.fonttype": "none", "svg.hashsalt": "kvcore", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        for name, draw in PICTURES.items():
            draw().save(folder / f"layout_{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
