"""The `kvcore` command: its subcommands, and what the terminal sees of an error."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import KVCoreError
from .demo import demo
from .evaluate import evaluate_formats
from .generate import generate
from .info import info
from .parity import parity
from .plan import plan_memory


class Mendable(click.ClickException):
    """An error that kvcore raised on purpose."""

    exit_code = 2


class Internal(click.ClickException):
    """A bug in kvcore."""

    exit_code = 1


class App(click.Group):
    """A group that reports every error as one line.

    Exit codes: 2 for what the caller can mend, 1 for a bug in kvcore, 130 after Ctrl-C.
    """

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params["debug"]:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except KVCoreError as error:
            raise Mendable(str(error)) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            text = f"internal: {type(error).__name__}: {error} (kvcore --debug shows where)"
            raise Internal(text) from error

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(2)
        except click.ClickException as error:
            click.echo(f"error: {error.format_message()}", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("error: interrupted", err=True)
            sys.exit(130)
        sys.exit(status if isinstance(status, int) else 0)


@click.group(cls=App, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvcore")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """The KV-cache core of LLM inference, and language models on it."""


for command in (generate, info, demo, evaluate_formats, parity, plan_memory):
    app.add_command(command)
