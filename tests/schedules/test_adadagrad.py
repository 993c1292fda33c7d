import math
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler

from headway.schedules.adadagrad import (
    AdaptiveBatchController,
    GrowingBatchSampler,
    NoiseStats,
    chunk_stats,
    noise_stats,
    propose_batch,
)
from headway.schedules.batch_schedule import BatchSchedule
from headway.testing.batch_schedules import check_batch_schedule

TESTS = ("norm", "ip", "ip+orth", "coordinate")
seeds = st.integers(0, 2**31)
tolerances = st.floats(0.01, 3)


def gradients(batch, size, seed=0, mean=0.3):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    return mean + scale * torch.randn(batch, size, generator=generator, dtype=torch.float64)


def noisy(batch, ratio):
    """Statistics whose norm test at eta = 1 proposes ceil(ratio)."""
    return NoiseStats(batch, var_l1=ratio, grad_sq=1.0)


@pytest.mark.parametrize("test", TESTS)
def test_contract(test):
    check_batch_schedule(AdaptiveBatchController, test=test, test_interval=2)


@pytest.mark.parametrize(
    ("test", "expected"),
    [("norm", math.ceil(10 / (0.01 * 4))), ("ip", math.ceil(8 / (0.25 * 16))), ("coordinate", math.ceil(3.3 / 0.01))],
)
def test_proposals_are_the_formulas(test, expected):
    stats = NoiseStats(16, var_l1=10.0, grad_sq=4.0, var_ip=8.0, var_orth=8.0, var_coord_ratio=3.3)
    assert propose_batch(stats, test) == expected


def test_augmented_inner_product_test_is_the_larger_of_both():
    stats = NoiseStats(16, var_l1=10.0, grad_sq=4.0, var_ip=8.0, var_orth=8.0)
    assert propose_batch(stats, "ip+orth", theta=0.5, nu=0.1) == math.ceil(8 / (0.01 * 4))
    assert propose_batch(stats, "ip+orth", theta=0.1, nu=1.0) == math.ceil(8 / (0.01 * 16))


@settings(max_examples=50, deadline=None)
@given(seed=seeds, small=tolerances, large=tolerances, test=st.sampled_from(TESTS))
def test_a_smaller_tolerance_never_proposes_less(seed, small, large, test):
    small, large = sorted((small, large))
    stats = noise_stats(gradients(6, 5, seed))
    assert propose_batch(stats, test, small, small, small) >= propose_batch(stats, test, large, large, large)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, size=st.integers(2, 8), eta=tolerances)
def test_the_norm_test_implies_the_inner_product_test_and_is_implied_by_the_coordinates(seed, size, eta):
    stats = noise_stats(gradients(6, size, seed))
    norm = propose_batch(stats, "norm", eta=eta)
    assert propose_batch(stats, "ip", theta=eta) <= norm <= propose_batch(stats, "coordinate", eta=eta)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, exponent=st.integers(-40, 40), test=st.sampled_from(TESTS))
def test_scaling_the_loss_leaves_the_proposal_unchanged(seed, exponent, test):
    G = gradients(6, 5, seed)
    assert propose_batch(noise_stats(2.0**exponent * G), test) == propose_batch(noise_stats(G), test)


def test_a_batch_of_the_proposed_size_just_passes():
    eta, stats = 0.5, noise_stats(gradients(16, 50, mean=0.05))
    proposal = propose_batch(stats, eta=eta)
    bound = eta**2 * stats.grad_sq
    assert stats.var_l1 / proposal <= bound < stats.var_l1 / (proposal - 1)


def test_noise_dominated_gradients_are_under_estimated_as_far_as_the_theory_says():
    """E ||g||^2 = ||mu||^2 + tr / b; the median over draws is compared."""
    mu, sigma, eta, b = 0.05, torch.linspace(0.5, 1.5, 50, dtype=torch.float64), 0.5, 64
    generator = torch.Generator().manual_seed(0)
    draws = mu + sigma * torch.randn(200, b, 50, generator=generator, dtype=torch.float64)
    proposals = torch.tensor([float(propose_batch(noise_stats(G), eta=eta)) for G in draws])
    trace = float(sigma.square().sum())
    assert float(proposals.median()) == pytest.approx(trace / (eta**2 * (50 * mu**2 + trace / b)), rel=0.08)


@pytest.mark.parametrize("test", TESTS)
def test_identical_samples_leave_the_batch_unchanged(test):
    schedule = AdaptiveBatchController(8, 64, test=test)
    schedule.update(noise_stats(gradients(1, 5).expand(8, 5)))
    assert schedule.size == 8


@pytest.mark.parametrize("test", ["norm", "ip+orth", "coordinate"])
def test_zero_mean_gradient_with_noise_goes_to_the_maximum_and_without_stays(test):
    stats = noise_stats(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(4, 1))
    assert propose_batch(stats, test) == sys.maxsize
    schedule = AdaptiveBatchController(8, 64, test=test)
    schedule.update(stats)
    assert schedule.size == 64
    silent = AdaptiveBatchController(8, 64, test=test)
    silent.update(noise_stats(torch.zeros(8, 3)))
    assert silent.size == 8


@settings(max_examples=50, deadline=None)
@given(
    ratios=st.lists(st.floats(0, 5000), min_size=1, max_size=8),
    world=st.integers(1, 5),
    most=st.one_of(st.none(), st.integers(1, 40)),
)
def test_controller_never_shrinks_nor_exceeds_its_maximum_and_its_split_covers_the_proposal(ratios, world, most):
    schedule = AdaptiveBatchController(4, 2000, eta=1.0, world_size=world, max_micro_batch=most)
    before = schedule.size
    for ratio in ratios:
        micro, accumulation, total = schedule.update(noisy(schedule.split[2], ratio))
        proposal = min(2000, math.ceil(ratio))
        assert before <= schedule.size <= 2000
        assert schedule.size == max(before, proposal)
        assert proposal <= total == world * micro * accumulation < schedule.size + world * accumulation
        assert most is None or micro <= most
        before = schedule.size


def test_sizes_are_rounded_up_to_multiples():
    schedule = AdaptiveBatchController(16, 64, eta=1.0, multiple_of=16)
    schedule.update(noisy(16, 17.0))
    assert schedule.size == 32
    schedule.update(noisy(32, 63.5))
    assert schedule.size == 64
    for name, sizes in (("initial", (10, 64)), ("max_batch", (16, 70))):
        with pytest.raises(ValueError, match=f"{name} must be a multiple of multiple_of = 16, got"):
            AdaptiveBatchController(*sizes, multiple_of=16)


def test_a_partial_batch_is_not_tested():
    schedule = AdaptiveBatchController(8, 64, eta=1.0)
    schedule.update(noisy(5, 50.0))
    assert schedule.size == 8
    schedule.update(noisy(8, 50.0))
    assert schedule.size == 50


def test_statistics_are_due_every_test_interval_until_the_maximum():
    schedule = AdaptiveBatchController(8, 16, eta=1.0, test_interval=3)
    assert [step for step in range(9) if schedule.due(step)] == [0, 3, 6]
    schedule.update(noisy(8, 50.0))
    assert schedule.size == 16
    assert not any(schedule.due(step) for step in range(9))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_statistics_are_skipped_with_a_warning_and_refused_by_the_proposal(bad):
    schedule = AdaptiveBatchController(8, 64)
    with pytest.warns(RuntimeWarning, match="not finite .* the batch stays at 8"):
        schedule.update(NoiseStats(8, bad, 1.0))
    assert schedule.size == 8
    with pytest.raises(ValueError, match="stats must be finite for the test 'norm'"):
        propose_batch(NoiseStats(8, 1.0, bad))


def test_a_number_that_the_test_does_not_read_may_be_anything():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert propose_batch(NoiseStats(8, 1.0, 1.0, var_ip=math.nan), "norm") == 100


@pytest.mark.parametrize("test", ["ip", "ip+orth", "coordinate"])
def test_chunk_statistics_serve_only_the_norm_test(test):
    stats = chunk_stats([1.0, 3.0], 1.5, 4)
    schedule = AdaptiveBatchController(8, 64, test=test)
    assert schedule.needs == "samples"
    with pytest.raises(
        ValueError, match=f"test '{test}' needs var_.* chunk_stats serves only the test 'norm'".replace("+", r"\+")
    ):
        schedule.update(stats)
    norm = AdaptiveBatchController(8, 1000, eta=0.1)
    norm.update(stats)
    assert (norm.needs, norm.size) == ("chunks", math.ceil(stats.var_l1 / (0.01 * 1.5)))


def test_the_budget_and_the_rate_do_not_matter():
    schedule = AdaptiveBatchController(8, 64)
    schedule.advance(1.0)
    assert (schedule.size, schedule.lr_factor) == (8, 1.0)
    assert isinstance(schedule, BatchSchedule)


def test_a_state_of_another_range_is_refused():
    schedule = AdaptiveBatchController(8, 64)
    with pytest.raises(ValueError, match=r"the saved size must be a multiple of 1 in .* = \[8, 64\], got 128"):
        schedule.load_state_dict({"size": 128})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": 1}, "initial must be a whole number >= 2, got 1"),
        ({"initial": 100}, "max_batch must be >= initial = 100, got 64"),
        ({"eta": 0.0}, "eta must be > 0, got 0.0"),
        ({"theta": -1.0}, "theta must be > 0, got -1.0"),
        ({"nu": 0.0}, "nu must be > 0, got 0.0"),
        ({"test": "diversity"}, "test must be one of 'norm', 'ip', 'ip\\+orth', 'coordinate', got 'diversity'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveBatchController(**{"initial": 8, "max_batch": 64, **arguments})


def test_growing_batches_cover_each_index_once():
    sampler = GrowingBatchSampler(RandomSampler(range(50), generator=torch.Generator().manual_seed(0)), 4)
    sizes, indices = [], []
    for batch in sampler:
        sizes.append(len(batch))
        indices += batch
        sampler.set_batch_size(min(16, 2 * sampler.batch_size))
    assert sizes == [4, 8, 16, 16, 6]
    assert sorted(indices) == list(range(50))


def test_a_loader_sees_the_new_size_at_the_next_batch_and_the_next_pass_starts_with_it():
    sampler = GrowingBatchSampler(range(10), 2, drop_last=True)
    loader = DataLoader(torch.arange(10), batch_sampler=sampler)
    shapes = []
    for batch in loader:
        shapes.append(len(batch))
        sampler.set_batch_size(3)
    assert shapes == [2, 3, 3]
    assert [len(batch) for batch in loader] == [3, 3, 3]
    assert len(loader) == 3
    assert len(GrowingBatchSampler(range(10), 3)) == 4


def test_a_sampler_without_a_batch_size_is_refused():
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        GrowingBatchSampler(range(10), 0)
