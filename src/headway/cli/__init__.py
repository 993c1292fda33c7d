"""The command `headway`.

Exit codes: 0 done, 1 failed, 2 wrong input, 3 a claim does not hold, 130 interrupted. Commands
import what they need when they run, so that `headway --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from headway import __version__
from headway.cli import generate, methods, plan, scale_fit, train, verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="headway",
    help="Train, tune and serve PyTorch models on the machines people actually have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.add_typer(plan.app, name="plan")
app.add_typer(methods.app, name="methods")
app.command("verify")(verify.verify)
app.command("scale-fit")(scale_fit.scale_fit)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; a reader that goes away (`headway methods | head`) is no error."""
    try:
        app()
    except BrokenPipeError:
        # Python would try to flush the closed pipe once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
