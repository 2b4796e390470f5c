"""`kvcore plan`: how much memory a model's cache takes, what fits, and what bounds a step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import InvalidArgument
from ..planner import (
    DEVICES,
    MODELS,
    RESERVE,
    Device,
    Model,
    Plan,
    get_device,
    get_model,
    page,
    plan,
    plot,
    read_model,
    report,
)
from ..planner.machine import measure_cpu

MEASURED = "cpu"
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_SCALES = {"": 1, "k": 1024, "m": 1024**2}


def _tokens(text: str) -> int:
    """32768, 32k or 1m, by powers of two."""
    match = _COUNT.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"expected a number like 32768, 32k or 1m, got {text!r}")
    return int(float(match[1]) * _SCALES[match[2].lower()])


@click.command("plan")
@click.option("--model", default="llama-3-8b", show_default=True, help="A built-in model.")
@click.option("--config", metavar="DIR|FILE.gguf",
              help="Any model instead, by its config.json or GGUF file.")  # fmt: skip
@click.option("--device", default="h100", show_default=True,
              help=f"A built-in device, or {MEASURED} to measure this machine.")  # fmt: skip
@click.option("--devices", "num_devices", default=1, show_default=True,
              help="Devices that the model is split over.")  # fmt: skip
@click.option("--batch", default=1, show_default=True, help="Sequences.")
@click.option(
    "--context",
    type=_tokens,
    metavar="TOKENS",
    help="Tokens of each; the model's most when left out.",
)
@click.option("--format", "formats", default="bf16", show_default=True, metavar="K[/V]",
              help="How K and V are stored.")  # fmt: skip
@click.option("--block-size", default=64, show_default=True, help="Tokens a block holds.")
@click.option("--chunk", default="2048", show_default=True, type=_tokens, metavar="TOKENS",
              help="New tokens of the largest step.")  # fmt: skip
@click.option("--reserve", default=RESERVE, show_default=True,
              help="The part of the memory that is left for everything else.")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE", help="Write all numbers; - for stdout.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write the tables; - for stdout.")
@click.option("--plot", "plot_file", metavar="FILE", help="Draw growth, roofline and strategies.")
@click.option("--html", "html_file", metavar="FILE", help="Write one page with all of it.")
@click.option("--list", "list_names", is_flag=True, help="Name the built-in models and devices.")
def plan_memory(**options: Any) -> None:
    """Tell how much memory a model's KV cache takes, what fits, and what bounds a step.

    The same arithmetic sizes the cache itself. Times are the least that the device allows.
    """
    if options["list_names"]:
        _list()
        return
    files = {name: options[f"{name}_file"] for name in ("json", "csv", "plot", "html")}
    _check_files(files)
    model = read_model(options["config"]) if options["config"] else get_model(options["model"])
    k_format, _, v_format = options["formats"].partition("/")
    found = plan(
        model,
        _device(options, model, k_format, v_format or None),
        options["batch"],
        options["context"],
        k_format,
        v_format or None,
        **{name: options[name] for name in ("block_size", "chunk", "reserve", "num_devices")},
    )
    _write(found, files)


def _device(options: dict[str, Any], model: Model, k_format: str, v_format: str | None) -> Device:
    if options["device"] != MEASURED:
        return get_device(options["device"])
    return measure_cpu(model, model.cache_spec(k_format, v_format))


def _list() -> None:
    for title, names in (("models", MODELS), ("devices", (*DEVICES, MEASURED))):
        click.echo(f"{title}: {', '.join(names)}")


def _check_files(files: dict[str, str | None]) -> None:
    """Raises before anything is computed that nobody could keep."""
    for name, file in files.items():
        if file not in (None, "-") and not Path(str(file)).parent.is_dir():
            raise InvalidArgument(f"{name}: expected a file in an existing folder, got {file}")
    if [files["json"], files["csv"]] == ["-", "-"]:
        raise InvalidArgument("csv: expected a file, as json goes to stdout, got -")
    if files["plot"] is not None:
        plot.check(files["plot"])


def _write(found: Plan, files: dict[str, str | None]) -> None:
    texts: dict[str, Callable[[Plan], str]] = {
        "json": report.to_json,
        "csv": report.to_csv,
        "html": page.render,
    }
    if "-" not in files.values():
        for line in report.text(found):
            click.echo(line)
    for name, render in texts.items():
        file = files[name]
        if file == "-":
            click.echo(render(found).rstrip("\n"))
        elif file is not None:
            Path(file).write_text(render(found), encoding="utf-8")
    if files["plot"] is not None:
        plot.draw(found, files["plot"])
