r"""Pre-training when unique data, not compute, is the limit: strong decay, ensembles, asymptotes, distillation.

    L(x) = A / x^B + C        x: parameters, ensemble members or tokens; recipes are compared by C
    z = (1/K) sum_k z_k / T   the prediction of K models that differ in their seeds only

1. Search rate, weight decay and epochs jointly per size (`LocalSearch` over `RECIPE_GRIDS`); the decay that wins is
   far above 0.1, and with it the loss falls with the size.
2. Train K members with the settings of `ensemble_recipe` (`train_ensemble`, `LogitEnsemble`, `ensemble_curve`).
3. Compare asymptotes (`PowerLawAsymptote`, `joint_asymptote`) and turn them into data (`data_multiplier`).
4. Put the ensemble into one model (`sample_teachers` with `MixedDataset`, or `distillation_loss`).

This file holds 3 and the settings of 2; the tools are in `local_search`, `logit_ensemble` and `distillation`.

Weight decay multiplies the learning rate, theta <- theta (1 - lr wd): another rate schedule is another decay. Leave
norms, biases and embeddings out of it. An ensemble costs K forward passes.

Source: "Pre-training under infinite compute", Kim, Kotha, Liang, Hashimoto, arXiv 2509.14786.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from headway.constraints import Constraint, Range, check_arguments
from headway.numerics.fitting import PowerLaw, fit_power_law, observations
from headway.plots import Panel

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["PowerLawAsymptote", "data_multiplier", "ensemble_recipe", "joint_asymptote"]

_POSITIVE = Range(low=0, low_open=True)
_COUNT = Range(low=1, integer=True)
_LEVEL = Range(low=0, high=1, low_open=True, high_open=True)


class PowerLawAsymptote:
    r"""The limit that a loss approaches as size, members or data grow.

        L(x) = A / x^B + C,   A, B, C >= 0,   least squares in L

    After `fit`: `A_`, `B_`, `C_` (the asymptote) and `identified_`. Three parameters on four or five points
    have wide intervals: asymptotes closer than `interval(math.inf)` are not different.

    Args:
        exponent: hold B at this value > 0. Default None: B is fitted, in [0.001, 20].

    Raises:
        ValueError: exponent is not > 0.

    Source: arXiv 2509.14786. B is searched over its whole range and A, C are solved for (variable projection),
    where the authors descend from the start (1, 0.5, 2); the interval is an addition.

    >>> law = PowerLawAsymptote().fit([1, 2, 3, 4, 5], [3.7, 3.45, 3.3667, 3.325, 3.3])
    >>> round(law.B_, 2), round(law.C_, 2)
    (1.0, 3.2)
    >>> round(law.equivalent_x(law.predict(7.0)), 6)
    7.0
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"exponent": Range(low=0, low_open=True, optional=True)}

    A_: float
    B_: float
    C_: float
    identified_: bool

    def __init__(self, *, exponent: float | None = None) -> None:
        check_arguments(self.constraints, exponent=exponent)
        self.exponent = exponent
        self._law: PowerLaw | None = None
        self._data: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._replicates: list[PowerLaw] | None = None

    def fit(self, x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> PowerLawAsymptote:
        """Fit A, B and C; warns where the data do not identify C (C = 0, A = 0, or B at a bound of its range).

        Args:
            x: n values > 0. Sizes are best given in billions.
            y: n losses.
            weights: n weights >= 0. Default: 1 each.

        Raises:
            ValueError: fewer than three different x (two with a given exponent), or values that are not finite.
        """
        xs, ys = observations(x, y)
        w = np.ones_like(xs) if weights is None else np.array(weights, dtype=float)
        if w.shape != xs.shape or not (np.isfinite(w) & (w >= 0)).all():
            raise ValueError(f"weights must be {len(xs)} finite numbers >= 0, got {w.tolist()}")
        needed, found = self._parameters(), len(np.unique(xs[w > 0]))
        if found < needed:
            raise ValueError(f"x must hold at least {needed} different values to fit {needed} parameters, got {found}")
        counted = w > 0
        self._data, self._replicates = (xs[counted], ys[counted], w[counted]), None
        law = self._solve(*self._data)
        self._take(law)
        if not self.identified_:
            warnings.warn(
                "asymptote not identified: the fit ends at a bound "
                f"(A = {law.a:.4g}, B = {law.b:.4g}, C = {law.c:.4g})",
                stacklevel=2,
            )
        return self

    def _take(self, law: PowerLaw) -> None:
        self._law = law
        self.A_, self.B_, self.C_ = law.a, law.b, law.c
        # Where A or C is zero, rounding leaves it the size of the last bits.
        assert self._data is not None
        most = law.predict(float(self._data[0].min()))
        self.identified_ = law.identified and min(law.c, most - law.c) > 1e-9 * most

    def _parameters(self) -> int:
        return 3 if self.exponent is None else 2

    def _solve(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> PowerLaw:
        if self.exponent is None:
            return fit_power_law(x, y, weights=weights, a=(0, math.inf), c=(0, math.inf))
        from scipy.optimize import nnls

        root = np.sqrt(weights)
        scale = float(x.min())
        matrix = np.stack([(x / scale) ** -self.exponent, np.ones_like(x)], axis=1) * root[:, None]
        (a, c), norm = nnls(matrix, root * y)
        return PowerLaw(float(a) * scale**self.exponent, self.exponent, float(c), float(norm) ** 2)

    def _fitted(self) -> PowerLaw:
        if self._law is None:
            raise RuntimeError("PowerLawAsymptote has not been fitted: call fit() first")
        return self._law

    def predict(self, x: ArrayLike) -> Any:
        """L at `x` > 0; `math.inf` gives the asymptote. A float for a float, else an array.

        Raises:
            ValueError: an x is not > 0.
            RuntimeError: before `fit`.
        """
        law = self._fitted()
        if not (np.asarray(x, dtype=float) > 0).all():
            raise ValueError(f"x must be > 0, got {x!r}")
        return law.predict(x)

    def interval(self, x: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
        """Where L at `x` lies, by the delete-one jackknife: the ends (low, high), of the shape of `predict(x)`.

            variance = (n-1)/n sum_i (L_(i) - mean_i L_(i))^2,   L -+ t_{n-p} sqrt(variance),   low >= 0

        p is the number of fitted parameters. Where leaving a point out leaves too few to fit, the interval is
        (0, infinity). The points count as independent; losses of ensembles of 1 ... K members of one pool are not,
        and their interval is that of this pool.

        Args:
            x: values > 0; `math.inf` for the asymptote.
            level: confidence in (0, 1). Default 0.95.

        Raises:
            ValueError: level is not in (0, 1), or an x is not > 0.
            RuntimeError: before `fit`.
        """
        check_arguments({"level": _LEVEL}, level=level)
        centre = self.predict(x)
        assert self._data is not None
        n = len(self._data[0])
        distinct = min(len(np.unique(np.delete(self._data[0], i))) for i in range(n))
        if distinct < self._parameters():
            reach = np.full(np.shape(centre), math.inf)
        else:
            from scipy.special import stdtrit

            if self._replicates is None:
                self._replicates = [self._solve(*(np.delete(v, i) for v in self._data)) for i in range(n)]
            values = np.array([law.predict(x) for law in self._replicates])
            error = np.sqrt((n - 1) * values.var(axis=0))
            reach = stdtrit(n - self._parameters(), (1 + level) / 2) * error
        low, high = np.maximum(centre - reach, 0.0), np.asarray(centre + reach)
        return (float(low), float(high)) if np.ndim(x) == 0 else (low, high)

    def equivalent_x(self, loss: float) -> float:
        """The x at which the law reaches `loss`, (A / (loss - C))^(1/B); infinity for a loss <= C.

        Raises:
            RuntimeError: before `fit`.
        """
        return self._fitted().inverse(loss)

    def panels(self) -> list[Panel]:
        """The data, the fit up to ten times the largest x, its 95 % interval and its asymptote."""
        self._fitted()
        assert self._data is not None
        x, y, _ = self._data
        grid = np.geomspace(x.min(), 10 * x.max(), 65)
        low, high = self.interval(grid)
        ends = {f"95 % {side}": (grid, values) for side, values in (("low", low), ("high", high))}
        curves = {
            **(ends if np.isfinite(high).all() else {}),
            "fit": (grid, self.predict(grid)),
            "asymptote": (grid[[0, -1]], np.full(2, self.C_)),
            "measured": (x, y),
        }
        lists = {name: (list(map(float, a)), list(map(float, b))) for name, (a, b) in curves.items()}
        styles: dict[str, Any] = {name: "faint" for name in ends if name in curves}
        return [
            Panel("Power law with asymptote", "x", "loss", lists, log_x=True, styles={**styles, "measured": "points"})
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fit and its data as plain values.

        Raises:
            RuntimeError: before `fit`.
        """
        law = self._fitted()
        assert self._data is not None
        x, y, weights = (values.tolist() for values in self._data)
        fitted = {"A": law.a, "B": law.b, "C": law.c, "sse": law.sse, "identified": law.identified}
        return {"exponent": self.exponent, **fitted, "x": x, "y": y, "weights": weights}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PowerLawAsymptote:
        """The fit that `to_dict` wrote."""
        planner = cls(exponent=values["exponent"])
        x, y, weights = (np.array(values[name], dtype=float) for name in ("x", "y", "weights"))
        planner._data = (x, y, weights)
        planner._take(PowerLaw(values["A"], values["B"], values["C"], values["sse"], values["identified"]))
        return planner


def joint_asymptote(table: Mapping[float, Mapping[int, float]]) -> PowerLawAsymptote:
    """The limit of infinitely many members of infinite size: C_N over the members K, then the law of C_N over N.

    Args:
        table: size N -> {members K: loss}; at least three sizes with at least three K each.

    Returns:
        The fitted law of C_N over N: `C_` is the joint asymptote, `predict(N)` the asymptote at one size. Its
        interval does not hold the errors of the C_N. Warns where a C_N is not identified.

    Raises:
        ValueError: fewer sizes or K than three.

    Source: arXiv 2509.14786; members first, sizes second, as the authors do.

    >>> table = {N: {K: 3 + 0.2 / N + 0.1 / K for K in (1, 2, 3, 4)} for N in (0.15, 0.3, 0.6)}
    >>> round(joint_asymptote(table).C_, 4)
    3.0
    """
    limits: dict[float, PowerLawAsymptote] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size, losses in table.items():
            limits[size] = PowerLawAsymptote().fit(list(losses), list(losses.values()))
    unsure = [size for size, law in limits.items() if not law.identified_]
    if unsure:
        warnings.warn(f"asymptote over the members not identified at size {unsure}", stacklevel=2)
    return PowerLawAsymptote().fit(list(limits), [law.C_ for law in limits.values()])


def data_multiplier(law: PowerLawAsymptote, tokens: float, loss: float) -> float:
    """How many times the data the baseline would need for a recipe's loss: D_eq / D, D_eq = (A / (loss - C))^(1/B).

    Args:
        law: the baseline's law over tokens D, fitted.
        tokens: D > 0 that the recipe used, in the unit of the law's x.
        loss: of the recipe; at or below the baseline's asymptote the result is infinite.

    Raises:
        ValueError: tokens is not > 0.

    >>> law = PowerLawAsymptote().fit([1, 2, 4, 8], [4.0, 3.5, 3.25, 3.125])
    >>> round(data_multiplier(law, 2.0, 3.25), 6)
    2.0
    """
    check_arguments({"tokens": _POSITIVE}, tokens=tokens)
    return law.equivalent_x(loss) / tokens


def ensemble_recipe(epochs: int, weight_decay: float) -> tuple[int, float]:
    """Epochs and decay for the members from those of the best single model: (min(2 E, 128), max(wd / 2, 0.1)).

    Members may overfit a little more than a model that stands alone: averaging takes the variance away, and settings
    tuned for one model understate the ensemble.

    Args:
        epochs: E of the best single model, >= 1.
        weight_decay: of the best single model, >= 0.

    Raises:
        ValueError: an argument out of its range.

    Source: arXiv 2509.14786; bounds as in the authors' code. More than 128 epochs or a decay below 0.1 stay as given.

    >>> ensemble_recipe(16, 1.6)
    (32, 0.8)
    """
    check_arguments({"epochs": _COUNT, "weight_decay": Range(low=0)}, epochs=epochs, weight_decay=weight_decay)
    return max(epochs, min(2 * epochs, 128)), min(weight_decay, max(weight_decay / 2, 0.1))
