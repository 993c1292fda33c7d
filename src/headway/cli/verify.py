"""`headway verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from headway.catalogue import Method, get, methods
from headway.cli.failures import FAILED, NOT_HELD, WRONG_INPUT, fail, failures


def verify(
    slug: Annotated[str, typer.Argument(help="The method; leave it out with --all.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="All methods, one after the other.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw what was measured (.png, .svg or .pdf).")] = None,  # noqa: UP045
    collect: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write SLUG.json and SLUG.svg into this folder; the docs keep theirs in docs/claims."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Other random numbers.")] = 0,
) -> None:
    """Re-run a method's claim: measured value, baseline, threshold, and the paper's own figure.

    Exits with 3 when a claim does not hold.

    Examples:
        headway verify frugal --plot frugal.png

        headway verify --all --json
    """
    if bool(slug) == everything:
        raise fail("name one method, or give --all", WRONG_INPUT)
    if seed < 0:
        raise fail(f"--seed must be >= 0, got {seed}", WRONG_INPUT)
    if plot is not None and (everything or plot.suffix not in (".png", ".svg", ".pdf")):
        raise fail(f"--plot takes one method and a name ending in .png, .svg or .pdf, got {str(plot)!r}", WRONG_INPUT)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise fail(f"--plot: there is no folder {str(plot.parent)!r}", WRONG_INPUT)
    rows = methods() if everything else [_row(slug)]
    results = []
    with failures():
        for row in rows:
            results.append(_run(row, seed, as_json, plot, collect))
    if as_json:
        typer.echo(json.dumps(results if everything else results[0], indent=2))
    if not all(result["holds"] for result in results):
        raise typer.Exit(NOT_HELD)


def _row(slug: str) -> Method:
    try:
        row = get(slug)
    except KeyError as error:
        raise fail(error.args[0], WRONG_INPUT) from error
    if not row.claim:
        raise fail(f"'{slug}' is a baseline and makes no claim", WRONG_INPUT)
    return row


def _run(row: Method, seed: int, as_json: bool, plot: Path | None, collect: Path | None) -> dict[str, Any]:
    from rich.console import Console

    from headway.catalogue import import_object
    from headway.claims.show import as_dict, table
    from headway.plots import save

    console = Console(stderr=as_json)
    try:
        with console.status(f"{row.slug}: measuring"):
            claim = import_object(row.claim, extra=row.extra)
            outcome = claim(seed=seed)
    except ImportError as error:
        raise fail(str(error), FAILED) from error
    result = as_dict(row.slug, outcome, seed)
    if not as_json:
        console.print(table(row.slug, outcome))
    if plot is not None:
        save(outcome.panels, plot)
    if collect is not None:
        collect.mkdir(parents=True, exist_ok=True)
        (collect / f"{row.slug}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        save(outcome.panels, collect / f"{row.slug}.svg")
    return result
