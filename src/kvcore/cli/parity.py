"""`kvcore parity`: whether a backend keeps the contract on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from .. import available_isas
from ..backend import known_backends
from ..errors import InvalidArgument
from ..parity import Result, report, run, select_cases


@click.command()
@click.option("--backend", default="cpu", show_default=True, type=click.Choice(known_backends()),
              help="What to try.")  # fmt: skip
@click.option("--isa", "isas", multiple=True, metavar="NAME",
              help="The CPU's instruction set; all for each. May repeat.")  # fmt: skip
@click.option("--select", multiple=True, metavar="PATTERN",
              help="Cases by name, as in 'decode/*' or rot4. May repeat.")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE", help="Write the results; - for stdout.")
def parity(
    backend: str, isas: tuple[str, ...], select: tuple[str, ...], json_file: str | None
) -> None:
    """Try a backend against float64 and against the CPU's bytes, case by case.

    It is what to run first on a new machine or GPU. Exit code 1: a case failed.
    """
    if json_file not in (None, "-") and not Path(json_file).parent.is_dir():
        raise InvalidArgument(f"json: expected a file in an existing folder, got {json_file}")
    chosen: tuple[str | None, ...] = available_isas() if "all" in isas else isas or (None,)
    quiet = json_file == "-"
    patterns = select or None
    results: list[Result] = []
    for isa in chosen:
        part = _run(backend, isa, patterns, quiet)
        results += part
    if quiet:
        click.echo(report.to_json(results))
    elif json_file is not None:
        Path(json_file).write_text(report.to_json(results) + "\n", encoding="utf-8")
    if not all(result.passed for result in results):
        click.get_current_context().exit(1)


def _run(
    backend: str, isa: str | None, select: tuple[str, ...] | None, quiet: bool
) -> list[Result]:
    """The results, printed as they come unless `quiet`."""
    width = max(len(case.name) for case in select_cases(select))
    if quiet:
        return run(backend, isa, select)
    shown: list[Result] = []

    def show(result: Result) -> None:
        if not shown:
            click.echo(report.header(width))
        shown.append(result)
        click.echo(report.line(result, width))

    results = run(backend, isa, select, show)
    click.echo(f"\n{report.LEGEND}\n{report.summary(results)}\n")
    return results
