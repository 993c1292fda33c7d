"""`headway train`."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from headway.cli.failures import INTERRUPTED, WRONG_INPUT, fail, failures

if TYPE_CHECKING:
    from headway.config import Config
    from headway.spending import Budget
    from headway.train.run import RunFolder


def train(
    config: Annotated[Optional[Path], typer.Argument(help="A TOML file; without one, the defaults.")] = None,  # noqa: UP045
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be repeated."),
    ] = None,
    data: Annotated[str, typer.Option(help="Short for --set data.source=...: a file, folder, glob or hf:NAME.")] = "",
    budget: Annotated[
        str,
        typer.Option(
            metavar="AMOUNT",
            help="Steps, tokens or time: 640, '2M tokens', '10 min'. With --resume: what the run may spend in all.",
        ),
    ] = "",
    workers: Annotated[int, typer.Option(help="Short for --set launch.workers=...: processes on this machine.")] = 0,
    out: Annotated[Optional[Path], typer.Option(help="The run's folder; by default runs/<date>-<time>.")] = None,  # noqa: UP045
    resume: Annotated[Optional[Path], typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,  # noqa: UP045
) -> None:
    """Train or fine-tune a causal language model on text.

    Examples:
        headway train

        headway train --data ./my-notes --set train.steps=1000

        headway train config.toml --set optimizer.name=frugal --workers 2

        headway train --budget "10 min" --set schedule.name=wsd-s

        headway train --resume runs/20261124-101500

        headway train --resume runs/20261124-101500 --budget 640
    """
    # Started by torchrun or by this command's own launcher: be one of the workers, launch none.
    is_worker = "TORCHELASTIC_RUN_ID" in os.environ
    is_ours = is_worker and os.environ["TORCHELASTIC_RUN_ID"].startswith("headway-")
    with failures(quiet=is_ours):
        if resume is not None:
            if config is not None or data or out is not None or overrides:
                raise fail("--resume takes the run's own configuration: no CONFIG, --set, --data or --out", WRONG_INPUT)
            if budget and is_worker and not is_ours:
                raise fail("--resume with --budget changes the run: start it once without torchrun", WRONG_INPUT)
            run, resolved = _open(resume, workers, budget)
        else:
            run, resolved = None, _load(config, overrides or [], data, workers, budget)
        if run is not None and run.complete:
            typer.echo(f"{run.path} is complete: {resolved.budget}; its model is in {run.model}")
            return

        if is_worker:
            from torch.distributed.elastic.multiprocessing.errors import record

            from headway.train.session import run_worker

            record(run_worker)(resolved, run.path if run else out, resume is not None)
            return
        run = _alone(resolved, run, out) if resolved.launch.workers == 1 else _launched(resolved, run, out)
        if not run.complete:
            typer.echo(f"stopped; to go on: headway train --resume {run.path}")
            raise typer.Exit(INTERRUPTED)
        typer.echo(f"\nreport  {run.path / 'report.html'}\nmodel   {run.model}\nmore    headway generate {run.path}")


def _load(path: Path | None, overrides: list[str], data: str, workers: int, budget: str) -> Config:
    from headway.config import load
    from headway.train.session import check_data

    short = [f"data.source={_quoted(data)}"] if data else []
    if workers:
        short.append(f"launch.workers={workers}")
    if budget:
        short += _budget(budget)
    config = load(path, [*overrides, *short])
    check_data(config)
    return config


def _budget(text: str) -> list[str]:
    """The overrides for a budget: steps have a key of their own."""
    from headway.spending import Budget

    try:
        budget = Budget.parse(text)
    except ValueError as error:
        raise fail(f"--budget: {error}", WRONG_INPUT) from error
    if budget.steps:
        return [f"train.steps={budget.steps}", 'train.budget=""']
    return ["train.steps=0", f"train.budget={_quoted(text)}"]


def _open(path: Path, workers: int, budget: str) -> tuple[RunFolder, Config]:
    from headway.config import parse
    from headway.train.run import RunFolder

    run, config = RunFolder.open(path)
    changes = [f"launch.workers={workers}"] if workers and workers != config.launch.workers else []
    extension = _extension(config, budget) if budget else []
    if changes or extension:
        config = parse(config.to_toml(), [*changes, *extension])
        run.write_config(config)
    if extension:
        run.keep_model()
    return run, config


def _extension(config: Config, text: str) -> list[str]:
    """The overrides that let a run spend more, if its schedule can."""
    import torch

    from headway.config.methods import build_schedule
    from headway.spending import Budget

    changes = _budget(text)
    old, new = config.budget, Budget.parse(text)
    if bool(old.seconds) or bool(new.seconds):
        raise fail(f"--budget: a run is extended in steps or tokens; this run has {old}, got {text!r}", WRONG_INPUT)
    if bool(old.steps) != bool(new.steps):
        raise fail(f"--budget: this run's budget is {old}: give it in {_unit(old)}, got {text!r}", WRONG_INPUT)
    if (new.steps or new.tokens) < (old.steps or old.tokens):
        raise fail(f"--budget: must be at least what the run has, {old}, got {text!r}", WRONG_INPUT)
    if (new.steps, new.tokens) == (old.steps, old.tokens):
        return []
    # The run's own schedule at its end, to see whether it goes on: nothing may be changed before that is known.
    schedule = build_schedule(
        config.schedule, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), config.nominal_steps
    )
    if not hasattr(schedule, "extend"):
        raise fail(
            f"--budget: the schedule {config.schedule.name!r} was laid out for {old} and cannot go on; start a new run "
            f"with --budget {text!r}, or train with schedule.name=wsd-s, which can be extended",
            WRONG_INPUT,
        )
    total = replace(new, tokens_per_step=old.tokens_per_step).total_steps
    schedule.last_epoch = config.nominal_steps
    try:
        schedule.extend(total)
    except ValueError as error:
        raise fail(f"--budget: {text!r}: {error}", WRONG_INPUT) from error
    return [*changes, f"schedule.checkpoints={list(schedule.checkpoints)}"]


def _unit(budget: Budget) -> str:
    return "steps" if budget.steps else "tokens"


def _quoted(text: str) -> str:
    """A TOML string, so that a folder named `12` stays a name."""
    import json

    return json.dumps(text)


def _alone(config: Config, run: RunFolder | None, out: Path | None) -> RunFolder:
    from headway.train.session import run_worker

    return run_worker(config, run.path if run else out, resume=run is not None)[0]


def _launched(config: Config, run: RunFolder | None, out: Path | None) -> RunFolder:
    from headway.train.display import Display
    from headway.train.launch import launch
    from headway.train.run import RunFolder
    from headway.train.session import prepare_corpus

    prepare_corpus(config, Display())
    run = run or RunFolder.create(out, config)
    with contextlib.suppress(KeyboardInterrupt):  # the workers have saved; the caller says how to go on
        launch(run, config.launch.workers, config.launch.max_restarts)
    return run
