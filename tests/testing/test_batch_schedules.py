import inspect
import random
import warnings
from functools import partial

import pytest

from headway.constraints import Range, check_arguments
from headway.schedules.adadagrad import AdaptiveBatchController
from headway.schedules.batch_ramp import BatchRamp
from headway.schedules.batch_schedule import BatchSchedule, split_batch
from headway.schedules.fixed_batch import FixedBatch
from headway.testing.batch_schedules import check_batch_schedule


@pytest.mark.parametrize("test", ["norm", "ip", "ip+orth", "coordinate"])
@pytest.mark.parametrize(
    "arguments", [{}, {"test_interval": 3}, {"eta": 0.5, "initial": 2, "max_batch": 4096}], ids=str
)
def test_the_adaptive_controller_keeps_the_contract(test, arguments):
    check_batch_schedule(AdaptiveBatchController, test=test, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"lr_rule": "linear", "at": (0.0, 0.9)}, {"lr_rule": "sqrt", "factor": 1.3, "initial": 1, "max_batch": 7}],
    ids=str,
)
def test_the_ramp_keeps_the_contract(arguments):
    check_batch_schedule(BatchRamp, **arguments)


def test_a_fixed_batch_keeps_the_contract():
    check_batch_schedule(FixedBatch, initial=8)


def test_a_function_that_builds_one_is_checked_too():
    check_batch_schedule(partial(BatchRamp, 8, 64))


class Toy:
    """Grows by the noise alone and keeps the contract; the classes below each break one clause."""

    constraints = {  # noqa: RUF012
        "initial": Range(low=1, integer=True),
        "max_batch": Range(low=1, integer=True),
        "multiple_of": Range(low=1, integer=True),
        "max_micro_batch": Range(low=1, integer=True, optional=True),
        "world_size": Range(low=1, integer=True),
    }
    needs = "chunks"
    lr_factor = 1.0

    def __init__(self, initial, max_batch, multiple_of=1, max_micro_batch=None, world_size=1):
        self.check(
            initial=initial,
            max_batch=max_batch,
            multiple_of=multiple_of,
            max_micro_batch=max_micro_batch,
            world_size=world_size,
        )
        if max_batch < initial:
            raise ValueError(f"max_batch must be >= initial = {initial}, got {max_batch}")
        self.size, self.max_batch, self.multiple_of = initial, max_batch, multiple_of
        self.max_micro_batch, self.world_size = max_micro_batch, world_size

    def check(self, **arguments):
        check_arguments(self.constraints, **arguments)

    @property
    def split(self):
        return split_batch(self.size, self.world_size, self.max_micro_batch)

    def advance(self, progress):
        pass

    def due(self, step):
        return self.size < self.max_batch

    def wanted(self, stats):
        return -(-int(stats.var_l1 / stats.grad_sq) // self.multiple_of) * self.multiple_of

    def update(self, stats):
        if abs(stats.var_l1) < float("inf"):
            self.size = min(self.max_batch, max(self.size, self.wanted(stats)))
        else:
            self.warn()
        return self.split

    def warn(self):
        warnings.warn("not finite", stacklevel=3)

    def state_dict(self):
        return {"size": self.size}

    def load_state_dict(self, state_dict):
        self.size = state_dict["size"]


class LacksAdvance(Toy):
    advance = None


class StartsElsewhere(Toy):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.size += 1

    __init__.__signature__ = inspect.signature(Toy.__init__)


class DoesNotCheck(Toy):
    def check(self, **arguments):
        pass


class DoesNotNameTheValue(Toy):
    def check(self, **arguments):
        try:
            super().check(**arguments)
        except ValueError:
            raise ValueError("bad argument") from None


class HasNoConstraintForEta(Toy):
    def __init__(self, initial, max_batch, eta=0.1, multiple_of=1, max_micro_batch=None, world_size=1):
        super().__init__(initial, max_batch, multiple_of, max_micro_batch, world_size)


class PassesItsMaximum(Toy):
    def update(self, stats):
        if abs(stats.var_l1) < float("inf"):
            self.size = max(self.size, self.wanted(stats))
        return self.split


class GivesFractions(Toy):
    def wanted(self, stats):
        return stats.var_l1 / stats.grad_sq


class Shrinks(Toy):
    def update(self, stats):
        self.size = min(self.max_batch, max(16, self.wanted(stats)))
        return self.split


class ShrinksWhenProgressGoesBack(Toy):
    def advance(self, progress):
        if progress == 0:
            self.size = 16


class NeverGrows(Toy):
    def wanted(self, stats):
        return self.size


class IgnoresMultiples(Toy):
    def wanted(self, stats):
        return int(stats.var_l1 / stats.grad_sq)


class IgnoresTheMicroBatch(Toy):
    @property
    def split(self):
        return split_batch(self.size, self.world_size)


class CutsTheLastSamples(Toy):
    @property
    def split(self):
        micro, accumulation, _ = split_batch(self.size, self.world_size, self.max_micro_batch)
        micro = max(1, self.size // (self.world_size * accumulation))
        return micro, accumulation, self.world_size * micro * accumulation


class FillsMicroBatches(Toy):
    @property
    def split(self):
        micro = min(self.size, self.max_micro_batch or self.size)
        accumulation = -(-self.size // (micro * self.world_size))
        return micro, accumulation, micro * accumulation * self.world_size


class ReturnsTheSize(Toy):
    def update(self, stats):
        super().update(stats)
        return self.size, 1, self.size + 1


class AsksForever(Toy):
    def due(self, step):
        return True


class Jitters(Toy):
    def wanted(self, stats):
        return super().wanted(stats) * random.randint(1, 9)


class ForgetsItsSize(Toy):
    def state_dict(self):
        return {"size": 16}


class ForgetsWhatItHasSeen(Toy):
    """Waits for two tests in a row, and does not save the count."""

    def __init__(self, initial, max_batch, multiple_of=1, max_micro_batch=None, world_size=1):
        super().__init__(initial, max_batch, multiple_of, max_micro_batch, world_size)
        self.failures = 0

    def wanted(self, stats):
        self.failures += super().wanted(stats) > self.size
        return super().wanted(stats) if self.failures % 2 == 0 else self.size


class StateIsNoJSON(Toy):
    def state_dict(self):
        return {"size": self.size, 3: (1, 2)}


class SharesItsState(Toy):
    def __init__(self, initial, max_batch, multiple_of=1, max_micro_batch=None, world_size=1):
        super().__init__(initial, max_batch, multiple_of, max_micro_batch, world_size)
        self.sizes = []

    def wanted(self, stats):
        self.sizes.append(self.size)
        return super().wanted(stats)

    def state_dict(self):
        return {"size": self.size, "sizes": self.sizes}


class KeepsTheLoadedState(SharesItsState):
    def state_dict(self):
        return {"size": self.size, "sizes": list(self.sizes)}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.sizes = state_dict["sizes"]


class IsSilentAboutNaN(Toy):
    def warn(self):
        pass


class TakesNaNForMuchNoise(Toy):
    def update(self, stats):
        if not abs(stats.var_l1) < float("inf"):
            self.size = self.max_batch
        return super().update(stats)


class RemembersNaN(Toy):
    def warn(self):
        super().warn()
        self.max_batch = self.size + 1


class LosesItsRate(Toy):
    @property
    def lr_factor(self):
        return 1.0 if self.size < self.max_batch else 0.0


def test_the_toy_that_the_broken_ones_derive_from_keeps_the_contract():
    check_batch_schedule(Toy)
    assert isinstance(Toy(1, 2), BatchSchedule)


@pytest.mark.parametrize(
    ("broken", "clause", "seen"),
    [
        (LacksAdvance, "interface", "advance cannot be called"),
        (StartsElsewhere, "interface", "size is 17 at the start"),
        (DoesNotCheck, "arguments_validated", "initial=nan is accepted"),
        (DoesNotNameTheValue, "arguments_validated", "lacks name or value"),
        (HasNoConstraintForEta, "arguments_validated", "eta has no entry"),
        (PassesItsMaximum, "size_within_bounds", "outside"),
        (GivesFractions, "size_within_bounds", "not a whole number"),
        (Shrinks, "never_shrinks", "size went from"),
        (ShrinksWhenProgressGoesBack, "never_shrinks", "size went from"),
        (NeverGrows, "grows", "as at the start"),
        (IgnoresMultiples, "multiple_of", "with multiple_of=16"),
        (IgnoresTheMicroBatch, "split_covers_size", "with max_micro_batch=5"),
        (CutsTheLastSamples, "split_covers_size", "little excess"),
        (FillsMicroBatches, "split_covers_size", "little excess"),
        (ReturnsTheSize, "split_covers_size", "update returns"),
        (AsksForever, "asks_no_more_at_the_end", "still True"),
        (Jitters, "deterministic", "differ"),
        (ForgetsItsSize, "state_dict_resumes", "instead of"),
        (ForgetsWhatItHasSeen, "state_dict_resumes", "goes on differently"),
        (StateIsNoJSON, "state_dict_resumes", "JSON"),
        (SharesItsState, "state_dict_is_a_snapshot", "has changed"),
        (KeepsTheLoadedState, "state_dict_is_a_snapshot", "has changed"),
        (IsSilentAboutNaN, "nonfinite_statistics_skipped", "no warning"),
        (TakesNaNForMuchNoise, "nonfinite_statistics_skipped", "change"),
        (RemembersNaN, "nonfinite_statistics_skipped", "goes on differently"),
        (LosesItsRate, "lr_factor_positive", "lr_factor is 0.0"),
    ],
)
def test_a_broken_schedule_is_refused_by_the_clause_it_breaks(broken, clause, seen):
    with pytest.raises(AssertionError, match=f"^{broken.__name__} breaks the clause '{clause}': .*{seen}"):
        check_batch_schedule(broken)
