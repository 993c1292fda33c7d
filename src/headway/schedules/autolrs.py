r"""AutoLRS: a learning-rate schedule found while training, by Bayesian optimisation between two snapshots.

Training is cut into stages of tau steps. Each stage tries k rates for tau' = ratio tau steps from one snapshot,
forecasts from the losses of each trial the loss that its rate would reach after tau steps, and takes the best:

    y_j(x) ~ a_j exp(b_j x) + c_j,    L_j = a_j exp(b_j tau) + c_j          forecast of trial j, b_j < 0
    lr_j = argmin over lr of mu(log lr) - kappa sigma(log lr)                Gaussian process on (log lr_i, L_i), i < j
    lr* = lr_j with the smallest L_j                                         used for the tau steps of the stage

With ratio = 1/10 and k = 10 the search takes as many steps as the training.

Source: "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly", Jin, Zhou, Zhao, Zhu, Guo,
Canini, Krishnamurthy, arXiv 2105.10762.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.schedules.loss_forecast import ExponentialForecaster
from headway.schedules.profile import base_lrs_of
from headway.snapshot import Snapshot, Stateful, put_back

__all__ = ["AutoLRS", "Stage", "drive"]

_FEWEST_TRIAL_STEPS = 8  # fewer losses do not tell the three numbers of a noisy exponential
_VALIDATIONS = 16  # evaluations of one trial, about
_CANDIDATES = 257


@dataclass(frozen=True)
class Stage:
    """One stage: where it starts, what was tried, and the rate that was taken.

    `start` is the number of applied steps before it, `tau` its length, `trial_steps` the steps of each trial,
    `validation` whether the trials were judged by `val_fn`, `rates` the rates tried, `forecasts` the losses
    forecast for the end of the stage (infinity for a trial that diverged), `lr` the choice.
    """

    start: int
    tau: int
    trial_steps: int
    validation: bool
    rates: tuple[float, ...]
    forecasts: tuple[float, ...]
    lr: float


class AutoLRS:
    r"""Set the learning rate of an optimizer by searching it, stage after stage, from snapshots of the run.

        for each stage:
            snapshot
            k times:  lr_j = argmin mu - kappa sigma;  tau' steps at lr_j;  forecast L_j;  restore
            tau steps at the lr_j with the smallest L_j
            tau <- min(2 tau, tau_max); from the end of the first stage of tau_max steps on, judge by val_fn

    It owns the learning rate, and `step` may put model and optimizer back to an earlier state, so it lives in a
    loop of one's own, without another schedule; `headway train`, which replays steps by number, does not drive it:

        controller = AutoLRS(model, optimizer, 1e-4, 1.0, val_fn=validation_loss, extra_state=[sampler])
        while controller.applied_steps < 100_000:
            x, y = next(batches)
            loss = loss_function(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            controller.step(loss)
            if controller.phase == "train" and controller.applied_steps % 5000 == 0:
                save(model, optimizer, controller)
        controller.finish()

    During a search the model holds a trial's weights: evaluate and publish it in the phase "train" or after
    `finish`. Trials see fresh batches unless `extra_state` holds the sampler, which then goes back with the model
    and shows every trial the batches that the stage will train on. The global random generators always go back.
    A stream that cannot be read twice only allows the first.

    With several parameter groups, lr is the rate of the group with the largest initial rate; the others keep their
    ratio to it. In a process group, losses are averaged over the ranks and rank 0 decides for all.

    Args:
        model: its `state_dict` is part of the snapshot.
        optimizer: likewise; its groups' `lr` are set after every step (tensors are filled in place).
        lr_min: smallest rate tried, > 0. Orders of magnitude that are never right cost trials.
        lr_max: largest rate tried, > lr_min. Diverging trials are harmless.
        val_fn: () -> validation loss, of the same kind as the training loss; called on all ranks. Default None:
            every stage is judged by the training loss.
        tau: steps of the first stage. Default 1000, as in the authors' code.
        tau_max: steps of the longest stage, >= tau. Default 8000, as in the authors' code.
        trials: k >= 2. Default 10, as in the paper.
        ratio: tau' / tau in (0, 1], with at least 8 trial steps. Default 0.1, as in the paper.
        kappa: weight of the unknown against the forecast, >= 0. Default 1000, as in the paper (the code has 1e6):
            the trials spread over the range.
        judge: "auto" (see above), "training" or "validation" for all stages. Default "auto".
        smoother: of the `ExponentialForecaster`. Default "outliers".
        warmup_steps: steps before the first stage, >= 1: step 0 at the optimizer's own rate, which the constructor
            leaves alone, step t at (t + 1) / warmup_steps of `warmup_lr`. Default 1.
        warmup_lr: the rate of the last of them. Default None: the geometric mean of the range.
        snapshot: "memory" (one more copy of model and optimizer, on their device, during searches) or the path of
            a file, which is removed after each search; under /dev/shm it is host memory. Ranks other than 0 append
            their number.
        extra_state: further objects with `state_dict` and `load_state_dict` to put back: sampler, scaler, averages.
        seed: of the first rate of each stage. Default 0.
        process_group: ranks that train one model. Default None: all, if there is a process group.
        clock: seconds; for `overhead`. Default `time.perf_counter`.

    Raises:
        ValueError: for an argument out of its range; from `step`, when a parameter group has been added.
        ImportError: scikit-learn is missing; the message says what brings it.

    Source: arXiv 2105.10762 and the authors' code. Departures: the loss that belongs to the rate before a trial is
    not part of its series; a diverged trial counts as one range of losses above the worst finite one, where the
    code has 1e6, which would flatten all differences between the others; a doubling ends at tau_max exactly;
    the process sees its candidates on a grid of 257 rates.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.001)
    >>> controller = AutoLRS(torch.nn.ParameterList([weight]), optimizer, 0.001, 4.0, tau=80, tau_max=80, trials=5)
    >>> while controller.applied_steps < 81:
    ...     loss = (weight**2).sum() / 2
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    ...     controller.step(loss)
    >>> controller.finish()
    >>> controller.search_steps, bool(0.05 < controller.history[0].lr < 1.95), bool(weight.abs() < 0.02)
    (40, True, True)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr_min": Range(low=0, low_open=True),
        "lr_max": Range(low=0, low_open=True),
        "tau": Range(low=1, integer=True),
        "tau_max": Range(low=1, integer=True),
        "trials": Range(low=2, high=_CANDIDATES - 1, integer=True),
        "ratio": Range(low=0, high=1, low_open=True),
        "kappa": Range(low=0),
        "judge": OneOf("auto", "training", "validation"),
        "smoother": OneOf("outliers", "spline-official"),
        "warmup_steps": Range(low=1, integer=True),
        "warmup_lr": Range(low=0, low_open=True, optional=True),
        "seed": Range(low=0, integer=True),
    }

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lr_min: float,
        lr_max: float,
        *,
        val_fn: Callable[[], float | Tensor] | None = None,
        tau: int = 1000,
        tau_max: int = 8000,
        trials: int = 10,
        ratio: float = 0.1,
        kappa: float = 1000.0,
        judge: str = "auto",
        smoother: str = "outliers",
        warmup_steps: int = 1,
        warmup_lr: float | None = None,
        snapshot: str | Path = "memory",
        extra_state: Sequence[Stateful] = (),
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_arguments(
            self.constraints,
            lr_min=lr_min,
            lr_max=lr_max,
            tau=tau,
            tau_max=tau_max,
            trials=trials,
            ratio=ratio,
            kappa=kappa,
            judge=judge,
            smoother=smoother,
            warmup_steps=warmup_steps,
            warmup_lr=warmup_lr,
            seed=seed,
        )
        if lr_max <= lr_min:
            raise ValueError(f"lr_max must be > lr_min = {lr_min:g}, got {lr_max!r}")
        if tau_max < tau:
            raise ValueError(f"tau_max must be >= tau = {tau}, got {tau_max!r}")
        if round(tau * ratio) < _FEWEST_TRIAL_STEPS:
            raise ValueError(f"tau * ratio must be >= {_FEWEST_TRIAL_STEPS} trial steps, got {tau * ratio:g}")
        if judge == "validation" and val_fn is None:
            raise ValueError("judge must be 'auto' or 'training' without a val_fn, got 'validation'")
        base_lrs = base_lrs_of(optimizer)
        if max(base_lrs) <= 0:
            raise ValueError(f"the lr of one parameter group must be > 0, got {base_lrs}")
        _gaussian_process_class()

        self.model, self.optimizer, self.val_fn = model, optimizer, val_fn
        self.lr_min, self.lr_max = float(lr_min), float(lr_max)
        self.tau, self.tau_max, self.trials, self.ratio, self.kappa = tau, tau_max, trials, ratio, kappa
        self.judge, self.smoother, self.seed = judge, smoother, seed
        self.warmup_steps = warmup_steps
        self.warmup_lr = math.sqrt(lr_min * lr_max) if warmup_lr is None else warmup_lr
        self.extra_state = tuple(extra_state)
        self.process_group = process_group
        self.history: list[Stage] = []
        self.applied_steps = 0
        self._ratios = [lr / max(base_lrs) for lr in base_lrs]
        self._snapshot: Snapshot | None = None
        self._file = None if snapshot == "memory" else self._own_file(Path(snapshot))
        self._validate = judge == "validation"
        self._initial_loss: float | None = None
        self._finished = False
        self._clock, self._started, self._own_seconds = clock, clock(), 0.0

        self.phase = "warmup"
        self._count = 0  # steps of the warm-up, the trial or the stage
        self._rates: list[float] = []
        self._forecasts: list[float] = []

    @property
    def trial_steps(self) -> int:
        """The steps of each trial of the current stage, tau'."""
        return round(self.tau * self.ratio)

    @property
    def search_steps(self) -> int:
        """The steps of all trials so far, on top of `applied_steps`; those lost by a resume do not count."""
        past = sum(len(stage.rates) * stage.trial_steps for stage in self.history)
        return past + (self._count + len(self._forecasts) * self.trial_steps if self.phase == "search" else 0)

    @property
    def lr(self) -> float:
        """The rate in use, of the group with the largest initial rate."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @property
    def overhead(self) -> float:
        """The share of this process's seconds since construction that went into snapshots and decisions, in [0, 1].

        The trials' own steps are not in it: `search_steps` counts them.
        """
        total = self._clock() - self._started
        return self._own_seconds / total if total > 0 else 0.0

    def step(self, loss: float | Tensor) -> None:
        """Take note of a step; call it after `optimizer.step()`.

        May restore the snapshot and sets the rate of the next step.

        Args:
            loss: the loss whose gradient the step used: one number, on a rank that of its own batch.

        Raises:
            RuntimeError: after `finish`.
        """
        if self._finished:
            raise RuntimeError("AutoLRS.step must not be called after finish()")
        self._count += 1
        if self.phase == "search":
            self._observe(loss)
            if self._count == self.trial_steps:
                self._end_trial()
            return
        self.applied_steps += 1
        if self.phase == "warmup":
            if self._count == self.warmup_steps:
                self._begin_stage()
            else:
                self._set_lr(self.warmup_lr * (self._count + 1) / self.warmup_steps)
        elif self._count == self.tau:
            if self.tau == self.tau_max:
                self._validate = self.judge != "training" and self.val_fn is not None
            self.tau = min(2 * self.tau, self.tau_max)
            self._begin_stage()

    def finish(self) -> None:
        """Leave model and optimizer as after the last applied step and release the snapshot."""
        if self._snapshot is not None:
            self._restore()
            self._count, self._rates, self._forecasts = 0, [], []
        self._release()
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        """The progress, as plain values and tensors.

        During a search it holds the snapshot, also one kept in a file: loading it restarts the stage.
        """
        return {
            "phase": self.phase,
            "count": self._count,
            "applied_steps": self.applied_steps,
            "tau": self.tau,
            "lr": self.lr,
            "ratios": list(self._ratios),
            "validate": self._validate,
            "initial_loss": self._initial_loss,
            "history": [asdict(stage) for stage in self.history],
            "snapshot": None if self._snapshot is None else self._snapshot.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Continue from a state; build the controller with the same arguments, load model and optimizer before it.

        A state saved during a search puts model, optimizer, `extra_state` and the global random generators back to
        the beginning of the stage, whose trials are then repeated.

        Raises:
            ValueError: the state belongs to another number of parameter groups.
        """
        if len(state_dict["ratios"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"the state belongs to {len(state_dict['ratios'])} parameter groups, "
                f"the optimizer has {len(self.optimizer.param_groups)}"
            )
        self._release()
        self._finished = False
        self._ratios = list(state_dict["ratios"])
        self.applied_steps, self.tau = state_dict["applied_steps"], state_dict["tau"]
        self._validate, self._initial_loss = state_dict["validate"], state_dict["initial_loss"]
        self.history = [
            Stage(**{**stage, "rates": tuple(stage["rates"]), "forecasts": tuple(stage["forecasts"])})
            for stage in state_dict["history"]
        ]
        self.phase, self._count = state_dict["phase"], state_dict["count"]
        self._rates, self._forecasts = [], []
        if self.phase == "search":
            if state_dict["snapshot"] is not None:
                put_back(self._owners(), state_dict["snapshot"])
            self._begin_stage()
        else:
            self._set_lr(state_dict["lr"])

    def _owners(self) -> tuple[Stateful, ...]:
        return (self.model, self.optimizer, *self.extra_state)

    def _begin_stage(self) -> None:
        begin = self._synchronized_clock()
        self.phase = "search"
        self._rates, self._forecasts = [], []
        self._snapshot = Snapshot(*self._owners(), file=self._file)
        self._own_seconds += self._synchronized_clock() - begin
        self._begin_trial()

    def _begin_trial(self) -> None:
        begin = self._clock()
        self._count = 0
        self._steps: list[int] = []
        self._losses: list[float | Tensor] = []
        lr = 0.0
        if _rank(self.process_group) == 0:
            seed = (self.seed, len(self.history))
            lr = _propose(self._rates, self._forecasts, (self.lr_min, self.lr_max), self.kappa, seed)
        self._rates.append(self._from_first(lr))
        self._set_lr(self._rates[-1])
        self._own_seconds += self._clock() - begin

    def _observe(self, loss: float | Tensor) -> None:
        if self._initial_loss is None:
            (self._initial_loss,) = self._average([loss])
        if not self._validate:
            # Clones, for a captured graph writes every loss to one place; the number itself can wait.
            self._steps.append(self._count - 1)
            self._losses.append(loss.detach().clone() if isinstance(loss, Tensor) else loss)
        elif self._count % max(1, self.trial_steps // _VALIDATIONS) == 0:
            assert self.val_fn is not None
            self._steps.append(self._count)
            self._losses.append(self.val_fn())

    def _end_trial(self) -> None:
        losses = self._average(self._losses)
        begin = self._synchronized_clock()
        self._forecasts.append(self._forecast(losses))
        self._restore()
        if len(self._rates) < self.trials:
            self._own_seconds += self._synchronized_clock() - begin
            self._begin_trial()
            return
        if not any(map(math.isfinite, self._forecasts)):
            warnings.warn("AutoLRS: no trial of the stage stayed finite; taking the smallest rate", stacklevel=3)
        # Among equal forecasts, as when all have diverged, the smallest rate.
        lr = self._from_first(min(zip(self._forecasts, self._rates, strict=True))[1])
        self.history.append(
            Stage(
                self.applied_steps,
                self.tau,
                self.trial_steps,
                self._validate,
                tuple(self._rates),
                tuple(self._forecasts),
                lr,
            )
        )
        self._release()
        self.phase, self._count, self._rates, self._forecasts = "train", 0, [], []
        self._set_lr(lr)
        self._own_seconds += self._synchronized_clock() - begin

    def _restore(self) -> None:
        assert self._snapshot is not None
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._snapshot.restore()
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(lr, Tensor):
                # Captured graphs read the very tensor; loading a state puts another one there.
                group["lr"] = lr.copy_(group["lr"])

    def _forecast(self, losses: list[float]) -> float:
        """The loss after tau steps, infinity after a loss that was not finite."""
        if not all(map(math.isfinite, losses)):
            return math.inf
        assert self._initial_loss is not None
        # A trial that has climbed that high does not follow one exponential any more.
        if self._validate and max(losses) >= self._initial_loss:
            return losses[-1]
        # The loss before a trial's first update is the same for every rate.
        first = 0 if self._validate else 1
        forecaster = ExponentialForecaster(smoother=self.smoother, validation=self._validate)
        return float(forecaster.fit(losses[first:], self._steps[first:]).predict(self.tau))

    def _set_lr(self, lr: float) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(self._ratios):
            raise ValueError(
                f"the optimizer has {len(groups)} parameter groups, AutoLRS was built for {len(self._ratios)}: "
                "build a new one after add_param_group"
            )
        for group, ratio in zip(groups, self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio

    def _average(self, losses: Sequence[float | Tensor]) -> list[float]:
        """The losses as numbers, averaged over the ranks in one collective."""
        values = [float(loss.detach() if isinstance(loss, Tensor) else loss) for loss in losses]
        ranks = _world_size(self.process_group)
        if ranks == 1:
            return values
        buffer = torch.tensor(values, dtype=torch.float64, device=self._device())
        dist.all_reduce(buffer, group=self.process_group)
        return (buffer / ranks).tolist()

    def _from_first(self, value: float) -> float:
        """Rank 0's value, on all ranks."""
        if _world_size(self.process_group) == 1:
            return value
        buffer = torch.tensor(value, dtype=torch.float64, device=self._device())
        dist.broadcast(buffer, group_src=0, group=self.process_group)
        return float(buffer)

    def _device(self) -> torch.device:
        parameter: Tensor = self.optimizer.param_groups[0]["params"][0]
        return parameter.device

    def _own_file(self, path: Path) -> Path:
        rank = _rank(self.process_group)
        return path.with_name(f"{path.name}.{rank}") if rank else path

    def _release(self) -> None:
        if self._snapshot is not None and self._snapshot.file is not None:
            self._snapshot.file.unlink(missing_ok=True)
        self._snapshot = None

    def _synchronized_clock(self) -> float:
        device = self._device()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._clock()


def drive(
    train_step: Callable[[], float | Tensor],
    val_fn: Callable[[], float | Tensor] | None,
    model: nn.Module,
    optimizer: Optimizer,
    lr_min: float,
    lr_max: float,
    *,
    total_steps: int,
    **options: Any,
) -> list[Stage]:
    """Train for a number of applied steps under `AutoLRS` and return the stages.

    Args:
        train_step: () -> loss; takes one optimizer step on the next batch.
        val_fn: see `AutoLRS`.
        model: see `AutoLRS`.
        optimizer: see `AutoLRS`.
        lr_min: see `AutoLRS`.
        lr_max: see `AutoLRS`.
        total_steps: applied steps >= 1; with the trials, about twice as many are taken.
        **options: further arguments of `AutoLRS`.

    Raises:
        ValueError: for an argument out of its range.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> def train_step():
    ...     optimizer.zero_grad()
    ...     loss = (weight**2).sum() / 2
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> stages = drive(train_step, None, torch.nn.ParameterList([weight]), optimizer, 0.01, 1, total_steps=240, tau=80)
    >>> [(stage.start, stage.tau, stage.trial_steps) for stage in stages]
    [(1, 80, 8), (81, 160, 16)]
    """
    check_arguments({"total_steps": Range(low=1, integer=True)}, total_steps=total_steps)
    controller = AutoLRS(model, optimizer, lr_min, lr_max, val_fn=val_fn, **options)
    while controller.applied_steps < total_steps:
        controller.step(train_step())
    controller.finish()
    return controller.history


def _gaussian_process_class() -> Any:
    try:
        from sklearn.gaussian_process import GaussianProcessRegressor
    except ImportError as error:
        raise ImportError('AutoLRS needs scikit-learn: pip install "headway[estimators]"') from error
    return GaussianProcessRegressor


def _propose(
    rates: Sequence[float],
    losses: Sequence[float],
    bounds: tuple[float, float],
    kappa: float,
    seed: tuple[int, int],
) -> float:
    """The next rate to try: log-uniform at first, then the lower confidence bound's minimum among untried ones."""
    low, high = math.log(bounds[0]), math.log(bounds[1])
    if not rates:
        return math.exp(low + (high - low) * float(np.random.default_rng(seed).random()))
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0, (0.01, 1000)) * Matern(0.3, (0.05, 10), nu=2.5) + WhiteKernel(1e-2, (1e-6, 1.0))
    process = _gaussian_process_class()(kernel, normalize_y=True)
    tried = (np.log(rates) - low) / (high - low)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # few points often leave a length at its bound
        process.fit(tried[:, None], _told(losses))
    candidates = np.linspace(0, 1, _CANDIDATES)
    distance = np.abs(candidates[:, None] - tried).min(axis=1)
    candidates, distance = (values[distance > 0.5 / (_CANDIDATES - 1)] for values in (candidates, distance))
    mean, deviation = process.predict(candidates[:, None], return_std=True)
    bound = np.round(mean - kappa * deviation, 9)
    # Where the process sees noise only, all bounds are equal: then the widest gap.
    best = np.lexsort((-distance, bound))[0]
    return min(max(math.exp(low + (high - low) * float(candidates[best])), bounds[0]), bounds[1])


def _told(losses: Sequence[float]) -> np.ndarray:
    """The forecasts on [0, 1], the failed at 2, rounded so that scaling and shifting the losses changes no bit."""
    values = np.array(losses)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(len(values))
    low, height = values[finite].min(), np.ptp(values[finite])
    unit = (values - low) / height if height > 0 else np.zeros(len(values))
    return np.round(np.where(finite, unit, 2.0), 9)


def _world_size(process_group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def _rank(process_group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(process_group) if dist.is_available() and dist.is_initialized() else 0
