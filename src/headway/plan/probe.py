"""Short real runs on this machine: what a step takes, what comes around it, and how the loss begins."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.config import Config, parse
from headway.data import Corpus
from headway.train import TrainError

__all__ = ["Probe", "probe", "step_seconds", "with_schedule"]


@dataclass(frozen=True)
class Probe:
    """What a short `headway train` showed.

    Seconds: `step_seconds` is the mean of a step once everything is compiled, `evaluation_seconds` one
    evaluation, `fixed_seconds` everything else of the command: start, compilation, last checkpoint, sample, report.
    """

    step_seconds: float
    evaluation_seconds: float
    fixed_seconds: float
    peak_memory_mb: float
    parameters: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]


def probe(config: Config, steps: int) -> Probe:
    """Run `headway train` with the configuration for `steps` steps in a process of its own.

    Raises:
        TrainError: the run failed; the message is its own last line.
    """
    changed = [f"train.steps={steps}", 'train.budget=""', f"train.evaluate_every={max(1, steps // 2)}"]
    warmup = config.schedule.options.get("warmup_steps", 0)
    if warmup >= steps:
        changed.append(f"schedule.warmup_steps={steps - 1}")
    short = parse(config.to_toml(), changed)
    with tempfile.TemporaryDirectory(prefix="headway-plan-") as folder:
        file, run = Path(folder, "config.toml"), Path(folder, "run")
        file.write_text(short.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "headway", "train", str(file), "--out", str(run)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        wall = time.perf_counter() - start
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise TrainError(f"the trial run failed: {lines[-1].removeprefix('error: ')}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        environment_file = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return _read(records, wall, environment_file["parameters"])


def _read(records: list[dict[str, float]], wall: float, parameters: int) -> Probe:
    steps = [record for record in records if "loss" in record]
    took: list[float] = []
    evaluations: list[float] = []
    before = 0.0
    for record in records:
        if "elapsed" not in record:
            continue
        (took if "loss" in record else evaluations).append(record["elapsed"] - before)
        before = record["elapsed"]
    # The mean, since a run is the sum of its steps; without the first ones, which compile, and the longest few.
    late = sorted(took[len(took) // 3 :])
    usual = statistics.fmean(late[: max(1, len(late) - len(late) // 20 - 1)])
    evaluation = statistics.median(evaluations)
    return Probe(
        step_seconds=usual,
        evaluation_seconds=evaluation,
        fixed_seconds=max(0.0, wall - usual * len(took) - evaluation * len(evaluations)),
        peak_memory_mb=max(record["peak_memory_mb"] for record in records if "peak_memory_mb" in record),
        parameters=int(parameters),
        lrs=tuple(record["lr"] for record in steps),
        losses=tuple(record["loss"] for record in steps),
    )


def with_schedule(config: Config, name: str, **options: Any) -> Config:
    """The configuration with another schedule and no option of the one before."""
    import tomli_w

    raw = {**config.model_dump(by_alias=True), "schedule": {"name": name, **options}}
    return parse(tomli_w.dumps(raw))


def step_seconds(config: Config, corpus: Corpus, steps: int = 5) -> float:
    """Seconds of an uncompiled step of the configuration on one worker of this process, the median of a few."""
    from headway.train.display import Display
    from headway.train.loop import Trainer
    from headway.train.workers import Workers

    short = parse(
        with_schedule(config, "constant").to_toml(),
        [
            f"train.steps={steps}",
            'train.budget=""',
            "train.compile=false",
            "train.evaluate_every=0",
            "train.evaluate_batches=1",
            "launch.workers=1",
        ],
    )
    alone = Workers(rank=0, count=1, local_rank=0, local_count=config.launch.workers)
    trainer = Trainer(short, corpus, run=None, workers=alone, display=Display(quiet=True))
    times: list[float] = []
    trainer.display.step = lambda record: times.append(record["step_seconds"]) if "loss" in record else None  # type: ignore[method-assign]
    trainer.train()
    return statistics.median(times[1:] or times)
