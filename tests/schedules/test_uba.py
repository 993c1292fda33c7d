import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.driven import run, sgd

from headway.schedules.profile import CosineLR
from headway.schedules.uba import UBALR, chebyshev_steps, phi_from_condition_number, uba_profile
from headway.testing import check_schedule

phis = st.floats(0.01, 100)
inner = st.floats(0.01, 0.99)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"phi": 0.25, "warmup_steps": 7, "lr_min": 0.1},
        {"phi": 8.0, "angle": "midpoint", "warmup_steps": 5, "warmup_start": 0.05, "lr_min_ratio": 0.1},
    ],
    ids=["defaults", "warm-up and floor", "midpoint"],
)
def test_contract(arguments):
    check_schedule(UBALR, **arguments)


def test_reference_values():
    assert [uba_profile(t / 4) for t in range(5)] == pytest.approx([1, 0.9210, 0.6667, 0.2555, 0], abs=5e-5)


@given(z=st.floats(0, 1), phi=phis)
def test_profile_is_the_published_formula(z, phi):
    c = math.cos(math.pi * z)
    assert uba_profile(z, phi) == pytest.approx(2 * (1 + c) / (2 * phi + (2 - phi) * (1 + c)), rel=1e-12, abs=1e-15)


@given(z=inner, phi=phis)
def test_inverse_is_affine_in_one_over_one_plus_cosine(z, phi):
    c = math.cos(math.pi * z)
    assert 1 / uba_profile(z, phi) == pytest.approx(phi / (1 + c) + (2 - phi) / 2, rel=1e-9)


@given(phi=st.floats(min_value=5e-324, max_value=1e308))
def test_both_ends_are_exact_for_every_phi(phi):
    assert uba_profile(0.0, phi) == 1
    assert uba_profile(1.0, phi) == 0


@given(phi=phis)
def test_half_way_it_is_two_over_two_plus_phi(phi):
    assert uba_profile(0.5, phi) == pytest.approx(2 / (2 + phi), rel=1e-12)


@given(phi=phis)
def test_it_decreases_in_time(phi):
    p = uba_profile(torch.linspace(0, 1, 201, dtype=torch.float64), phi)
    assert bool((p.diff() < 0).all())


@given(z=inner, phi=phis, factor=st.floats(1.01, 10))
def test_it_decreases_in_phi(z, phi, factor):
    assert uba_profile(z, phi * factor) < uba_profile(z, phi)


def test_tensors_give_the_values_of_numbers():
    z = torch.linspace(0, 1, 11, dtype=torch.float64).view(1, 11)
    expected = torch.tensor([[uba_profile(float(point), 0.7) for point in z[0]]], dtype=torch.float64)
    torch.testing.assert_close(uba_profile(z, 0.7), expected, rtol=1e-14, atol=1e-16)


def test_phi_two_equals_cosine_here_and_in_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = run(UBALR(sgd(0.3), 50, phi=2.0, lr_min=0.01), 51)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd(0.3), T_max=50, eta_min=0.01)
    assert ours == pytest.approx(run(theirs, 51), abs=1e-12)
    assert ours == pytest.approx(run(CosineLR(sgd(0.3), 50, lr_min=0.01), 51), abs=1e-15)


def test_phi_near_zero_holds_the_peak_and_drops_at_the_end():
    schedule = UBALR(sgd(), 20, phi=1e-12, lr_min=0.1)
    assert [schedule.lr_at(t)[0] for t in range(20)] == pytest.approx([1.0] * 20, abs=1e-9)
    assert schedule.lr_at(20) == [0.1]


@pytest.mark.filterwarnings("ignore:phi = :UserWarning")
def test_very_large_phi_is_a_spike_at_step_0():
    schedule = UBALR(sgd(), 20, phi=1e12, lr_min=0.1)
    assert schedule.lr_at(0) == [1.0]
    assert [schedule.lr_at(t)[0] for t in range(1, 21)] == pytest.approx([0.1] * 20, abs=1e-9)


def test_phi_above_four_times_the_decay_warns():
    with pytest.warns(UserWarning, match="phi = 41 is more than 4 times the 10 steps of the decay") as caught:
        UBALR(sgd(), 15, phi=41, warmup_steps=5)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UBALR(sgd(), 15, phi=40, warmup_steps=5)


def test_midpoint_angles_are_chebyshevs_nodes_and_the_end_is_the_floor():
    schedule = UBALR(sgd(), 4, angle="midpoint", phi=0.7, lr_min=0.2)
    nodes = [uba_profile((2 * t - 1) / 8, 0.7) for t in (1, 2, 3, 4)]
    assert [schedule.lr_at(t)[0] for t in range(6)] == pytest.approx([0.2 + 0.8 * p for p in nodes] + [0.2, 0.2])


def test_warm_up_then_the_profile_of_the_rest():
    schedule = UBALR(sgd(), 30, warmup_steps=10)
    assert [schedule.lr_at(t)[0] for t in range(10)] == pytest.approx([t / 10 for t in range(10)])
    assert schedule.lr_at(10) == [1.0]
    assert schedule.lr_at(20)[0] == pytest.approx(2 / 3)
    assert schedule.lr_at(30) == schedule.lr_at(1000) == [0.0]


def test_groups_keep_their_own_peak():
    schedule = UBALR(sgd(1.0, 0.1), 8, phi=0.5)
    for t in range(9):
        first, second = schedule.lr_at(t)
        assert second == pytest.approx(first / 10)


def test_a_loaded_state_brings_its_phi_and_angle():
    rates = run(UBALR(sgd(), 40, phi=0.3, angle="midpoint", warmup_steps=4), 40)
    first = UBALR(sgd(), 40, phi=0.3, angle="midpoint", warmup_steps=4)
    run(first, 15)
    resumed = UBALR(sgd(), 10)
    resumed.load_state_dict(first.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    assert run(resumed, 25) == rates[15:]


# quadratics


@pytest.mark.parametrize("kappa", [4, 10, 100])
@pytest.mark.parametrize("T", [1, 5, 16])
@pytest.mark.filterwarnings("ignore:phi = :UserWarning")
def test_phi_of_twice_kappa_gives_chebyshevs_steps_and_the_optimal_contraction(kappa, T):
    schedule = UBALR(sgd(), T, phi=phi_from_condition_number(kappa), lr_min=1 / kappa, angle="midpoint")
    steps = np.array([schedule.lr_at(t)[0] for t in range(T)])
    np.testing.assert_allclose(steps, chebyshev_steps(T, 1.0, kappa), atol=1e-12, rtol=0)
    worst = np.abs(np.prod(1 - np.outer(steps, np.linspace(1, kappa, 20001)), axis=0)).max()
    rho = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    assert worst == pytest.approx(2 * rho**T / (1 + rho ** (2 * T)), rel=1e-9)


def test_contraction_of_the_reference_case():
    def worst(phi):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = UBALR(sgd(), 8, phi=phi, lr_min=0.1, angle="midpoint")
        steps = [schedule.lr_at(t)[0] for t in range(8)]
        return np.abs(np.prod(1 - np.outer(steps, np.linspace(1, 10, 20001)), axis=0)).max()

    assert [worst(phi) for phi in (20, 10, 40)] == pytest.approx([0.010609, 0.595, 0.0341], rel=2e-3)


@given(n=st.integers(1, 40), mu=st.floats(0.01, 10), kappa=st.floats(1, 1000))
def test_leja_order_is_a_reordering(n, mu, kappa):
    steps = chebyshev_steps(n, mu, mu * kappa, order="leja")
    np.testing.assert_allclose(np.sort(steps)[::-1], chebyshev_steps(n, mu, mu * kappa), rtol=1e-12)


def test_leja_starts_with_the_largest_eigenvalue_and_goes_to_the_other_end():
    decreasing, leja = chebyshev_steps(9, 1.0, 50.0), chebyshev_steps(9, 1.0, 50.0, order="leja")
    assert leja[0] == decreasing[-1]
    assert leja[1] == decreasing[0]


def test_only_the_leja_order_solves_a_quadratic_in_float32_with_many_steps():
    eigenvalues = torch.linspace(1, 1000, 64)
    target = torch.ones(64)

    def error(order):
        x = torch.zeros(64)
        for step in chebyshev_steps(128, 1.0, 1000.0, order=order):
            x = x - float(step) * eigenvalues * (x - target)
        return float((x - target).abs().max())

    rho = (math.sqrt(1000) - 1) / (math.sqrt(1000) + 1)
    optimum = 2 * rho**128 / (1 + rho**256)
    assert error("leja") <= 1.01 * optimum
    assert not error("decreasing") <= 1e6


def test_condition_number_one_is_cosine_with_equal_steps():
    assert phi_from_condition_number(1) == 2.0
    assert chebyshev_steps(5, 2.0, 2.0, order="leja") == pytest.approx(np.full(5, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number >= 1, got 0"),
        ({"total_steps": 10, "phi": 0.0}, "phi must be > 0, got 0.0"),
        ({"total_steps": 10, "phi": math.inf}, "phi must be > 0, got inf"),
        ({"total_steps": 10, "lr_min": 2.0}, "lr_min must be <= the smallest base lr = 1, got 2.0"),
        ({"total_steps": 10, "angle": "end"}, "angle must be one of 'endpoint', 'midpoint', got 'end'"),
    ],
    ids=["total_steps", "phi zero", "phi infinite", "lr_min", "angle"],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UBALR(sgd(), **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("uba_profile", 0.5, -1.0), "phi must be > 0, got -1.0"),
        (("chebyshev_steps", 0, 1.0, 2.0), "n must be a whole number >= 1, got 0"),
        (("chebyshev_steps", 3, 0.0, 2.0), "mu must be > 0, got 0.0"),
        (("chebyshev_steps", 3, 2.0, 1.0), "L must be >= mu = 2, got 1.0"),
        (("chebyshev_steps", 3, 1.0, 2.0, "random"), "order must be one of 'decreasing', 'leja', got 'random'"),
        (("phi_from_condition_number", 0.5), "kappa must be >= 1, got 0.5"),
    ],
    ids=["profile", "n", "mu", "L", "order", "kappa"],
)
def test_functions_refuse_bad_arguments(call, message):
    functions = {f.__name__: f for f in (uba_profile, chebyshev_steps, phi_from_condition_number)}
    with pytest.raises(ValueError, match=message):
        functions[call[0]](*call[1:])
