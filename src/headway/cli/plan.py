"""`headway plan`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from headway.cli.failures import WRONG_INPUT, fail, failures

if TYPE_CHECKING:
    from headway.plan.propose import Plan
    from headway.spending import Budget

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)


@app.callback()
def plan(
    context: typer.Context,
    minutes: Annotated[float, typer.Option(help="The time that the whole command may take.")] = 0.0,
    budget: Annotated[str, typer.Option(metavar="AMOUNT", help="Instead: '2M tokens', '640 steps', '1.5 h'.")] = "",
    data: Annotated[str, typer.Option(help="A file, folder, glob or hf:NAME; default: the standard library.")] = "",
    model_size: Annotated[str, typer.Option(help="auto, or one of xxs, xs, s, m, l, xl, 2xl, 3xl.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    also: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="AMOUNT", help="A smaller budget at which a model is wanted too; may be repeated."),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Hold one value of the configuration."),
    ] = None,
    write: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Write what `headway train` takes.")] = None,  # noqa: UP045
    plot: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Draw the loss curve (.png or .svg).")] = None,  # noqa: UP045
    check: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="RUN", help="Compare the plan of a finished run with what came out."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure this machine, and propose a run for a budget: what to train, how, and what it will give.

    Takes about a minute: some seconds of measurements, and a short trial run on your text.

    Examples:
        headway plan --minutes 30 --data ./my-notes --write config.toml

        headway plan --minutes 15 --also "2 min" --also "5 min"

        headway plan --check runs/20261124-101500 --plot check.png
    """
    if context.invoked_subcommand is not None:
        return
    if plot is not None and (plot.suffix not in (".png", ".svg") or not plot.absolute().parent.is_dir()):
        raise fail(f"--plot takes a .png or .svg file in a folder that exists, got {str(plot)!r}", WRONG_INPUT)
    if write is not None and not write.absolute().parent.is_dir():
        raise fail(f"--write: there is no folder {str(write.parent)!r}", WRONG_INPUT)
    if check is not None:
        if minutes or budget or data or write or also or overrides:
            raise fail("--check takes the run alone, with --json and --plot", WRONG_INPUT)
        with failures():
            _check(check, as_json, plot)
        return
    total = _budget("--budget", budget) if budget else None
    if (minutes > 0) == (total is not None) or minutes < 0:
        raise fail(f"give --minutes > 0 or --budget, got --minutes {minutes:g} and --budget {budget!r}", WRONG_INPUT)
    if workers < 1:
        raise fail(f"--workers must be >= 1, got {workers}", WRONG_INPUT)
    smaller = [_budget("--also", text) for text in also or []]
    with failures():
        result = _plan(total or _minutes(minutes), data, model_size, workers, smaller, overrides or [], as_json)
    if write is not None:
        try:
            write.write_text(result.config.to_toml(), encoding="utf-8")
        except OSError as error:
            raise fail(f"--write: cannot write {str(write)!r}: {error.strerror}", WRONG_INPUT) from error
    if plot is not None:
        from headway.plots import save

        save(result.panels(), plot)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _show(result, write)


@app.command("one-epoch")
def one_epoch(
    params: Annotated[float, typer.Option(help="Parameters without the embedding, such as 15e6.")],
    tokens_per_iter: Annotated[float, typer.Option(help="Tokens per optimizer step.")],
    iters: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Optimizer steps; or --epochs and --dataset-tokens."),
    ] = None,
    epochs: Annotated[Optional[float], typer.Option(help="Epochs to be replaced by one.")] = None,  # noqa: UP045
    dataset_tokens: Annotated[Optional[float], typer.Option(help="Tokens of one epoch.")] = None,  # noqa: UP045
    available_tokens: Annotated[Optional[float], typer.Option(help="Different tokens that there are.")] = None,  # noqa: UP045
    ratio: Annotated[str, typer.Option(help="Tokens per parameter, or komatsuzaki (5), chinchilla (20).")] = "5",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Trade model size against steps at constant compute, and epochs against fresh text (arXiv 1906.06669).

    Example:
        headway plan one-epoch --params 15e6 --tokens-per-iter 13500 --iters 65000
    """
    from headway.budget.one_epoch import plan_one_epoch

    wanted: Any = ratio
    with contextlib.suppress(ValueError):
        wanted = float(ratio)
    try:
        result = plan_one_epoch(
            params,
            tokens_per_iter,
            iterations=iters,
            dataset_tokens=dataset_tokens,
            epochs=epochs,
            ratio=wanted,
            available_tokens=available_tokens,
        )
    except ValueError as error:
        raise fail(str(error), WRONG_INPUT) from error
    values = result.to_dict()
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        typer.echo(f"{name.replace('_', ' '):20} {value if not isinstance(value, float) else f'{value:,.6g}'}")


def _budget(option: str, text: str) -> Budget:
    from headway.spending import Budget

    try:
        return Budget.parse(text)
    except ValueError as error:
        raise fail(f"{option}: {error}", WRONG_INPUT) from error


def _minutes(minutes: float) -> Budget:
    from headway.spending import Budget

    return Budget(seconds=60 * minutes)


def _plan(
    budget: Budget, data: str, size: str, workers: int, also: list[Budget], overrides: list[str], quiet: bool
) -> Plan:
    from headway.config import ConfigError, load
    from headway.plan.propose import make_plan
    from headway.train.display import Display
    from headway.train.session import check_data, prepare_corpus

    short = [f"data.source={json.dumps(data)}"] if data else []
    base = load(None, [*overrides, *short, f"launch.workers={workers}"])
    check_data(base)
    display = Display(quiet=quiet)
    corpus = prepare_corpus(base, display)
    try:
        return make_plan(
            base,
            corpus,
            budget,
            size=size,
            also=also,
            held={override.partition("=")[0].strip() for override in overrides},
            tell=lambda text: display.note(f"{text} ..."),
        )
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from error


def _show(plan: Plan, written: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    machine = plan.machine
    console.print(
        f"\n{machine.processor}: {machine.cores} cores, {machine.memory_bytes / 2**30:.1f} GB free, "
        f"{machine.matmul_flops / 1e9:,.0f} GFLOP/s in float32 matrix products"
    )
    table = Table("", "proposed", "why", "source", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for figure in plan.figures:
        table.add_row(*(escape(text) for text in (figure.name, figure.value, figure.reason, figure.source)))
    console.print(table)
    if plan.also:
        console.print(
            f"\nmodels at {len(plan.config.schedule.options['checkpoints'])} budgets cost, in steps: "
            f"{plan.also['wsd-s']:,} in one WSD-S run (proposed), {plan.also['wsd']:,} with WSD's branches, "
            f"{plan.also['separate']:,} in separate runs"
        )
    for note in plan.notes:
        console.print(f"note: {escape(note)}")
    if written is None:
        console.print("\nto keep it: --write config.toml; then: headway train config.toml")
    else:
        console.print(f"\nheadway train {written}    then: headway plan --check RUN")


def _check(path: Path, as_json: bool, plot: Path | None) -> None:
    from headway.plan.check import compare

    result = compare(path)
    if plot is not None:
        from headway.plots import save

        save(result.panels(), plot)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    typer.echo(f"{'':34}{'predicted':>12}{'actual':>12}{'error':>9}")
    errors = result.errors()
    for name, actual in result.actual.items():
        typer.echo(f"{name:34}{result.predicted[name]:>12,.4g}{actual:>12,.4g}{errors[name]:>+9.1%}")
    if result.inside is not None:
        typer.echo(f"the validation loss is {'inside' if result.inside else 'outside'} the predicted interval")
