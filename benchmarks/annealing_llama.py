"""The annealing law on real curves: fitted to a constant and a cosine run, it predicts a WSD and a multi-step run.

    python benchmarks/annealing_llama.py [--steps 600] [--write docs/benchmarks]

A Llama of 0.3 M parameters on the source text of Python's standard library; the validation loss is measured every 20
steps. The law is fitted to the first two runs after `--from-step` and read for the schedules of the others: mean and
largest error over the whole curve, relative to the loss. All runs start from the same weights and see the same data,
as the law supposes; `--seeds-differ` gives each its own, which adds what one seed differs from another.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from headway.budget import AnnealingLaw, Run
from headway.config import load
from headway.plan.sizes import size_named
from headway.plots import Panel, save
from headway.schedules import WSDSLR, ConstantLR, CosineLR, ProfileLR
from headway.schedules.profile import Step
from headway.train.display import Display
from headway.train.loop import Trainer
from headway.train.session import prepare_corpus
from machine import describe

WARMUP = 20
SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: ConstantLR(optimizer, steps, warmup_steps=WARMUP),
    "cosine": lambda optimizer, steps: CosineLR(optimizer, steps, warmup_steps=WARMUP),
    "wsd": lambda optimizer, steps: WSDSLR(optimizer, [steps], warmup_steps=WARMUP, decay_fraction=0.2),
    "multi-step": lambda optimizer, steps: ProfileLR(
        optimizer, Step(at=(0.5, 0.8), drop=0.3), steps, warmup_steps=WARMUP
    ),
}
FITTED, UNSEEN = ("constant", "cosine"), ("wsd", "multi-step")


def train(name: str, steps: int, seed: int) -> Run:
    sizes = [f"model.{key}={value}" for key, value in size_named("xxs").section().items()]
    config = load(
        overrides=[
            *sizes,
            f"train.steps={steps}",
            "train.evaluate_every=20",
            f"train.seed={seed}",
            "schedule.name=constant",
        ]
    )
    trainer = Trainer(config, prepare_corpus(config, Display(quiet=True)), display=Display(quiet=True))
    for group in trainer.optimizer.param_groups:
        group["lr"] = group.pop("initial_lr")
    trainer.schedule = SCHEDULES[name](trainer.optimizer, steps)
    lrs: list[float] = []
    losses: dict[int, float] = {}

    def look(record: dict) -> None:
        if "loss" in record:
            lrs.append(record["lr"])
        else:
            losses[record["step"]] = record["validation_loss"]

    trainer.display.step = look
    trainer.train()
    return Run(lrs, list(losses), list(losses.values()))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=600)
    options.add_argument(
        "--from-step", type=int, default=200, help="the law does not hold for a loss still on its plateau"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seeds-differ", action="store_true", help="another seed for every run")
    options.add_argument("--write", type=Path, help="folder for the figures and the picture")
    arguments = options.parse_args()
    runs = {}
    for number, name in enumerate(SCHEDULES):
        runs[name] = train(name, arguments.steps, number if arguments.seeds_differ else arguments.seed)
        print(f"{name}: {runs[name].losses[-1]:.4f}", flush=True)
    shown = {}
    for name, run in runs.items():
        kept = [i for i, step in enumerate(run.steps) if step >= arguments.from_step]
        shown[name] = Run(run.lrs, [run.steps[i] for i in kept], [run.losses[i] for i in kept])
    law = AnnealingLaw(lam="auto").fit([shown[name] for name in FITTED])
    results = {}
    for name, run in shown.items():
        predicted = law.predict(run.lrs, run.steps)
        errors = np.abs(predicted / np.array(run.losses) - 1)
        results[name] = {"mean": float(errors.mean()), "largest": float(errors.max()), "end": float(errors[-1])}
        kind = "fitted" if name in FITTED else "unseen"
        print(
            f"{name:12} {kind}: mean error {errors.mean():.2%}, largest {errors.max():.2%}, at the end {errors[-1]:.2%}"
        )
    print(law.params_, describe())
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        curves = {name: {"steps": list(run.steps), "losses": list(run.losses)} for name, run in runs.items()}
        figures = {
            "machine": describe(),
            "length": arguments.steps,
            "errors": results,
            "law": law.params_,
            "lam": law.lam_,
        }
        figures["curves"] = curves
        (arguments.write / "annealing.json").write_text(json.dumps(figures, indent=1))
        panels = [
            Panel(
                f"Not fitted: {name}",
                "step",
                "validation loss",
                {
                    "measured": (list(shown[name].steps), list(shown[name].losses)),
                    "predicted": (list(shown[name].steps), law.predict(shown[name].lrs, shown[name].steps).tolist()),
                },
                styles={"measured": "points"},
            )
            for name in UNSEEN
        ]
        save(panels, arguments.write / "annealing.svg")


if __name__ == "__main__":
    main()
