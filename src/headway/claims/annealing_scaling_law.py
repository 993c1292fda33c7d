"""Two training curves predict those of two other schedules, in a model of SGD whose expected loss has a recursion.

Linear regression with d = 400 independent features of variance h_k = k^(-1.3) and noise of variance 0.2. The expected
squared errors v_k of SGD with batch size one follow

    L = sum_k h_k v_k / 2,   v_k <- (1 - eta h_k)^2 v_k + eta^2 h_k (2 L + 0.2),   v_k(0) = k^(-0.6)

and the curve is L + 0.1 + 1 (the 1 stands for the part of a loss that no model removes). The law is fitted to a
constant rate and a cosine; a decay at the end and a straight line are predicted. The baseline is the same law without
its annealing term: a power law in the sum of the rates.
"""

from __future__ import annotations

import numpy as np
import torch

from headway.budget.annealing_scaling_law import AnnealingLaw, Run
from headway.claims import Check, Outcome, Panel
from headway.schedules.profile import ConstantLR, CosineLR, LinearLR
from headway.schedules.wsd_s import WSDLR

__all__ = ["claim"]

PEAK, WARMUP = 0.1, 50
FITTED = ("constant", "cosine")
UNSEEN = ("decay at the end", "linear")
EVERY = 10


def claim(seed: int = 0, steps: int = 4000, lam: float = 0.99) -> Outcome:
    """The loss curves under unseen schedules from a fit to two others.

    Args:
        seed: unused; the curves are expectations.
        steps: of every run.
        lam: of the law.
    """
    schedules = _schedules(steps)
    after = np.arange(WARMUP + EVERY, steps + 1, EVERY)
    losses = {name: _expected_loss(lrs)[after - 1] for name, lrs in schedules.items()}
    runs = {name: Run(lrs, after, losses[name]) for name, lrs in schedules.items()}
    fitted = [runs[name] for name in FITTED]
    law = AnnealingLaw(lam=lam).fit(fitted)
    plain = AnnealingLaw(lam=lam, annealing=False).fit(fitted)
    error, plain_error = (
        {name: abs(float(model.predict(schedules[name], [steps])[0] - losses[name][-1])) for name in UNSEEN}
        for model in (law, plain)
    )
    checks = [
        Check(f"{name}, not fitted: R² of its curve", law.score(runs[name]), ">=", 0.99, plain.score(runs[name]))
        for name in UNSEEN
    ]
    checks += [
        Check(f"{name}, not fitted: error of the final loss", error[name], "<=", 0.005, plain_error[name])
        for name in UNSEEN
    ]
    ratio = plain_error[UNSEEN[0]] / error[UNSEEN[0]]
    checks.append(Check(f"{UNSEEN[0]}: error without the annealing term / with it", ratio, ">=", 2.0, 1.0))

    shown = after[len(after) // 4 :]
    panels = [
        Panel(
            "Learning rate",
            "step",
            "learning rate",
            {name: (after.tolist(), lrs[after - 1].tolist()) for name, lrs in schedules.items()},
            from_zero=True,
        )
    ]
    for name in UNSEEN:
        curves = {
            "measured": losses[name][-len(shown) :],
            "predicted": law.predict(schedules[name], shown),
            "predicted without annealing": plain.predict(schedules[name], shown),
        }
        panels.append(
            Panel(
                f"Not fitted: {name}",
                "step",
                "loss",
                {label: (shown.tolist(), values.tolist()) for label, values in curves.items()},
            )
        )
    return Outcome(
        statement="Two short training curves predict the loss at any step under schedules that were never run.",
        paper="One or two fitted curves predict the loss at any step under any schedule, at less than 1 % of the "
        "compute that fitting the chinchilla law takes (abstract).",
        checks=checks,
        panels=panels,
    )


def _schedules(steps: int) -> dict[str, np.ndarray]:
    """The rate of every step, by the name of the schedule."""

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)

    late = WSDLR(trainer := optimizer(), warmup_steps=WARMUP, decay="exponential", min_lr_ratio=0.1)
    decay = steps // 5
    for _ in range(steps - decay):
        trainer.step()
        late.step()
    late.begin_decay(decay)
    by_name = {
        "constant": ConstantLR(optimizer(), steps, warmup_steps=WARMUP),
        "cosine": CosineLR(optimizer(), steps, warmup_steps=WARMUP, lr_min_ratio=0.1),
        "decay at the end": late,
        "linear": LinearLR(optimizer(), steps, warmup_steps=WARMUP, lr_min_ratio=0.1),
    }
    return {name: np.array([float(s.lr_at(t)[0]) for t in range(steps)]) for name, s in by_name.items()}


def _expected_loss(lrs: np.ndarray) -> np.ndarray:
    """The expected loss after each step."""
    k = np.arange(1.0, 401.0)
    h, v = k**-1.3, k**-0.6
    losses = np.empty(len(lrs))
    for step, eta in enumerate(lrs):
        v = (1 - eta * h) ** 2 * v + eta**2 * h * (h @ v + 0.2)
        losses[step] = h @ v / 2 + 1.1
    return losses
