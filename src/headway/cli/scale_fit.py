"""`headway scale-fit FILE`."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from headway.cli.failures import WRONG_INPUT, fail

if TYPE_CHECKING:
    from headway.budget.scale_rl import ComputePerformanceFit


def scale_fit(
    file: Annotated[Path, typer.Argument(help="A CSV file with a header line.", show_default=False)],
    x: Annotated[str, typer.Option("--x", help="Column of the cumulative compute, in any unit.")] = "compute",
    y: Annotated[str, typer.Option("--y", help="Column of the performance, such as a pass rate.")] = "performance",
    forecast: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(help="Compute at which to forecast; may be given more than once.", show_default=False),
    ] = None,
    initial: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Performance before training.", show_default="the first row's"),
    ] = None,
    min_compute: Annotated[float, typer.Option(help="Leave out rows below it, the noisy start.")] = 0.0,
    max_asymptote: Annotated[float, typer.Option(help="The best value that the metric can take.")] = 1.0,
    level: Annotated[float, typer.Option(help="Confidence of the intervals.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw data, fit and interval (.png or .svg).")] = None,  # noqa: UP045
) -> None:
    """Fit performance against compute by a sigmoid: where a run will end, and whether the data can tell.

    Example:
        headway scale-fit runs.csv --x gpu_hours --y pass_rate --forecast 1e5
    """
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise fail(f"--plot takes a name ending in .png or .svg, got {str(plot)!r}", WRONG_INPUT)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise fail(f"--plot: there is no folder {str(plot.parent)!r}", WRONG_INPUT)
    if not all(0 < compute < math.inf for compute in forecast or []):
        raise fail(f"--forecast must be > 0 and finite, got {', '.join(f'{c:g}' for c in forecast or [])}", WRONG_INPUT)
    from headway.budget.scale_rl import ComputePerformanceFit, read_csv

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            compute, performance = read_csv(file, x, y)
            planner = ComputePerformanceFit(initial=initial, min_compute=min_compute, max_asymptote=max_asymptote)
            fit = planner.fit(compute, performance)
            result = _result(fit, forecast or [], level)
        except OSError as error:
            raise fail(f"cannot read {file}: {error.strerror or error}", WRONG_INPUT) from error
        except ValueError as error:
            raise fail(str(error), WRONG_INPUT) from error
    result["warnings"] = [str(warning.message) for warning in caught if warning.category is UserWarning]
    if plot is not None:
        from headway.plots import save

        save(fit.panels(until=max(forecast) if forecast else None), plot)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    _print(result, x, y)


def _result(fit: ComputePerformanceFit, forecast: list[float], level: float) -> dict[str, Any]:
    low, high, identified = fit.asymptote_interval(level)
    rows = []
    for compute in forecast:
        mean, *ends = fit.forecast(compute, level)
        rows.append({"compute": compute, "performance": mean, "interval": ends})
    return {
        "points": fit.points_,
        "level": level,
        "asymptote": fit.asymptote_,
        "asymptote_interval": [low, high],
        "identified": identified,
        "exponent": fit.exponent_,
        "midpoint": fit.midpoint_,
        "initial": fit.initial_,
        "forecast": rows,
    }


def _print(result: dict[str, Any], x: str, y: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def interval(ends: list[float]) -> str:
        return f"{ends[0]:.4f} to {ends[1]:.4f}"

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", escape(y), f"{100 * result['level']:.4g} % interval"):
        table.add_column(column)
    table.add_row("asymptote", f"{result['asymptote']:.4f}", interval(result["asymptote_interval"]))
    for row in result["forecast"]:
        table.add_row(f"at {row['compute']:g}", f"{row['performance']:.4f}", interval(row["interval"]))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        escape(
            f"half of the gain from {result['initial']:.4f} at {x} = {result['midpoint']:.4g}, "
            f"exponent {result['exponent']:.3f}, {result['points']} points"
        ),
        soft_wrap=True,
    )
    if not result["identified"]:
        console.print("[bold]not identified[/bold]: the data do not bound the asymptote", soft_wrap=True)
    for warning in result["warnings"]:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
