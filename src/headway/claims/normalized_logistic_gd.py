"""Dividing the gradient by the mean weight of the examples makes the number of steps independent of their number.

The paper's worst case: one example (0.5, -1) of label +1 and n - 1 examples (-0.5, -1) of label -1, theta_0 = 0, no
intercept, fp64. Then the handwritten digits 3 against five of the 8s, pixels / 16 and an intercept. Steps are
counted until all margins are > 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.claims import Check, Outcome, Panel
from headway.optim.normalized_logistic_gd import separate

__all__ = ["claim", "digits", "worst_case"]

# Table 1 of the paper: steps of the normalized rule on the worst case, by gamma; n = 1000 reproduces it.
TABLE = {100.0: 2, 10.0: 2, 1.0: 16, 0.1: 157}
PLAIN = 308  # of plain gradient descent at gamma = 100
SIZES = (500, 1000, 2000)


def worst_case(n: int) -> Tensor:
    """The rows y_i x_i, shape (n, 2)."""
    return torch.tensor([[0.5, -1.0]] + [[0.5, 1.0]] * (n - 1), dtype=torch.float64)


def digits() -> Tensor:
    """The rows y_i x_i of all 3s (+1) and the first five 8s (-1), shape (188, 65)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = 'the claim of normalized-logistic-gd needs scikit-learn: pip install "headway[estimators]"'
        raise ImportError(message) from error
    bunch = load_digits()
    pixels, target = torch.from_numpy(bunch.data) / 16, torch.from_numpy(bunch.target)
    rows = torch.cat([pixels[target == 3], pixels[target == 8][:5]])
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    signs = torch.ones(len(rows), 1)
    signs[-5:] = -1
    return rows * signs


def claim(seed: int = 0, rule: str = "normalized") -> Outcome:
    """Measure the claim; nothing in it is random, so `seed` has no effect. `rule` is the rule under test."""
    worst = worst_case(1000)
    steps = {gamma: separate(worst, rule, gamma).iterations for gamma in TABLE}
    plain = {n: separate(worst_case(n), "logistic", 100.0).iterations for n in SIZES}
    normalized = {n: separate(worst_case(n), rule, 100.0).iterations for n in SIZES}

    # The first step misclassifies the first example with a loss that grows like gamma / 8; the second separates.
    crossing = torch.tensor([[1.0, -1.0], [1.0, 4.0]])
    path = separate(crossing, "logistic", 1000.0, track=True)

    z = digits()
    on_digits = {gamma: separate(z, rule, gamma, track=True) for gamma in (1.0, 10.0, 100.0)}
    plain_digits = separate(z, "logistic", 1.0, track=True)

    checks = [
        Check(
            "largest deviation from the paper's table over gamma = 100, 10, 1, 0.1, in steps",
            max(abs(steps[gamma] - TABLE[gamma]) for gamma in TABLE),
            "<=",
            0,
        ),
        Check("deviation from the paper's table of plain descent, in steps", abs(plain[1000] - PLAIN), "<=", 0),
        Check("steps with 2000 examples", normalized[2000], "<=", 2, baseline=plain[2000]),
        Check("growth of plain descent's steps from 500 to 2000 examples", plain[2000] / plain[500], ">=", 4),
        Check(
            "loss after the step before the one that separates, in units of the loss at the start",
            path.history["loss"][-2] / path.history["loss"][0] if path.separated and path.iterations == 2 else 0.0,
            ">=",
            100,
        ),
        Check(
            "steps on the digits, most over gamma = 1, 10, 100",
            max(found.iterations for found in on_digits.values()),
            "<=",
            25,
            baseline=plain_digits.iterations,
        ),
        Check("steps of plain descent with gamma = 1 on the digits", plain_digits.iterations, ">=", 100),
    ]
    accuracy = {f"normalized, gamma {gamma:g}": found.history["accuracy"] for gamma, found in on_digits.items()}
    accuracy["plain descent, gamma 1"] = plain_digits.history["accuracy"]
    panels = [
        Panel(
            "Worst case, gamma = 100",
            "examples",
            "steps to a separator",
            {
                "plain descent": ([float(n) for n in SIZES], [float(plain[n]) for n in SIZES]),
                "normalized": ([float(n) for n in SIZES], [float(normalized[n]) for n in SIZES]),
            },
            log_y=True,
        ),
        Panel(
            "Digits, 3 against five 8s",
            "step",
            "training accuracy",
            {name: ([float(step) for step in range(len(values))], values) for name, values in accuracy.items()},
        ),
    ]
    return Outcome(
        statement="On imbalanced separable data the normalized step finds a separator in a few steps, whatever their "
        "number, where plain descent with large steps needs proportionally many.",
        paper="Table 1, steps to accuracy 1 on the worst case: 2, 2, 16, 157 normalized at gamma 100, 10, 1, 0.1; 308 "
        "for gradient descent. Imbalanced Fashion-MNIST: 311 to 504 against 538; balanced: no gain.",
        checks=checks,
        panels=panels,
    )
