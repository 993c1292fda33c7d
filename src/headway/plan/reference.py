r"""What runs of this kind have reached before: loss by model size, tokens and schedule.

    L(P, eta) = E + A S1^(-alpha) + B P^(-beta) - C S2

P counts millions of parameters without the embedding, S1 is the area under the learning rate relative to
its peak, in millions of tokens, and S2 the annealing area of the same curve: the law of
`headway.budget.annealing_scaling_law` with a term for the size. Its numbers come from runs on the source
text of Python's standard library at the defaults of `headway train`, made by `benchmarks/plan_reference.py`
and kept in `reference.json`. Another text is brought in by a short run on it: its early loss, relative to the
reference's at the same steps, scales the curve.

Source: the annealing law is arXiv 2408.11029; the term in P follows the usual scaling laws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.budget.annealing_scaling_law import annealing_area, forward_area

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Curve", "Reference", "reference"]

DECAY = 0.99
# Steps over which a short run is compared with the reference: past the warm-up, where the loss is steepest.
COMPARED = (20, 60)


@dataclass(frozen=True)
class Curve:
    """A run: millions of parameters without embedding, tokens per step, a rate per step, losses after some steps."""

    size: float
    tokens_per_step: int
    lrs: tuple[float, ...]
    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def areas(self) -> tuple[np.ndarray, np.ndarray]:
        """S1 in millions of tokens, S2 per peak, at the curve's steps."""
        S1, S2 = areas(self.lrs, self.tokens_per_step)
        at = np.asarray(self.steps) - 1
        return S1[at], S2[at]


def areas(lrs: ArrayLike, tokens_per_step: float) -> tuple[np.ndarray, np.ndarray]:
    """S1 in millions of tokens and S2, both relative to the peak rate, after each step."""
    rates = np.asarray(lrs, dtype=float)
    rates = rates / rates.max()
    warmup = int(rates.argmax())
    return forward_area(rates) * tokens_per_step / 1e6, annealing_area(rates, DECAY, warmup)


@dataclass(frozen=True)
class Reference:
    """The fitted law, the early losses of its runs, and how far it was off on them.

    Args:
        numbers: E, A, alpha, B, beta, C.
        spread: standard deviation of the relative error.
        early: size in millions of parameters -> mean training loss over the steps `COMPARED`.
        limits: smallest and largest S1 and P of the runs.
        settings: tokens per step and vocabulary of the runs, and their learning rate times the model's width.
    """

    numbers: Mapping[str, float]
    spread: float
    early: Mapping[float, float]
    limits: Mapping[str, tuple[float, float]]
    settings: Mapping[str, float]

    def losses(self, size: float, lrs: ArrayLike, tokens_per_step: float) -> np.ndarray:
        """The validation loss after every step; NaN where S1 is too small for the law."""
        S1, S2 = areas(lrs, tokens_per_step)
        n = self.numbers
        with np.errstate(divide="ignore"):
            loss = n["E"] + n["A"] * S1 ** -n["alpha"] + n["B"] * size ** -n["beta"] - n["C"] * S2
        return np.where(self.limits["S1"][0] * 0.99 <= S1, loss, np.nan)

    def early_loss(self, size: float) -> float:
        """The reference's mean training loss over the steps `COMPARED`, interpolated in log P."""
        sizes = sorted(self.early)
        return float(np.interp(math.log(size), np.log(sizes), [self.early[s] for s in sizes]))

    def outside(self, size: float, tokens: float) -> str:
        """What of a plan lies beyond the runs behind the law, as a phrase; empty if nothing does."""
        parts = []
        for name, value, unit in (("P", size, "M parameters"), ("S1", tokens / 1e6, "M tokens")):
            low, high = self.limits[name]
            if not low * 0.99 <= value <= high * 1.01:
                parts.append(f"{value:.3g} {unit} (measured: {low:.3g} to {high:.3g})")
        return " and ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "numbers": dict(self.numbers),
            "spread": self.spread,
            "early": {str(size): loss for size, loss in self.early.items()},
            "limits": {name: list(pair) for name, pair in self.limits.items()},
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reference:
        """The reference that `to_dict` described."""
        return cls(
            numbers=values["numbers"],
            spread=values["spread"],
            early={float(size): loss for size, loss in values["early"].items()},
            limits={name: (pair[0], pair[1]) for name, pair in values["limits"].items()},
            settings=values["settings"],
        )

    @classmethod
    def fit(cls, curves: Sequence[Curve], early: Mapping[float, float], settings: Mapping[str, float]) -> Reference:
        """Fit the law to curves of at least two sizes by robust least squares on the logarithm of the loss.

        Raises:
            ValueError: all curves have one size, so that B cannot be told from E.
        """
        from scipy.optimize import least_squares

        if len({curve.size for curve in curves}) < 2:
            raise ValueError("curves must be of at least two model sizes, got one")
        pairs = [curve.areas() for curve in curves]
        S1, S2 = (np.concatenate(columns) for columns in zip(*pairs, strict=True))
        P = np.concatenate([np.full(len(curve.steps), curve.size) for curve in curves])
        y = np.log(np.concatenate([curve.losses for curve in curves]))

        def law(x: np.ndarray) -> np.ndarray:
            E, A, alpha, B, beta, C = x
            return E + A * S1**-alpha + B * P**-beta - C * S2

        def residual(x: np.ndarray) -> np.ndarray:
            return np.log(np.maximum(law(x), 1e-3)) - y

        best = min(
            (
                least_squares(
                    residual,
                    [1.0, 2.0, alpha, 0.5, beta, 1e-3],
                    bounds=([0, 0, 0.05, 0, 0.05, 0], [4, 20, 2, 5, 2, 1]),
                    loss="soft_l1",
                    f_scale=0.01,
                    x_scale=[1, 1, 0.3, 1, 0.3, 1e-3],
                    max_nfev=5000,
                )
                for alpha in (0.2, 0.5, 1.0)
                for beta in (0.1, 0.4)
            ),
            key=lambda fit: fit.cost,
        )
        return cls(
            numbers=dict(zip(("E", "A", "alpha", "B", "beta", "C"), map(float, best.x), strict=True)),
            spread=float(residual(best.x).std()),
            early=dict(early),
            limits={"S1": (float(S1.min()), float(S1.max())), "P": (float(P.min()), float(P.max()))},
            settings=dict(settings),
        )


@cache
def reference() -> Reference:
    """The reference that comes with the package."""
    text = resources.files("headway.plan").joinpath("reference.json").read_text(encoding="utf-8")
    return Reference.from_dict(json.loads(text)["reference"])
