import random

import pytest
import torch

from headway.constraints import Range, check_arguments
from headway.testing.controllers import check_controller


class Halving:
    """Halves the rates every ten steps and keeps the contract; the classes below each break one clause."""

    constraints = {"factor": Range(low=0, high=1, low_open=True)}  # noqa: RUF012

    def __init__(self, run, *, factor=0.5):
        check_arguments(self.constraints, factor=factor)
        self.optimizer, self.model, self.factor, self.steps = run.optimizer, run.model, factor, 0

    def step(self):
        self.steps += 1
        if self.steps % 10 == 0:
            self.scale(self.factor)

    def scale(self, factor):
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class NeverActs(Halving):
    def scale(self, factor):
        pass


class ReachesZero(Halving):
    def scale(self, factor):
        super().scale(0.0)


class LeavesItsBounds(Halving):
    def scale(self, factor):
        super().scale(1 / factor)


class BecomesNaN(Halving):
    def scale(self, factor):
        super().scale(float("nan"))


class OneRateForAll(Halving):
    def scale(self, factor):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01


class ChangesMomentum(Halving):
    def scale(self, factor):
        super().scale(factor)
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9


class LeavesTheModelInEvaluation(Halving):
    def scale(self, factor):
        super().scale(factor)
        self.model.eval()


class FreezesParameters(Halving):
    def scale(self, factor):
        super().scale(factor)
        self.model[0].weight.requires_grad_(False)


class DiffersByRun(Halving):
    runs = 0

    def __init__(self, run, *, factor=0.5):
        super().__init__(run, factor=factor)
        type(self).runs += 1
        self.number = self.runs

    def scale(self, factor):
        super().scale(factor ** (1 / self.number))


class DrawsFromTorch(Halving):
    def scale(self, factor):
        torch.rand(1)
        super().scale(factor)


class DrawsFromPython(Halving):
    def scale(self, factor):
        random.random()
        super().scale(factor)


class ConstructorSetsTheRate(Halving):
    def __init__(self, run, *, factor=0.5):
        super().__init__(run, factor=factor)
        self.scale(factor)


class ConstructorRunsTheModel(Halving):
    def __init__(self, run, *, factor=0.5):
        super().__init__(run, factor=factor)
        run.loss(run.batch())  # moves the statistics of the normalisation


class ConstructorDropsGradients(Halving):
    def __init__(self, run, *, factor=0.5):
        super().__init__(run, factor=factor)
        run.optimizer.zero_grad()


class ReadingTheStateCounts(Halving):
    def state_dict(self):
        self.steps += 3
        return super().state_dict()


class ForgetsItsCounter(Halving):
    def load_state_dict(self, state):
        pass


class ForgetsWhatIsPending(Halving):
    """Right where nothing is pending: wrong only if it is saved between a decision and its effect."""

    pending = 0

    def step(self):
        super().step()
        if self.pending:
            self.pending -= 1
            if not self.pending:
                super().scale(self.factor)

    def scale(self, factor):
        self.pending = 5


class FunctionInItsState(Halving):
    def state_dict(self):
        return {"steps": self.steps, "scale": self.scale}


class SharesItsState(Halving):
    def __init__(self, run, *, factor=0.5):
        super().__init__(run, factor=factor)
        self.seen = []

    def step(self):
        super().step()
        self.seen.append(self.steps)

    def state_dict(self):
        return {"steps": self.steps, "seen": self.seen}


class HasNoConstraints(Halving):
    constraints = None

    def __init__(self, run, *, factor=0.5):
        self.optimizer, self.model, self.factor, self.steps = run.optimizer, run.model, factor, 0


class HasNoConstraintForFloor(Halving):
    def __init__(self, run, *, factor=0.5, floor=0.0):
        super().__init__(run, factor=factor)


class NamesAnArgumentThatItLacks(Halving):
    constraints = {**Halving.constraints, "floor": Range(low=0)}  # noqa: RUF012


class DoesNotCheck(Halving):
    def __init__(self, run, *, factor=0.5):
        self.optimizer, self.model, self.factor, self.steps = run.optimizer, run.model, factor, 0


class DoesNotSayWhichArgument(Halving):
    def __init__(self, run, *, factor=0.5):
        if not self.constraints["factor"].accepts(factor):
            raise ValueError("bad argument")
        super().__init__(run, factor=factor)


class DoesNotSayWhichValue(Halving):
    def __init__(self, run, *, factor=0.5):
        if not self.constraints["factor"].accepts(factor):
            raise ValueError("factor is bad")
        super().__init__(run, factor=factor)


class ChecksAfterTheFact(Halving):
    def __init__(self, run, *, factor=0.5):
        if not self.constraints["factor"].accepts(factor):
            run.optimizer.param_groups[0]["lr"] = 1.0
        super().__init__(run, factor=factor)


def drive(controller, run):
    run.backward()
    run.optimizer.step()
    controller.step()


BOUNDS = (1e-3, 0.2)


def test_the_toy_that_the_broken_ones_derive_from_keeps_the_contract():
    check_controller(Halving, drive, bounds=BOUNDS)


def test_a_controller_may_change_what_it_says_that_it_changes():
    check_controller(ChangesMomentum, drive, changes=("lr", "momentum"))


def test_states_are_continued_at_the_stops_that_are_asked_for():
    check_controller(ForgetsWhatIsPending, drive, stops=(9, 14, 39))
    with pytest.raises(AssertionError, match="resumed after step 12: differs first at step 14"):
        check_controller(ForgetsWhatIsPending, drive, stops=(9, 12))


@pytest.mark.parametrize(
    ("controller", "clause"),
    [
        (NeverActs, "the rates change .*': the rates are the initial ones"),
        (ReachesZero, r"the rates change .*': the rates are \[0.0, 0.0\] at step 10"),
        (LeavesItsBounds, r"the rates change .*': the rate 0.4 of step 10 is outside \[0.001, 0.2\]"),
        (BecomesNaN, r"the rates change .*': the rates are \[nan, nan\]"),
        (OneRateForAll, "groups keep the ratio"),
        (ChangesMomentum, "nothing else of groups and model is changed': step 10 changes the parameter groups"),
        (LeavesTheModelInEvaluation, "nothing else .*': step 10 changes training modes"),
        (FreezesParameters, "nothing else .*': step 10 changes requires_grad"),
        (DiffersByRun, "two runs are equal"),
        (DrawsFromTorch, "the global random generators .* of torch has moved"),
        (DrawsFromPython, "the global random generators .* of python has moved"),
        (ConstructorSetsTheRate, "building it .* the constructor changes the parameter groups"),
        (ConstructorRunsTheModel, "building it .* the constructor changes the model's state"),
        (ConstructorDropsGradients, "building it .* the constructor changes gradients"),
        (ReadingTheStateCounts, "building it .* a run whose state is read: differs first at"),
        (ForgetsItsCounter, "a state saved mid run continues exactly"),
        (ForgetsWhatIsPending, "a state saved mid run continues exactly"),
        (FunctionInItsState, "a state saved mid run .*UnpicklingError"),
        (SharesItsState, "a state is not changed by later steps"),
        (HasNoConstraints, "has no `constraints`"),
        (HasNoConstraintForFloor, "the numeric argument floor has no constraint"),
        (NamesAnArgumentThatItLacks, "the constraint floor is not an argument"),
        (DoesNotCheck, "factor=nan is accepted"),
        (DoesNotSayWhichArgument, "factor=nan is refused without naming the argument"),
        (DoesNotSayWhichValue, "factor=nan is refused without naming the value"),
        (ChecksAfterTheFact, "factor=nan, although refused, changes the parameter groups"),
    ],
)
def test_a_broken_controller_is_refused_by_the_clause_it_breaks(controller, clause):
    with pytest.raises(AssertionError, match=f"^{controller.__name__} breaks the clause '.*{clause}"):
        check_controller(controller, drive, bounds=BOUNDS)
