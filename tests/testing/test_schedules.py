import sys
import warnings
from functools import partial

import pytest
import torch
import torch.optim.lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import LRScheduler

from headway.constraints import Range, check_arguments
from headway.schedules import REXLR, WSDLR, WSDSLR, ConstantLR, CosineLR, LinearLR, ProfileLR
from headway.schedules.profile import DelayedLinear
from headway.testing import check_schedule


def half(step: int) -> float:
    return 0.5


@pytest.mark.parametrize(
    ("schedule_class", "arguments"),
    [
        (torch_schedulers.CosineAnnealingLR, {"T_max": 50, "eta_min": 0.1}),
        (torch_schedulers.LinearLR, {}),
        (torch_schedulers.ExponentialLR, {"gamma": 0.9}),
        (torch_schedulers.LambdaLR, {"lr_lambda": half}),
    ],
)
def test_schedules_of_torch_keep_the_contract(schedule_class, arguments):
    check_schedule(schedule_class, **arguments)


@pytest.mark.parametrize(
    ("schedule_class", "arguments"),
    [
        (REXLR, {}),
        (REXLR, {"beta": 0.9, "warmup_steps": 5, "warmup_start": 0.05, "lr_min": 0.1}),
        (LinearLR, {"sampling": (0.5, 0.75)}),
        (CosineLR, {"lr_min_ratio": 0.1}),
        (ConstantLR, {}),
        (ConstantLR, {"warmup_steps": 5}),
        (ProfileLR, {"profile": "step"}),
        (ProfileLR, {"profile": "exponential"}),
        (ProfileLR, {"profile": DelayedLinear(0.3)}),
        (WSDLR, {"warmup_steps": 5, "decay_steps": 30}),
        (WSDSLR, {}),
        (WSDSLR, {"checkpoints": [20, 40], "warmup_steps": 5, "rewarmup_steps": 3, "convention": "levanter"}),
        (WSDSLR, {"decay_of": "total", "decay": "1-sqrt", "min_lr_ratio": 0.0}),
    ],
)
def test_schedules_of_this_package_keep_the_contract(schedule_class, arguments):
    check_schedule(schedule_class, **arguments)


class Line(LRScheduler):
    """Falls linearly to zero and keeps the contract; the classes below each break one clause."""

    def __init__(self, optimizer, total_steps, last_epoch=-1):
        self.total_steps = total_steps
        super().__init__(optimizer, last_epoch)

    def factor(self):
        return max(0.0, 1 - self.last_epoch / self.total_steps)

    def get_lr(self):
        if len(self.base_lrs) != len(self.optimizer.param_groups):
            raise ValueError("the optimizer has a new parameter group")
        return [base * self.factor() for base in self.base_lrs]


class NotAScheduler:
    def __init__(self, optimizer, last_epoch=-1):
        pass


class StepsTwiceInTheConstructor(Line):
    def __init__(self, optimizer, total_steps, last_epoch=-1):
        super().__init__(optimizer, total_steps, last_epoch)
        self.step()


class OverwritesBaseRates(Line):
    def __init__(self, optimizer, total_steps, last_epoch=-1):
        super().__init__(optimizer, total_steps, last_epoch)
        self.base_lrs = [0.0 for _ in self.base_lrs]


class NegativePastTheEnd(Line):
    def factor(self):
        return 1 - self.last_epoch / self.total_steps


class NotANumberPastTheEnd(Line):
    def factor(self):
        return super().factor() if self.last_epoch <= self.total_steps else float("nan")


class NeedsTwoSteps(Line):
    def factor(self):
        return max(0.0, 1 - self.last_epoch / (self.total_steps - 1))


class AnotherClosedForm(Line):
    def _get_closed_form_lr(self):
        return [base * self.factor() ** 2 for base in self.base_lrs]


class FirstGroupForAll(Line):
    def get_lr(self):
        return [self.base_lrs[0] * self.factor() for _ in self.base_lrs]


class SubtractsAConstant(Line):
    def get_lr(self):
        return [max(0.0, lr - 0.01) for lr in super().get_lr()]


class Jitters(Line):
    def factor(self):
        return super().factor() * float(torch.rand(()))


class LooksAtTheOptimizer(Line):
    def factor(self):
        return super().factor() * (0.5 if isinstance(self.optimizer, torch.optim.AdamW) else 1.0)


class ReplacesTensors(Line):
    def _update_lr(self, epoch=None):
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])
        super()._update_lr(epoch)


class ForgetsItsPosition(Line):
    def state_dict(self):
        return {**super().state_dict(), "last_epoch": 0}


class FunctionInItsState(Line):
    def __init__(self, optimizer, total_steps, last_epoch=-1):
        self.profile = partial(max, 0.0)
        super().__init__(optimizer, total_steps, last_epoch)


class SharesItsState(Line):
    def __init__(self, optimizer, total_steps, last_epoch=-1):
        self.history = []
        super().__init__(optimizer, total_steps, last_epoch)

    def get_lr(self):
        self.history.append(self.last_epoch)
        return super().get_lr()


class IgnoresLastEpoch(Line):
    def __init__(self, optimizer, total_steps, last_epoch=-1):
        super().__init__(optimizer, total_steps, -1)


class CannotBePickled(Line):
    def __init__(self, optimizer, total_steps, last_epoch=-1):
        self.clip = lambda value: max(0.0, value)
        super().__init__(optimizer, total_steps, last_epoch)

    def state_dict(self):
        return {name: value for name, value in super().state_dict().items() if name != "clip"}


class CountsCallsItself(Line):
    def __init__(self, optimizer, total_steps, last_epoch=-1):
        self.calls = last_epoch
        super().__init__(optimizer, total_steps, last_epoch)

    def get_lr(self):
        self.calls += 1
        return super().get_lr()

    def factor(self):
        return max(0.0, 1 - self.calls / self.total_steps)


class ScalesWhatItsNeighbourLeft(Line):
    """Right on its own; does something else when a `ChainedScheduler` is what calls `step`."""

    def step(self, epoch=None):
        super().step(epoch)
        if self._step_count > 1 and self.total_steps == 60 and self.inside_a_chain():
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5

    def inside_a_chain(self):
        frame = sys._getframe(2)
        return isinstance(frame.f_locals.get("self"), torch_schedulers.ChainedScheduler)


class WarnsAtEveryStep(Line):
    def step(self, epoch=None):
        if self._step_count:
            warnings.warn("stepping", stacklevel=2)
        super().step(epoch)


class IgnoresNewGroups(Line):
    def get_lr(self):
        known = [base * self.factor() for base in self.base_lrs]
        return known + [group["lr"] for group in self.optimizer.param_groups[len(known) :]]


class Constrained(Line):
    constraints = {"total_steps": Range(low=1, integer=True)}  # noqa: RUF012

    def __init__(self, optimizer, total_steps, last_epoch=-1):
        check_arguments(self.constraints, total_steps=total_steps)
        super().__init__(optimizer, total_steps, last_epoch)


class HasNoConstraintForFloor(Constrained):
    def __init__(self, optimizer, total_steps, floor=0.0, last_epoch=-1):
        super().__init__(optimizer, total_steps, last_epoch)


class DoesNotCheck(Line):
    constraints = Constrained.constraints


class DoesNotSayWhichArgument(Line):
    constraints = Constrained.constraints

    def __init__(self, optimizer, total_steps, last_epoch=-1):
        if not self.constraints["total_steps"].accepts(total_steps):
            raise ValueError("bad argument")
        super().__init__(optimizer, total_steps, last_epoch)


class ChecksAfterTheFact(Line):
    constraints = Constrained.constraints

    def __init__(self, optimizer, total_steps, last_epoch=-1):
        super().__init__(optimizer, total_steps if isinstance(total_steps, int) and total_steps > 0 else 1, last_epoch)
        check_arguments(self.constraints, total_steps=total_steps)


def test_the_toy_that_the_broken_ones_derive_from_keeps_the_contract():
    check_schedule(Line)
    check_schedule(Constrained)


@pytest.mark.parametrize(
    ("schedule_class", "clause"),
    [
        (NotAScheduler, "is an lr scheduler"),
        (StepsTwiceInTheConstructor, "the constructor sets the rate of step 0 once"),
        (OverwritesBaseRates, "the constructor sets the rate of step 0 once"),
        (NegativePastTheEnd, "rates are finite and not negative"),
        (NotANumberPastTheEnd, "rates are finite and not negative"),
        (NeedsTwoSteps, "works for every total length"),
        (AnotherClosedForm, "closed form equals chained form"),
        (FirstGroupForAll, "each group follows its own base rate"),
        (SubtractsAConstant, "each group follows its own base rate"),
        (LooksAtTheOptimizer, "rates do not depend on the optimizer"),
        (ReplacesTensors, "a tensor lr is updated in place"),
        (ForgetsItsPosition, "a state dict saved mid run continues exactly"),
        (FunctionInItsState, "a state dict survives torch load with weights only"),
        (SharesItsState, "a state dict is not changed by later steps"),
        (IgnoresLastEpoch, "last epoch and initial lr resume"),
        (CannotBePickled, "a copy and a pickle continue exactly"),
        (CountsCallsItself, "works inside sequential lr"),
        (ScalesWhatItsNeighbourLeft, "works inside chained scheduler"),
        (WarnsAtEveryStep, "stepping raises no warning"),
        (IgnoresNewGroups, "a group added later is scheduled or refused"),
        (HasNoConstraintForFloor, "floor has no constraint"),
        (DoesNotCheck, "total_steps=nan is accepted"),
        (DoesNotSayWhichArgument, "without naming the argument"),
        (ChecksAfterTheFact, "the optimizer has been changed"),
    ],
)
def test_a_broken_schedule_is_refused_by_the_clause_it_breaks(schedule_class, clause):
    with pytest.raises(AssertionError, match=f"^{schedule_class.__name__} breaks the clause .*{clause}"):
        check_schedule(schedule_class)


def test_a_random_schedule_is_refused():
    with pytest.raises(AssertionError, match="Jitters breaks the clause"):
        check_schedule(Jitters)
