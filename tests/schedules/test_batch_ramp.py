import math

import pytest

from headway.schedules.batch_ramp import BatchRamp
from headway.schedules.batch_schedule import BatchSchedule, split_batch
from headway.schedules.gradient_noise import NoiseStats
from headway.testing.batch_schedules import check_batch_schedule


@pytest.mark.parametrize("arguments", [{}, {"lr_rule": "sqrt", "factor": 1.7}, {"at": (0.0,)}], ids=str)
def test_contract(arguments):
    check_batch_schedule(BatchRamp, **arguments)


def sizes(ramp, points=(0.0, 0.2499, 0.25, 0.5, 0.75, 1.0, 1.2)):
    reached = []
    for progress in points:
        ramp.advance(progress)
        reached.append(ramp.size)
    return reached


def test_the_batch_doubles_at_each_quarter_up_to_the_maximum_and_stays_past_the_end():
    assert sizes(BatchRamp(8, 1000)) == [8, 8, 16, 32, 64, 64, 64]
    assert sizes(BatchRamp(8, 40)) == [8, 8, 16, 32, 40, 40, 40]


def test_sizes_are_rounded_up_to_multiples_and_not_compounded():
    assert sizes(BatchRamp(8, 80, factor=1.5, multiple_of=8)) == [8, 8, 16, 24, 32, 32, 32]  # 12, 18, 27


def test_stages_at_the_start_and_skipped_stages_count():
    ramp = BatchRamp(8, 1000, at=(0.0, 0.1, 0.2))
    ramp.advance(0.15)
    assert ramp.size == 32


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 5.0), ("sqrt", math.sqrt(5))])
def test_the_rate_follows_the_batch_that_was_reached(rule, factor):
    ramp = BatchRamp(8, 40, lr_rule=rule)
    assert ramp.lr_factor == 1
    ramp.advance(1.0)
    assert ramp.lr_factor == factor


def test_statistics_are_never_due_and_change_nothing():
    ramp = BatchRamp(10, 40, world_size=2, max_micro_batch=3)
    assert not any(ramp.due(step) for step in range(10))
    assert ramp.update(NoiseStats(10, 1e9, 1.0)) == ramp.split == (3, 2, 12)
    assert (ramp.size, ramp.needs) == (10, "nothing")
    assert isinstance(ramp, BatchSchedule)


def test_a_huge_factor_stays_finite():
    ramp = BatchRamp(8, 64, factor=1e300, at=(0.1, 0.2, 0.3))
    ramp.advance(1.0)
    assert ramp.size == 64


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("world", [1, 3])
def test_one_micro_batch_where_it_fits(size, world):
    assert split_batch(size, world) == (-(-size // world), 1, -(-size // world) * world)


def test_micro_batches_are_even():
    assert split_batch(9, 1, 8) == (5, 2, 10)
    assert split_batch(64, 2, 8) == (8, 4, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch": 4}, "max_batch must be >= initial = 8, got 4"),
        ({"factor": 1.0}, "factor must be > 1, got 1.0"),
        ({"at": (0.5, 0.25)}, r"at must be a strictly increasing sequence of numbers in \[0, 1\), got \(0.5, 0.25\)"),
        ({"at": (0.5, 1.0)}, "at must be"),
        ({"lr_rule": "cubic"}, "lr_rule must be one of 'none', 'linear', 'sqrt', got 'cubic'"),
        ({"multiple_of": 3}, "initial must be a multiple of multiple_of = 3, got 8"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchRamp(**{"initial": 8, "max_batch": 64, **arguments})


@pytest.mark.parametrize("progress", [-0.1, math.nan, math.inf])
def test_progress_that_is_no_fraction_is_refused(progress):
    with pytest.raises(ValueError, match="progress must be >= 0, got"):
        BatchRamp(8, 64).advance(progress)


def test_a_state_of_another_range_is_refused():
    with pytest.raises(ValueError, match=r"the saved size must be a multiple of 8 .* got 12"):
        BatchRamp(8, 64, multiple_of=8).load_state_dict({"size": 12})
