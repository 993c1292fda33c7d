r"""The largest stable learning rate as a function of the batch size, and learning rate and momentum from curvature.

A mini-batch Hessian is the full Hessian plus noise that falls with the batch size B; its largest eigenvalue limits
the learning rate. For an eigenvalue lambda of the Hessian of all N examples, and with c = P s^2 for P parameters and
entries of variance s^2 per example:

    b = B / (1 - B / N);   e = sqrt(c / b)
    lambda_B  = lambda + c / (b lambda)   if lambda > e,   else 2 e        (an outlier, or the bulk's edge)
    alpha_max = 2 (1 + momentum) / lambda_B

so for SGD the limit grows like sqrt(B) in the bulk, ever slower above it, and saturates at 2 (1 + momentum) / lambda.
The well-known linear rule is the outlier's branch, 2 b lambda / c, continued to batches so small that no outlier is
left; Adam's division by sqrt(v) leaves the bulk to decide, and with it the square root of B. The least damping of
second-order methods falls as alpha / B.

Source: "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
Granziol, Zohren, Roberts, JMLR 2022, arXiv 2006.09092.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.numerics.hessian_matvec import hessian_matvec, mean_over_ranks, world_size
from headway.numerics.lanczos import Spectrum, slq
from headway.schedules.profile import base_lrs_of
from headway.snapshot import rng_state, set_rng_state

__all__ = [
    "SpectralLRController",
    "batch_hessian_edge",
    "calibrate_noise",
    "estimate_noise",
    "hessian_matvec",
    "max_learning_rate",
    "polyak_pair",
    "scale_learning_rate",
]

_POSITIVE, _SIZE = Range(low=0, low_open=True), Range(low=1)
_ARGUMENTS: Mapping[str, Constraint] = {
    "lr": _POSITIVE,
    "lam1": _POSITIVE,
    "lam_batch": _POSITIVE,
    "c": Range(low=0),
    "B": _SIZE,
    "batch": _SIZE,
    "base_batch": _SIZE,
    "N": Range(low=1, optional=True),
    "momentum": Range(low=0, high=1, high_open=True),
    "rule": OneOf("linear", "sqrt", "spiked"),
    "probes": Range(low=1, integer=True),
    "L": _POSITIVE,
    "l": Range(low=0),
}


def batch_hessian_edge(lam1: float, c: float, B: float, N: float | None = None) -> float:
    """The expected largest eigenvalue of the Hessian of a batch of B examples.

        b = B / (1 - B / N);  e = sqrt(c / b);  lam1 + c / (b lam1) if lam1 > e else 2 e

    Both branches give 2 e at lam1 = e; B = N gives lam1.

    Args:
        lam1: largest eigenvalue of the Hessian of all data, > 0.
        c: noise, P s^2 >= 0; from `calibrate_noise`.
        B: batch size in [1, N].
        N: examples in all. Default: infinitely many, b = B.

    Raises:
        ValueError: an argument out of its range.

    Source: arXiv 2006.09092, the case of noise with independent entries.

    >>> [batch_hessian_edge(10.0, 60.0, B) for B in (1, 4)]
    [16.0, 11.5]
    """
    check_arguments(_ARGUMENTS, lam1=lam1, c=c)
    variance = c / _effective(B, N)
    return lam1 + variance / lam1 if lam1 * lam1 > variance else 2 * math.sqrt(variance)


def max_learning_rate(lam1: float, c: float, B: float, N: float | None = None, momentum: float = 0.0) -> float:
    """The largest stable learning rate of SGD with heavy-ball momentum, 2 (1 + momentum) / `batch_hessian_edge`.

    Args:
        lam1: largest eigenvalue of the Hessian of all data, > 0.
        c: noise, >= 0.
        B: batch size in [1, N].
        N: examples in all. Default: infinitely many.
        momentum: in [0, 1), without dampening or Nesterov's step. Default 0.

    Raises:
        ValueError: an argument out of its range.

    >>> max_learning_rate(10.0, 60.0, 1)
    0.125
    """
    check_arguments(_ARGUMENTS, momentum=momentum)
    return 2 * (1 + momentum) / batch_hessian_edge(lam1, c, B, N)


def calibrate_noise(lam1: float, lam_batch: float, B: float, N: float | None = None) -> float:
    """The noise c for which `batch_hessian_edge` gives `lam_batch`: the recommended way to know c.

        c = b lam1 (lam_batch - lam1)   if lam_batch < 2 lam1,   else b (lam_batch / 2)^2

    Args:
        lam1: largest eigenvalue of the Hessian of all data, > 0.
        lam_batch: the same of batches of size B, >= lam1: the mean over ten batches or more.
        B: batch size in [1, N).
        N: examples in all. Default: infinitely many.

    Raises:
        ValueError: an argument out of its range; B = N, where there is no noise to see.

    Source: the inverse of the model of arXiv 2006.09092. Calibration at one batch size, in place of `estimate_noise`,
    is chosen here: noise of real networks is far from isotropic.

    >>> c = calibrate_noise(10.0, 16.0, B=1)
    >>> c, batch_hessian_edge(10.0, c, B=4)
    (60.0, 11.5)
    """
    check_arguments(_ARGUMENTS, lam1=lam1, lam_batch=lam_batch)
    if lam_batch < lam1:
        raise ValueError(f"lam_batch must be >= lam1 = {lam1:g}, got {lam_batch!r}")
    b = _effective(B, N, whole=False)
    return b * lam1 * (lam_batch - lam1) if lam_batch < 2 * lam1 else b * (lam_batch / 2) ** 2


def estimate_noise(
    loss_fn: Callable[[Any], Tensor],
    params: Iterable[Tensor],
    batches: Sequence[Any],
    probes: int = 10,
    *,
    B: float,
    N: float | None = None,
    reference: Sequence[Any] | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """The noise c from random directions: c = b mean |(H_B - H) v|^2 / |v|^2 over batches and Gaussian v.

    It sees the mean of the noise over all directions, which in networks is far below the noise that meets the top
    eigenvector: prefer `calibrate_noise`, and read this as a lower bound.

    Args:
        loss_fn: batch -> mean loss over the batch, a scalar.
        params: the parameters.
        batches: batches of B examples, drawn independently; two at least without `reference`.
        probes: directions, >= 1. Default 10.
        B: batch size in [1, N).
        N: examples in all. Default: infinitely many.
        reference: batches whose mean Hessian stands for H. Default: the mean of `batches`, for which the estimate is
            corrected by the factor k / (k - 1), k batches.
        generator: draws v. Default: a new one with seed 0.

    Raises:
        ValueError: an argument out of its range; fewer than two batches without a reference.

    Source: arXiv 2006.09092; the correction is ours.

    >>> x = torch.zeros(1, requires_grad=True)
    >>> round(estimate_noise(lambda a: a * x.square().sum() / 2, [x], [1.0, 3.0], B=4), 3)
    8.0
    """
    check_arguments(_ARGUMENTS, probes=probes)
    b, k = _effective(B, N, whole=False), len(batches)
    if k < (2 if reference is None else 1):
        raise ValueError(f"batches must hold two batches at least, or one and a reference, got {k}")
    params = list(params)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    n = sum(p.numel() for p in params)
    vectors = [torch.randn(n, generator=generator, device=generator.device).to(params[0].device) for _ in range(probes)]

    def products(some: Sequence[Any]) -> list[Tensor]:
        matvec = hessian_matvec(loss_fn, params, some)
        return [matvec(v) for v in vectors]

    # One graph at a time, however many batches there are.
    each = [products([batch]) for batch in batches]
    if reference is None:
        centre, factor = [sum(columns[1:], columns[0]) / k for columns in zip(*each, strict=True)], k / (k - 1)
    else:
        parts = [products([batch]) for batch in reference]
        centre, factor = [sum(columns[1:], columns[0]) / len(parts) for columns in zip(*parts, strict=True)], 1.0
    ratios = [
        float((Hv - mean).square().sum() / v.square().sum())
        for products_of_batch in each
        for Hv, mean, v in zip(products_of_batch, centre, vectors, strict=True)
    ]
    return b * factor * sum(ratios) / len(ratios)


def scale_learning_rate(
    lr: float,
    base_batch: float,
    batch: float,
    *,
    rule: str = "linear",
    N: float | None = None,
    lam1: float | None = None,
    c: float | None = None,
) -> float:
    """A learning rate that was right for one batch size, for another.

        linear:  lr B / B0                 SGD at small batches, by custom
        sqrt:    lr sqrt(B / B0)           Adam and other methods that divide by sqrt(v)
        spiked:  lr lambda_B0 / lambda_B   SGD at all batches: sqrt at first, then saturating

    With N, the first two use b = B / (1 - B / N) in place of B. A step up by "spiked" is never larger than by "sqrt",
    nor that than by "linear": the stable rate of the model does not carry a linear rule very far.

    Args:
        lr: the rate at the base batch, > 0.
        base_batch: B0 in [1, N]; below N for "linear" and "sqrt".
        batch: B in [1, N]; below N for "linear" and "sqrt".
        rule: "linear" (default), "sqrt" or "spiked".
        N: examples in all. Default: infinitely many.
        lam1: for "spiked" alone, the largest eigenvalue of the Hessian of all data, > 0.
        c: for "spiked" alone, the noise, >= 0.

    Raises:
        ValueError: an argument out of its range; "spiked" without lam1 and c.

    Source: arXiv 2006.09092.

    >>> scale_learning_rate(0.1, 32, 128), scale_learning_rate(1e-3, 32, 128, rule="sqrt")
    (0.4, 0.002)
    >>> round(scale_learning_rate(0.1, 32, 128, rule="spiked", lam1=2.0, c=400.0), 3)
    0.198
    """
    check_arguments(_ARGUMENTS, lr=lr, base_batch=base_batch, batch=batch, rule=rule)
    if rule == "spiked":
        if lam1 is None or c is None:
            raise ValueError(f"lam1 and c must be given for the rule 'spiked', got {lam1} and {c}")
        return lr * (batch_hessian_edge(lam1, c, base_batch, N) / batch_hessian_edge(lam1, c, batch, N))
    ratio = _effective(batch, N, "batch", whole=False) / _effective(base_batch, N, "base_batch", whole=False)
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


def polyak_pair(L: float, l: float) -> tuple[float, float]:
    """Learning rate and momentum at which heavy-ball converges fastest on quadratics with eigenvalues in [l, L].

        lr = (2 / (sqrt(L) + sqrt(l)))^2;   momentum = ((sqrt(L) - sqrt(l)) / (sqrt(L) + sqrt(l)))^2

    Args:
        L: largest eigenvalue, > 0.
        l: smallest eigenvalue, in [0, L].

    Raises:
        ValueError: an argument out of its range.

    Source: Polyak, "Some Methods of Speeding Up the Convergence of Iteration Methods", 1964.

    >>> [round(value, 4) for value in polyak_pair(4.0, 0.01)]
    [0.907, 0.8186]
    """
    check_arguments(_ARGUMENTS, L=L, l=l)
    if l > L:
        raise ValueError(f"l must be <= L = {L:g}, got {l!r}")
    total = math.sqrt(L) + math.sqrt(l)
    return (2 / total) ** 2, ((math.sqrt(L) - math.sqrt(l)) / total) ** 2


def _effective(B: float, N: float | None, name: str = "B", whole: bool = True) -> float:
    """The batch size that counts, B / (1 - B / N), infinite at B = N; `whole` says if B = N is accepted."""
    check_arguments({name: _SIZE, "N": _ARGUMENTS["N"]}, **{name: B, "N": N})
    if N is None:
        return float(B)
    if B > N or (B == N and not whole):
        raise ValueError(f"{name} must be {'<=' if whole else '<'} N = {N:g}, got {B!r}")
    return math.inf if B == N else B / (1 - B / N)


@dataclass(frozen=True)
class _Or:
    """A number in a range, the one word `word`, or a function where that is allowed."""

    range: Range
    word: str
    function: bool = False

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str):
            return value == self.word
        return (self.function and callable(value)) or self.range.accepts(value)

    def describe(self) -> str:
        function = ", a function" if self.function else ""
        return f"{self.word!r}{function} or {self.range.describe()}"

    def outside(self) -> list[Any]:
        return ["no-such-word", None, *self.range.outside()]


class SpectralLRController:
    r"""Set learning rate and momentum of SGD from the curvature, measured again and again in the run.

    Every `interval` steps, m = `lanczos_steps` Hessian-vector products on `probe_batches` batches give Ritz values
    theta_j (`headway.numerics.lanczos.slq`), and

        L = max theta_j;   l = min { theta_j > floor L }
        lr' = safety (2 / (sqrt(L) + sqrt(l)))^2;   momentum' = ((sqrt(L) - sqrt(l)) / (sqrt(L) + sqrt(l)))^2
        lr = ema lr + (1 - ema) lr';   momentum = ema momentum + (1 - ema) momentum'        (the first pair as it is)

    with lr held in `bounds` and momentum <= `max_momentum`. Call `step()` after every optimizer step; the first call
    measures. Where L <= 0, nothing is changed. Use it to spare the grid over learning rate and momentum, or to see
    the stable learning rate of a run (`history`); it does not find the rate that generalises best.

    Groups keep the ratios of their initial rates: lr is the rate of the group with the largest, and the curvature is
    that of the problem scaled by the ratios, with the groups' `weight_decay` added.

    Cost of a probe: one evaluation with gradient, m products of about two gradients each, on the probe batches, and
    m^2 n operations for n parameters; memory, the graph of the probe batches and n (m + 2) numbers. With probe
    batches like training batches that is the time of 2 m to 3 m steps (41 to 56 for m = 20, measured), so a share s
    of the time needs an interval of 3 m / s steps: 1200 for m = 20 and 5 %. The method's usual interval is one epoch,
    `interval=len(loader)`, which costs more than that in epochs of fewer steps. "auto" measures instead: it probes as
    soon as one more probe like the last leaves `share` <= `max_share`. Only the first probe of a run is not held to
    that. Under "auto" the clock decides when a probe is made, so two runs differ; give a number for runs that repeat.

    The operator must be one and the same during a probe: the batches are drawn once, and `model` is put in evaluation
    mode for its time, so that batch normalisation uses (and does not move) its running statistics and dropout is off.
    Without `model`, `loss_fn` has to see to that. The global random generators are put back after a probe, and
    gradients are not touched. With torch.distributed, each rank gives its own batches, products are averaged, and all
    ranks decide alike; all must call `step` equally often.

    Args:
        optimizer: SGD, with `momentum` in its groups and no dampening; it needs no scheduler of the rate beside this.
        loss_fn: batch -> mean loss over the batch, a scalar, by operations that can be differentiated twice.
        batches: what probes draw from, iterated from its start by each: a list, or a DataLoader. A list gives every
            probe the same sub-sample: less noise, and exact resuming. Take at least as many examples as a training
            batch has. Default None: `step` is given them.
        model: the module to freeze during probes, also in DistributedDataParallel. Default None.
        interval: steps between probes, >= 1, or "auto" (default).
        lanczos_steps: m >= 1. Default 20.
        floor: l is the smallest Ritz value above this fraction of L, in [0, 1). Default 1e-3. It matters more than
            anything else: values near zero bring the momentum near 1.
        lower: how l is found: "ritz" (default, as above), l itself (>= 0), or a function of the `Spectrum`. More
            than L counts as L.
        safety: factor of the rate, > 0. Default 1, right for quadratics; 0.5 is advised for networks.
        ema: weight of the past in [0, 1). Default 0.9; 0 follows every probe.
        bounds: (lowest, highest) learning rate, > 0. Default (1e-5, 1).
        max_momentum: in [0, 1). Default 0.99.
        probe_batches: batches per probe, >= 1. Default 1.
        max_share: the share of the time that "auto" gives to probes, in (0, 1). Default 0.05.
        noise: c, to replace L by `batch_hessian_edge(L, c, batch_size, dataset_size)`, if the probe batches stand for
            all data and the training batches are smaller. Default None: no correction.
        batch_size: B of the training batches, for `noise`.
        dataset_size: N, for `noise`. Default None: infinitely many.
        process_group: ranks to average over. Default None: all, if torch.distributed is initialised.
        seed: of the start vectors. Default 0.
        clock: seconds, as a function. Default `time.perf_counter`.

    Raises:
        ValueError: an argument out of its range; an optimizer without `momentum`, or with a group of lr 0; no batches
            where a probe is due; a parameter group added later.
        FloatingPointError: a probe meets a NaN or an infinity, on all ranks alike.

    Source: arXiv 2006.09092 for the learner, whose choice of l and of the interval is not known: Polyak's pair, the
    floor and the EMA are a reading of it. Ours: "auto", the scaling by the groups' ratios, weight decay.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    >>> loss = lambda curvature: (curvature * w.square()).sum() / 2
    >>> controller = SpectralLRController(optimizer, loss, batches=[torch.tensor([4.0, 0.01])], interval=100)
    >>> controller.step()
    >>> [round(optimizer.param_groups[0][name], 3) for name in ("lr", "momentum")]
    [0.907, 0.819]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "interval": _Or(Range(low=1, integer=True), "auto"),
        "lanczos_steps": Range(low=1, integer=True),
        "floor": Range(low=0, high=1, high_open=True),
        "lower": _Or(Range(low=0), "ritz", function=True),
        "safety": _POSITIVE,
        "ema": Range(low=0, high=1, high_open=True),
        "bounds": Range(low=0, low_open=True, length=2),
        "max_momentum": Range(low=0, high=1, high_open=True),
        "probe_batches": Range(low=1, integer=True),
        "max_share": Range(low=0, high=1, low_open=True, high_open=True),
        "noise": Range(low=0, optional=True),
        "batch_size": Range(low=1, optional=True),
        "dataset_size": Range(low=1, optional=True),
        "seed": Range(low=0, integer=True),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        loss_fn: Callable[[Any], Tensor],
        *,
        batches: Iterable[Any] | None = None,
        model: Module | None = None,
        interval: int | str = "auto",
        lanczos_steps: int = 20,
        floor: float = 1e-3,
        lower: str | float | Callable[[Spectrum], float] = "ritz",
        safety: float = 1.0,
        ema: float = 0.9,
        bounds: tuple[float, float] = (1e-5, 1.0),
        max_momentum: float = 0.99,
        probe_batches: int = 1,
        max_share: float = 0.05,
        noise: float | None = None,
        batch_size: float | None = None,
        dataset_size: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_arguments(
            self.constraints,
            interval=interval,
            lanczos_steps=lanczos_steps,
            floor=floor,
            lower=lower,
            safety=safety,
            ema=ema,
            bounds=bounds,
            max_momentum=max_momentum,
            probe_batches=probe_batches,
            max_share=max_share,
            noise=noise,
            batch_size=batch_size,
            dataset_size=dataset_size,
            seed=seed,
        )
        if bounds[0] > bounds[1]:
            raise ValueError(f"bounds must be (lowest, highest), got {bounds!r}")
        if noise is not None and batch_size is None:
            raise ValueError("batch_size must be given with noise, got None")
        if batch_size is not None:
            _effective(batch_size, dataset_size, "batch_size")
        if not all("momentum" in group for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer must have 'momentum' in its groups, as SGD has, got {type(optimizer).__name__}"
            )
        rates = base_lrs_of(optimizer)
        if not min(rates) > 0:
            raise ValueError(f"the lr of every group must be > 0, got {rates}")
        self.optimizer, self.loss_fn, self.batches, self.model = optimizer, loss_fn, batches, model
        self.interval, self.lanczos_steps, self.probe_batches = interval, lanczos_steps, probe_batches
        self.floor, self.lower, self.safety, self.ema = floor, lower, safety, ema
        self.bounds, self.max_momentum, self.max_share = bounds, max_momentum, max_share
        self.noise, self.batch_size, self.dataset_size = noise, batch_size, dataset_size
        self.process_group, self.clock = process_group, clock
        self.history: list[dict[str, float]] = []
        """For every probe: step, largest and smallest Ritz value, L and l as used, lr and momentum as set."""
        self._ratios = [rate / max(rates) for rate in rates]
        self._generator = torch.Generator().manual_seed(seed)
        self._smooth: list[float] | None = None  # lr and momentum before they are held in their bounds
        self._steps, self._due = 0, 1
        self._elapsed, self._spent, self._last = 0.0, 0.0, 0.0
        self._mark: float | None = None

    def step(self, batch_iter: Iterable[Any] | None = None) -> None:
        """Count a step, and measure and set lr and momentum if it is time to.

        Args:
            batch_iter: the batches for a probe; used, and drawn from, only if there is one. Default: `batches`.
        """
        self._tick()
        self._steps += 1
        if self._steps >= self._due and self._affordable():
            self.probe(batch_iter)

    def probe(self, batch_iter: Iterable[Any] | None = None) -> Spectrum:
        """Measure and set lr and momentum now, whatever the interval; the next probe is an interval from here."""
        source = self.batches if batch_iter is None else batch_iter
        if source is None:
            raise ValueError("batches must be given to step() or to the constructor: a probe is due")
        if len(self.optimizer.param_groups) != len(self._ratios):
            raise ValueError("the optimizer has other parameter groups than when the controller was built")
        self._tick()
        before, generators = self._elapsed, rng_state()
        try:
            batches = list(islice(source, self.probe_batches))
            if len(batches) < self.probe_batches:
                raise ValueError(f"batches must hold probe_batches = {self.probe_batches}, got {len(batches)}")
            with _frozen(self.model):
                spectrum = self._spectrum(batches)
        finally:
            set_rng_state(generators)
        self._decide(spectrum)
        self._tick()
        self._last = self._elapsed - before
        self._spent += self._last
        # A probe takes longer than m steps: before that many there is no use in asking the clock.
        self._due = self._steps + (self.lanczos_steps if isinstance(self.interval, str) else self.interval)
        return spectrum

    @property
    def share(self) -> float:
        """Seconds spent in probes / seconds since the first step, up to the last step; 0 before."""
        return self._spent / self._elapsed if self._elapsed > 0 else 0.0

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _tick(self) -> None:
        now = self.clock()
        if self._mark is not None:
            self._elapsed += now - self._mark
        self._mark = now

    def _affordable(self) -> bool:
        """Whether a probe like the last keeps to `max_share`; if not, puts off the question."""
        if not isinstance(self.interval, str) or not self.history:
            return True
        times = torch.tensor([self._elapsed, self._spent, self._last], dtype=torch.float64)
        if world_size(self.process_group) > 1:
            times = mean_over_ranks(times.to(self._params()[0][0].device), self.process_group)
        elapsed, spent, last = times.tolist()
        missing = (spent + last) / self.max_share - last - elapsed
        if missing <= 0:
            return True
        seconds = (elapsed - spent) / self._steps
        wait = math.ceil(missing / seconds) if seconds > 0 else 1
        # Never longer than since the last probe: steps seem short while a device still works through its queue.
        self._due = self._steps + min(wait, self._steps - int(self.history[-1]["step"]))
        return False

    def _params(self) -> list[tuple[Tensor, float, float]]:
        """Each parameter that is trained, with the ratio of its rate and its weight decay."""
        return [
            (p, ratio, float(group.get("weight_decay", 0.0)))
            for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True)
            for p in group["params"]
            if p.requires_grad
        ]

    def _spectrum(self, batches: list[Any]) -> Spectrum:
        """The spectrum of R^(1/2) (H + W) R^(1/2): SGD with the rates r lr sees this as SGD with one rate sees H."""
        params, ratios, decays = zip(*self._params(), strict=True)
        curved = hessian_matvec(self.loss_fn, params, batches, process_group=self.process_group)
        sizes = [p.numel() for p in params]
        roots = [math.sqrt(ratio) for ratio in ratios]

        def scaled(v: Tensor) -> list[Tensor]:
            return [root * part for root, part in zip(roots, v.split(sizes), strict=True)]

        def matvec(v: Tensor) -> Tensor:
            inner = scaled(v)
            decayed = torch.cat([decay * part for decay, part in zip(decays, inner, strict=True)])
            return torch.cat(scaled(curved(torch.cat(inner)) + decayed))

        dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        return slq(
            matvec, sum(sizes), self.lanczos_steps, generator=self._generator, dtype=dtype, device=params[0].device
        )

    def _decide(self, spectrum: Spectrum) -> None:
        L, l = spectrum.lam_max, math.nan
        if L > 0:
            if isinstance(self.lower, str):
                l = float(spectrum.ritz[spectrum.ritz > self.floor * L][0])
            else:
                l = float(self.lower(spectrum) if callable(self.lower) else self.lower)
            if self.noise is not None and self.batch_size is not None:
                L = batch_hessian_edge(L, self.noise, self.batch_size, self.dataset_size)
            l = min(l, L)
            lr, momentum = polyak_pair(L, l)
            pair = [self.safety * lr, momentum]
            old = pair if self._smooth is None else self._smooth
            self._smooth = [self.ema * a + (1 - self.ema) * b for a, b in zip(old, pair, strict=True)]
            self._apply()
        group = self.optimizer.param_groups[self._ratios.index(1.0)]
        self.history.append(
            {
                "step": float(self._steps),
                "largest": spectrum.lam_max,
                "smallest": spectrum.lam_min,
                "L": L,
                "l": l,
                "lr": float(group["lr"]),
                "momentum": float(group["momentum"]),
            }
        )

    def _apply(self) -> None:
        if self._smooth is None:
            return
        lr = min(max(self._smooth[0], self.bounds[0]), self.bounds[1])
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio
            group["momentum"] = min(self._smooth[1], self.max_momentum)

    def state_dict(self) -> dict[str, Any]:
        """Averages, counters, times, history and the generator, as plain values and a tensor; no arguments."""
        return {
            "smooth": None if self._smooth is None else list(self._smooth),
            "ratios": list(self._ratios),
            "steps": self._steps,
            "due": self._due,
            "seconds": [self._elapsed, self._spent, self._last],
            "history": copy.deepcopy(self.history),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over, and set the optimizer's lr and momentum to it.

        Raises:
            ValueError: the state is of an optimizer with another number of groups.
        """
        if len(state_dict["ratios"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"the state has {len(state_dict['ratios'])} groups, the optimizer {len(self.optimizer.param_groups)}"
            )
        self._smooth = None if state_dict["smooth"] is None else list(state_dict["smooth"])
        self._ratios = list(state_dict["ratios"])
        self._steps, self._due = state_dict["steps"], state_dict["due"]
        self._elapsed, self._spent, self._last = state_dict["seconds"]
        self._mark = None  # the time between saving and loading is nobody's
        self.history = copy.deepcopy(state_dict["history"])
        self._generator.set_state(state_dict["generator"])
        self._apply()


@contextmanager
def _frozen(model: Module | None) -> Iterator[None]:
    """Evaluation mode for every module, and no gradient hooks of DistributedDataParallel; everything is put back."""
    if model is None:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        no_sync: Any = getattr(model, "no_sync", None)
        if no_sync is not None:
            stack.enter_context(no_sync())
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
