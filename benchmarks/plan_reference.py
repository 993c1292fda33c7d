"""The runs behind `headway plan`'s predicted losses, and the law fitted to them.

    python benchmarks/plan_reference.py --runs FOLDER [--write src/headway/plan/reference.json]

Trains each of `RUNS` with `headway train` at its defaults on the Python standard library's text (about twelve minutes
on two cores in all; runs that FOLDER holds already are not repeated), fits the law of `headway.plan.reference`, and
shows its error on every run, also when that run is left out of the fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from headway.config import load
from headway.plan.reference import COMPARED, Curve, Reference
from headway.plan.sizes import LR_TIMES_WIDTH, size_named
from machine import describe

RUNS = {"xxs-700": 50, "xxs-2400": 100, "xs-600": 40}
"""Size and steps -> steps between evaluations."""
# The law does not hold for the first steps, where the loss waits for the model to leave the unigram's plateau.
FROM_STEP = 400
SETTINGS = {"tokens_per_step": 2048, "vocab_size": 2048, "lr_times_width": LR_TIMES_WIDTH}


def train(name: str, every: int, folder: Path) -> None:
    size, steps = size_named(name.split("-")[0]), name.split("-")[1]
    sets = [f"model.{key}={value}" for key, value in size.section().items()]
    sets += [
        f"optimizer.lr={size.learning_rate()}",
        f"train.steps={steps}",
        f"train.evaluate_every={every}",
        "checkpoint.every=0",
        "sample.tokens=0",
    ]
    command = [sys.executable, "-m", "headway", "train", "--out", str(folder)]
    subprocess.run([*command, *(part for item in sets for part in ("--set", item))], check=True)


def read(folder: Path) -> tuple[Curve, float]:
    """The curve of validation losses, and the mean training loss over the compared steps."""
    config = load(folder / "config.toml")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    losses = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    kept = {step: loss for step, loss in losses.items() if step >= FROM_STEP}
    section = config.model
    size = next(
        candidate.body() / 1e6
        for candidate in map(size_named, ("xxs", "xs", "s", "m"))
        if (candidate.hidden_size, candidate.layers) == (section.hidden_size, section.layers)
    )
    curve = Curve(
        size=size,
        tokens_per_step=config.batch.size * config.data.sequence_length,
        lrs=tuple(record["lr"] for record in steps),
        steps=tuple(kept),
        losses=tuple(kept.values()),
    )
    first, last = COMPARED
    return curve, float(np.mean([record["loss"] for record in steps[first:last]]))


def error(law: Reference, curve: Curve) -> tuple[float, float]:
    """Mean relative error over the curve, and the signed one at its end."""
    predicted = law.losses(curve.size, curve.lrs, curve.tokens_per_step)[np.array(curve.steps) - 1]
    relative = predicted / np.array(curve.losses) - 1
    return float(np.nanmean(np.abs(relative))), float(relative[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    options.add_argument("--write", type=Path, help="file for the law")
    arguments = options.parse_args()
    for name, every in RUNS.items():
        if not (arguments.runs / name / "model" / "config.json").is_file():
            train(name, every, arguments.runs / name)
    curves, early = {}, {}
    for name in RUNS:
        curves[name], loss = read(arguments.runs / name)
        early.setdefault(curves[name].size, []).append(loss)
    means = {size: float(np.mean(losses)) for size, losses in early.items()}
    law = Reference.fit(list(curves.values()), means, SETTINGS)
    print(json.dumps(law.to_dict(), indent=1))
    print(f"{'run':10} {'mean error':>11} {'at the end':>11} {'left out':>11} {'at the end':>11}")
    for name, curve in curves.items():
        others = [other for key, other in curves.items() if key != name]
        if len({other.size for other in others}) < 2:
            continue
        without = Reference.fit(others, means, SETTINGS)
        # The law of the others is read at every point, beyond their limits too.
        without = Reference.from_dict({**without.to_dict(), "limits": law.to_dict()["limits"]})
        (mean, end), (mean_out, end_out) = error(law, curve), error(without, curve)
        print(f"{name:10} {mean:>11.2%} {end:>+11.2%} {mean_out:>11.2%} {end_out:>+11.2%}")
    if arguments.write:
        values = {
            "reference": law.to_dict(),
            "runs": list(RUNS),
            "machine": describe(),
        }
        arguments.write.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
