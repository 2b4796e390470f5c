"""`kvcore eval`: what formats of the cache cost in accuracy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .. import set_num_threads
from ..errors import InvalidArgument, MissingExtra
from ..evaluation import (
    Calibration,
    Evaluation,
    calibrate,
    evaluate,
    parse_cases,
    plot,
    read_texts,
    report,
)
from ..evaluation.cases import RAW_CHOICES, Case
from ..models import Model, load
from .options import device_options

FORMATS = (
    "bf16,rot8+bias/rot8,rot6+bias/rot6,rot6+bias/rot4,chan4/rot4,rot4+bias/rot4,chan4/rot3,"
    "rot3+bias/rot3,chan2/rot2,int8,fp8_e4m3,int4"
)


@click.command("eval")
@click.option("--model", default="smollm2", show_default=True, metavar="NAME|DIR|FILE.gguf")
@click.option("--formats", default=FORMATS, show_default=True, metavar="K/V,...",
              help="Pairs of formats; one name stands for both. K+bias/V subtracts the calibrated "
              "mean key.")  # fmt: skip
@click.option("--raw", default="both", show_default=True, type=click.Choice(RAW_CHOICES),
              help="Each pair with raw rows, without, or both.")  # fmt: skip
@click.option("--raw-first", default=4, show_default=True, help="First tokens read in bf16.")
@click.option("--raw-last", default=32, show_default=True,
              help="Last tokens read in bf16, a multiple of 32.")  # fmt: skip
@click.option("--texts", multiple=True, metavar="FILE",
              help="A text, instead of four excerpts that come along. May repeat.")  # fmt: skip
@click.option("--length", default=1024, show_default=True, help="Tokens of each text.")
@click.option("--chunk", default=512, show_default=True,
              help="Tokens of a step; below 16 takes the path of decoding.")  # fmt: skip
@click.option("--recall-length", default=512, show_default=True,
              help="Tokens shown twice, in random order; 0 leaves it out.")  # fmt: skip
@click.option("--block-size", default=64, show_default=True, help="Tokens a block holds.")
@click.option("--seed", default=0, show_default=True, help="Of that order.")
@click.option("--calibration", metavar="FILE",
              help="What --calibrate wrote; else computed where a pair needs it.")  # fmt: skip
@click.option("--calibrate", "calibrate_to", metavar="FILE",
              help="Only compute key bias and scales, of --texts or of three other excerpts, and "
              "write them to FILE (.npz).")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE", help="Write all numbers; - for stdout.")
@click.option("--plot", "plot_file", metavar="FILE", help="Draw KL and recall against bits.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads of kvcore's kernels.")
@device_options
def evaluate_formats(**options: Any) -> None:
    """Run real text through a model and tell what each format of its cache costs.

    Perplexity hides small damage: KL to the float32 cache is what to compare.
    """
    if options["threads"] is not None:
        set_num_threads(options["threads"])
    texts = read_texts(options["texts"]) if options["texts"] else None
    cases = parse_cases(
        options["formats"], options["raw"], options["raw_first"], options["raw_last"]
    )
    _check_files(options["json_file"], options["plot_file"])
    model = load(
        options["model"],
        options["backend"],
        device=options["device"],
        progress=sys.stderr.isatty(),
    )
    if options["calibrate_to"] is not None:
        _save(calibrate(model, texts, length=options["length"]), options["calibrate_to"])
        return
    names = ("length", "chunk", "recall_length", "block_size", "seed")
    numbers = {name: options[name] for name in names}
    calibration = _calibration(model, cases, options["calibration"])
    with Bar() as bar:
        found = evaluate(
            model, cases, texts, calibration=calibration, progress=bar.update, **numbers
        )
    _print(found, options["json_file"])
    if options["plot_file"] is not None:
        plot.draw(found, options["plot_file"])


def _check_files(json_file: str | None, plot_file: str | None) -> None:
    """Raises before minutes of work whose results nobody could keep."""
    if json_file not in (None, "-") and not Path(json_file).parent.is_dir():
        raise InvalidArgument(f"json: expected a file in an existing folder, got {json_file}")
    if plot_file is not None:
        plot.check(plot_file)


class Bar:
    """A bar on stderr, where that is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                raise MissingExtra(
                    'eval: expected tqdm to be installed; run: pip install "kvcore[cli]"'
                ) from None
            self._bar = tqdm(desc="evaluating", unit="token", unit_scale=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)


def _calibration(model: Model, cases: list[Case], file: str | None) -> Calibration | None:
    """The file's, or a new one if a case needs it."""
    if file is not None:
        return Calibration.load(file)
    return calibrate(model) if any(case.calibrated for case in cases) else None


def _save(calibration: Calibration, path: str) -> None:
    calibration.save(path)
    layers, heads, dim = calibration.key_bias.shape
    click.echo(
        f"key_bias, key_scales and value_scales of {layers} layers, {heads} heads of {dim}, from "
        f"{calibration.num_tokens:,} tokens, in {path}"
    )


def _print(found: Evaluation, json_file: str | None) -> None:
    if json_file == "-":
        click.echo(found.to_json())
        return
    for line in [*report.table(found), "", *report.summary(found)]:
        click.echo(line)
    if json_file is not None:
        Path(json_file).write_text(found.to_json() + "\n", encoding="utf-8")
