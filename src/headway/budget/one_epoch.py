r"""One epoch over more data instead of many over less, and the size that one epoch pays for.

With P parameters, I iterations of b tokens and K = I b tokens, compute is proportional to P K:

    replace epochs:  E epochs over N tokens  ->  one epoch over K = E N tokens, no dropout
    adjust size:     (P, I)  ->  (m P, I / m),   m = sqrt(K / (R P))    so that tokens per parameter become R

Every gradient is then taken on fresh data, the training loss estimates the test loss, and the loss follows a power law
L(i) = c + a i^(-s) over most of training. `headway.budget.fresh_data` keeps data from being repeated. It is not for the
case that unique data run out before compute does.

Source: "One Epoch Is All You Need", Komatsuzaki, arXiv 1906.06669.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.numerics import fitting
from headway.plots import Panel

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "OneEpochPlan",
    "PowerLaw",
    "TransformerShape",
    "plan_one_epoch",
    "speedup",
    "transformer_shape",
]

RATIOS = {"komatsuzaki": 5.0, "chinchilla": 20.0}
"""Tokens per parameter by name."""

FREE_EPOCHS = 4.0  # up to about here, repeated data are worth nearly as much as fresh ones
POSITIVE = Range(low=0, low_open=True)
MOST_POINTS = 2000
FEWEST_POINTS = 8
BLOCKS = 20


@dataclass(frozen=True)
class OneEpochPlan:
    """A run of one epoch.

    Attributes:
        params: m P, before it is rounded to a shape (see `transformer_shape`).
        iterations: I / m, rounded to a whole number.
        tokens: K / m, before rounding.
        tokens_per_iter: b.
        epochs: passes over the data that there are: 1, or tokens / unique_tokens where they do not suffice.
        unique_tokens: tokens that the run needs, or all there are.
        ratio: tokens / params.
        multiplier: m, exact.
        compute_ratio: P K (or time) with the rounded iterations over that of the given run.
        dropout: 0, or None where data are repeated and regularisation is a question again.
    """

    params: float
    iterations: int
    tokens: float
    tokens_per_iter: float
    epochs: float
    unique_tokens: float
    ratio: float
    multiplier: float
    compute_ratio: float
    dropout: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def plan_one_epoch(
    params: float,
    tokens_per_iter: float,
    *,
    iterations: float | None = None,
    dataset_tokens: float | None = None,
    epochs: float | None = None,
    ratio: float | str | None = 5.0,
    available_tokens: float | None = None,
    time_per_iter: Callable[[float], float] | None = None,
    strict: bool = True,
) -> OneEpochPlan:
    r"""The one-epoch run that costs what a given run costs, with `ratio` tokens per parameter.

        K = I b   or   K = E N,      m = sqrt(K / (R P)),      (P, I, K) -> (m P, I / m, K / m)

    With `time_per_iter` t, wall-clock time stays instead of P K: m solves t(m P) R m P / b = t(P) I. A schedule that
    spans I has to be built again for the new number of iterations, and a larger model usually needs a lower peak rate.

    Args:
        params: P of the given run, > 0. Leave embeddings out where the vocabulary is large.
        tokens_per_iter: b > 0, without padding.
        iterations: I > 0 of the given run; or `epochs` and `dataset_tokens`.
        dataset_tokens: N > 0, for a run of several epochs.
        epochs: E > 0, the passes over N of the given run.
        ratio: R > 0, or "komatsuzaki" (5) or "chinchilla" (20); None replaces epochs and keeps the size. Default 5,
            the paper's for its models of up to some ten million parameters; later work on larger models uses about 20.
        available_tokens: unique tokens that there are. Default: as many as it takes.
        time_per_iter: parameters -> seconds per iteration, increasing. Default: proportional to P.
        strict: refuse a plan that repeats any data. False accepts it, and warns above 4 epochs. Default True.

    Raises:
        ValueError: an argument out of its range, both or neither of `iterations` and `epochs`, fewer than half an
            iteration, too few tokens (if `strict`), or no size that fits the time.

    Source: arXiv 1906.06669 for the rules; the limit of 4 epochs is of later work on repeated data.

    >>> plan = plan_one_epoch(15e6, 13_500, iterations=65_000)
    >>> f"{plan.params:.4g} parameters, {plan.iterations} iterations, {plan.tokens:.4g} tokens"
    '5.131e+07 parameters, 19003 iterations, 2.565e+08 tokens'
    """
    optional = Range(low=0, low_open=True, optional=True)
    check_arguments(
        {
            "params": POSITIVE,
            "tokens_per_iter": POSITIVE,
            "iterations": optional,
            "dataset_tokens": optional,
            "epochs": optional,
            "available_tokens": optional,
            "strict": OneOf(True, False),
        },
        params=params,
        tokens_per_iter=tokens_per_iter,
        iterations=iterations,
        dataset_tokens=dataset_tokens,
        epochs=epochs,
        available_tokens=available_tokens,
        strict=strict,
    )
    if isinstance(ratio, str):
        check_arguments({"ratio": OneOf(*RATIOS)}, ratio=ratio)
        ratio = RATIOS[ratio]
    check_arguments({"ratio": optional}, ratio=ratio)
    if (iterations is None) == (epochs is None):
        raise ValueError(f"give either iterations or epochs, got iterations={iterations}, epochs={epochs}")
    if (dataset_tokens is None) != (epochs is None):
        raise ValueError(f"epochs and dataset_tokens go together, got {epochs} and {dataset_tokens}")
    if iterations is None:
        assert epochs is not None
        assert dataset_tokens is not None
        iterations = epochs * dataset_tokens / tokens_per_iter
    tokens = iterations * tokens_per_iter

    if ratio is None:
        multiplier, new_tokens = 1.0, tokens
    elif time_per_iter is None:
        multiplier = math.sqrt(tokens / (ratio * params))
        new_tokens = tokens / multiplier
    else:
        multiplier = _same_time(params, iterations, ratio * params / tokens_per_iter, time_per_iter)
        new_tokens = ratio * params * multiplier
    new_params = multiplier * params
    new_iterations = round(new_tokens / tokens_per_iter)
    if new_iterations < 1:
        raise ValueError(f"ratio leaves {new_tokens / tokens_per_iter:.3g} iterations, at least 1 is needed")
    cost = (lambda p: p) if time_per_iter is None else time_per_iter
    unique = new_tokens if available_tokens is None else min(new_tokens, available_tokens)
    passes = new_tokens / unique
    if passes > 1 and strict:
        raise ValueError(
            f"available_tokens must be >= {new_tokens:.6g} for one epoch, got {available_tokens:.6g}: "
            f"{passes:.3g} epochs (strict=False accepts repetition)"
        )
    if passes > FREE_EPOCHS:
        warnings.warn(f"the plan repeats its data {passes:.3g} times; beyond 4 repetition adds little", stacklevel=2)
    return OneEpochPlan(
        params=new_params,
        iterations=new_iterations,
        tokens=new_tokens,
        tokens_per_iter=tokens_per_iter,
        epochs=passes,
        unique_tokens=unique,
        ratio=new_tokens / new_params,
        multiplier=multiplier,
        compute_ratio=cost(new_params) * new_iterations / (cost(params) * iterations),
        dropout=0.0 if passes <= 1 else None,
    )


def _same_time(params: float, iterations: float, slope: float, time_per_iter: Callable[[float], float]) -> float:
    """M with t(m P) slope m = t(P) I, where slope m are the iterations that a model of m P parameters gets."""
    from scipy.optimize import brentq

    def excess(log_m: float) -> float:
        seconds = time_per_iter(math.exp(log_m) * params)
        if not 0 < seconds < math.inf:
            raise ValueError(f"time_per_iter must return seconds > 0, got {seconds!r}")
        return math.log(seconds * slope / (time_per_iter(params) * iterations)) + log_m

    low, high = math.log(1e-6), math.log(1e6)
    if excess(low) > 0 or excess(high) < 0:
        raise ValueError("time_per_iter allows no size between 1e-6 and 1e6 times params in the same time")
    return math.exp(brentq(excess, low, high, xtol=1e-14))


@dataclass(frozen=True)
class TransformerShape:
    """Layers, width, heads, the parameters that they make without embeddings, and those over the given shape's."""

    layers: int
    width: int
    heads: int
    params: int
    multiplier: float


def transformer_shape(layers: int, width: int, multiplier: float, *, head_size: int = 64) -> TransformerShape:
    """The shape with about `multiplier` times the parameters of a transformer at the same depth over width.

        P = 12 layers width^2 (without embeddings),   width' = m^(1/3) width,   layers' = m P / (12 width'^2)

    The width is rounded to a multiple of the head size first, and the layers then make up for it. Take the iterations
    from the achieved multiplier: I / shape.multiplier.

    Args:
        layers: >= 1, of the given model.
        width: a multiple of `head_size`, of the given model.
        multiplier: m > 0, as in `OneEpochPlan.multiplier`.
        head_size: >= 1. Default 64.

    Raises:
        ValueError: an argument out of its range.

    >>> transformer_shape(6, 384, 8.0)
    TransformerShape(layers=12, width=768, heads=12, params=84934656, multiplier=8.0)
    """
    whole = Range(low=1, integer=True)
    check_arguments(
        {"layers": whole, "width": whole, "multiplier": POSITIVE, "head_size": whole},
        layers=layers,
        width=width,
        multiplier=multiplier,
        head_size=head_size,
    )
    if width % head_size:
        raise ValueError(f"width must be a multiple of head_size = {head_size}, got {width}")
    params = 12 * layers * width**2
    heads = max(1, round(width * multiplier ** (1 / 3) / head_size))
    new_width = heads * head_size
    new_layers = max(1, round(multiplier * params / (12 * new_width**2)))
    new_params = 12 * new_layers * new_width**2
    return TransformerShape(new_layers, new_width, heads, new_params, new_params / params)


class PowerLaw:
    r"""The loss of a one-epoch run as a power law of the iterations (or tokens, seconds, FLOPs).

        L(i) = c + a i^(-s),   c = 0 without a floor

    Fitted by least squares to the points after the first tenth of the range, with weights 1 / i, which is what
    log-spaced points would be; more than 2000 points are first averaged in groups of neighbours. `interval` is a
    jackknife that leaves out one of 20 blocks of neighbouring points at a time (one Gauss-Newton step for each, then
    Student's t), so it sees noise that is correlated within a block; it is for the curve, not for a single noisy loss.

    Args:
        floor: True fits c >= 0; "auto" does so if that predicts the last fifth of the points better from the others.
            Default False, the paper's law, which falls below the late losses of a run with an irreducible loss.
        discard: share of the range of i in [0, 1) left out at its start. Default 0.1.

    Attributes:
        a_, s_, c_: the numbers of the law.
        floor_: whether c was fitted.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 1906.06669.

    >>> i = np.arange(1, 1001)
    >>> law = PowerLaw(floor=True).fit(i, 2 + 3 * i**-0.5)
    >>> round(law.predict(10_000), 4), round(law.iterations_to(2.03), 1)
    (2.03, 10000.0)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "floor": OneOf(False, True, "auto"),
        "discard": Range(low=0, high=1, high_open=True),
    }

    a_: float
    s_: float
    c_: float
    floor_: bool

    def __init__(self, floor: bool | str = False, discard: float = 0.1) -> None:
        check_arguments(self.constraints, floor=floor, discard=discard)
        self.floor, self.discard = floor, discard

    def fit(self, iters: ArrayLike, losses: ArrayLike) -> PowerLaw:
        """Fit the law to losses > 0 at `iters` > 0, at least 8 of them after the discarded start.

        Raises:
            ValueError: other values, too few, or losses that do not fall.
        """
        x, y = fitting.observations(iters, losses, minimum=FEWEST_POINTS, x_name="iters", y_name="losses")
        wrong = np.flatnonzero(y <= 0)
        if len(wrong):
            raise ValueError(f"losses must be > 0, got {y[wrong[0]]:g} at position {wrong[0]}")
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
        kept = x >= self.discard * x[-1]
        x, y = x[kept], y[kept]
        group = -(-len(x) // MOST_POINTS)
        if group > 1:
            # The newest points stay; the oldest fill no group.
            x, y = (column[len(column) % group :].reshape(-1, group).mean(axis=1) for column in (x, y))
        if len(x) < FEWEST_POINTS:
            raise ValueError(f"iters must hold at least {FEWEST_POINTS} values after the discarded start, got {len(x)}")
        floor = _floor_helps(x, y) if self.floor == "auto" else bool(self.floor)
        law = _fit(x, y, floor)
        if law.a <= 0:
            raise ValueError("losses must fall with iters; no power law fits them")
        self._set(law, floor, x, y)
        return self

    def predict(self, iters: ArrayLike) -> Any:
        """The loss at `iters` > 0: a float for a float, else an array.

        Raises:
            RuntimeError: before `fit`.
            ValueError: an iteration that is not finite or not > 0.
        """
        self._need_fit()
        return self._law.predict(_positive("iters", iters))

    def interval(self, iters: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
        """Lower and upper end around `predict`, from the jackknife that the class describes; `level` in (0, 1)."""
        from scipy.special import stdtrit

        check_arguments({"level": Range(low=0, high=1, low_open=True, high_open=True)}, level=level)
        center = self.predict(iters)
        values = np.stack([np.asarray(law.predict(iters)) for law in _without_blocks(self._law, self._x, self._y)])
        count = len(values)
        deviation = np.sqrt((count - 1) / count * ((values - values.mean(axis=0)) ** 2).sum(axis=0))
        half = stdtrit(count - 1, (1 + level) / 2) * deviation
        half = float(half) if np.ndim(center) == 0 else half
        return center - half, center + half

    def iterations_to(self, loss: float) -> float:
        """The iterations after which the law reaches `loss` > 0; infinity where it never does."""
        self._need_fit()
        return self._law.inverse(float(_positive("loss", loss)))

    def panels(self) -> list[Panel]:
        """The fitted losses, the law and its 95 % interval."""
        self._need_fit()
        x = np.geomspace(self._x[0], self._x[-1], 100)
        low, high = self.interval(x)
        curves = {"measured": (self._x.tolist(), self._y.tolist()), "power law": (x.tolist(), self.predict(x).tolist())}
        curves |= {"95 % low": (x.tolist(), low.tolist()), "95 % high": (x.tolist(), high.tolist())}
        return [
            Panel(
                "Loss and power law",
                "iteration",
                "loss",
                curves,
                log_x=True,
                log_y=True,
                styles={"measured": "faint", "95 % low": "faint", "95 % high": "faint"},
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Options, fitted numbers and the fitted points as plain values for JSON."""
        self._need_fit()
        return {
            "options": {"floor": self.floor, "discard": self.discard},
            "floor": self.floor_,
            "law": [self._law.a, self._law.b, self._law.c],
            "iters": self._x.tolist(),
            "losses": self._y.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PowerLaw:
        """The law that `to_dict` described: same predictions, same intervals."""
        law = cls(**values["options"])
        numbers = fitting.PowerLaw(*values["law"])
        law._set(numbers, values["floor"], np.array(values["iters"]), np.array(values["losses"]))
        return law

    def _set(self, law: fitting.PowerLaw, floor: bool, x: np.ndarray, y: np.ndarray) -> None:
        self.a_, self.s_, self.c_, self.floor_ = law.a, law.b, law.c, floor
        self._law, self._x, self._y = law, x, y

    def _need_fit(self) -> None:
        if not hasattr(self, "a_"):
            raise RuntimeError("PowerLaw has not been fitted: call fit() first")


def _fit(x: np.ndarray, y: np.ndarray, floor: bool) -> fitting.PowerLaw:
    law = fitting.fit_power_law(x, y, floor=floor, weights=1 / x)
    # The best c >= 0 is 0 where the best c is negative.
    return fitting.fit_power_law(x, y, floor=False, weights=1 / x) if law.c < 0 else law


def _without_blocks(law: fitting.PowerLaw, x: np.ndarray, y: np.ndarray) -> list[fitting.PowerLaw]:
    """The law refitted without each block of neighbouring points, by one Gauss-Newton step in log a, s and c."""
    log_u = np.log(x) - np.log(x).mean()  # a and s are least entangled at the middle of the points
    residual, power = y - law.predict(x), law.predict(x) - law.c
    slope = np.stack([power, -power * log_u, np.ones_like(x)][: 2 + (law.c > 0)], axis=1)  # [n, unknowns]
    root = np.sqrt(1 / x)
    laws = []
    for block in np.array_split(np.arange(len(x)), min(BLOCKS, len(x))):
        kept = np.delete(np.arange(len(x)), block)
        step = np.linalg.lstsq(slope[kept] * root[kept, None], residual[kept] * root[kept], rcond=None)[0]
        log_a = math.log(law.a) + step[0] + step[1] * np.log(x).mean()
        laws.append(fitting.PowerLaw(math.exp(log_a), law.b + step[1], law.c + (step[2] if law.c > 0 else 0.0)))
    return laws


def _floor_helps(x: np.ndarray, y: np.ndarray) -> bool:
    early = max(4, len(x) * 4 // 5)
    errors = [
        float(((_fit(x[:early], y[:early], floor).predict(x[early:]) - y[early:]) ** 2).mean())
        for floor in (False, True)
    ]
    return errors[1] < errors[0]


def _positive(name: str, values: ArrayLike) -> Any:
    numbers = np.asarray(values, dtype=float)
    wrong = numbers[~(np.isfinite(numbers) & (numbers > 0))]
    if wrong.size:
        raise ValueError(f"{name} must be finite and > 0, got {wrong.flat[0]:g}")
    return values


def speedup(curve_a: PowerLaw, curve_b: PowerLaw, *, at_loss: float | None = None) -> float:
    """How many times the compute of B run A takes to the same loss.

    Both laws must have been fitted against the same unit of compute: iterations if an iteration costs the same in
    both, else seconds or parameters times tokens.

    Args:
        curve_a: fitted law of the baseline.
        curve_b: fitted law of the other run.
        at_loss: > 0. Default: the lowest loss that both reach at the last of their fitted points.

    Returns:
        The ratio; infinity if only B reaches the loss, 0 if only A does.

    Raises:
        RuntimeError: a law that has not been fitted.
        ValueError: neither reaches the loss.

    >>> i = np.arange(1, 1001)
    >>> slow, fast = PowerLaw().fit(i, 3 * i**-0.5), PowerLaw().fit(i, 1.5 * i**-0.5)
    >>> round(speedup(slow, fast), 6)
    4.0
    """
    for curve in (curve_a, curve_b):
        curve._need_fit()
    loss = max(curve.predict(float(curve._x[-1])) for curve in (curve_a, curve_b)) if at_loss is None else at_loss
    a, b = (curve.iterations_to(loss) for curve in (curve_a, curve_b))
    if a == b == math.inf:
        raise ValueError(f"at_loss must be reached by one of the curves, got {loss:g}")
    return a / b
