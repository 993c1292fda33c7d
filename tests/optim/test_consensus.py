import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch

from headway.optim.consensus import CBO, cbo_minimize, cbo_step, consensus_point, consensus_weights


def particles(n=12, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy(x):
    return (x**2).sum(-1) + 2.5 * (1 - torch.cos(2 * math.pi * x)).sum(-1)


def run(swarm, steps, f=energy):
    for _ in range(steps):
        swarm.tell(f(swarm.ask()))
    return swarm


START = torch.tensor([[1.5, -0.5], [0.25, 2.0], [-1.0, 0.75], [3.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("noise", "sigma", "x", "v"),
    [
        (
            "isotropic",
            0.3,
            [
                [1.2620704530537177, -0.6530756019785157],
                [0.0892495982701584, 1.9532048546603424],
                [-0.9688836254751538, 0.7635596703391005],
                [2.705902650658876, -2.214647142441171],
            ],
            [-0.6915026784936168, 1.0801421041039259],
        ),
        (
            "anisotropic",
            5.0,
            [
                [-0.348060176928648, 0.6214125510918854],
                [-0.7829675498867433, 2.0308305559663635],
                [-1.001518937809314, 0.744489887423964],
                [0.7799555500268092, 0.4322042078489648],
            ],
            [-1.0015057382045192, 0.7445064601868926],
        ),
    ],
)
def test_three_steps_equal_cbxpy_with_the_same_noise(noise, sigma, x, v):
    # PdIPS/CBXpy at 1ff2b4a, cbx.dynamics.CBO(lamda=1, dt=0.02, alpha=2) with a sampler that returns these cosines.
    point = START.clone()
    for step in range(3):
        xi = torch.cos(torch.arange(8, dtype=torch.float64) + step + 1).view(4, 2)
        consensus = consensus_point(point, energy(point), 2.0)
        radius = (point - consensus).norm(dim=1, keepdim=True) if noise == "isotropic" else None
        point = cbo_step(point, consensus, xi, 1.0, 0.02, sigma, radius)
    torch.testing.assert_close(point, torch.tensor(x, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(consensus, torch.tensor(v, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_effective_sample_size_schedule_agrees_with_cbxpy():
    # cbx.scheduler.effective_sample_size(eta=0.5, solve_max_it=80), which stops at a deviation of 0.01 particles.
    from headway.optim.consensus import _alpha_for_half

    alpha = _alpha_for_half(energy(START), 1e5)
    assert float(alpha) == pytest.approx(0.33379601070880893, rel=0.02)
    weights = consensus_weights(energy(START), alpha)
    assert float(1 / weights.square().sum()) == pytest.approx(2.0, abs=1e-6)


def test_the_constants_of_the_authors_matlab_code_run():
    # CBO_update.m and compute_valpha.m of KonstantinRiedl/CBOGlobalConvergenceAnalysis at b6cc87e, by hand.
    point = START.clone()
    consensus = consensus_point(point, energy(point), 1e15)
    assert torch.equal(consensus, START[2])  # energies 12.5, 6.5625, 4.0625, 13
    xi = torch.ones(4, 2, dtype=torch.float64)
    moved = cbo_step(point, consensus, xi, 1.0, 0.02, 0.1, (point - consensus).norm(dim=1, keepdim=True))
    drift = point - START[2]
    expected = point - 0.02 * drift + 0.1 * math.sqrt(0.02) * drift.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moved, expected)
    swarm = run(CBO(particles(100, 2), alpha=1e15, lam=1.0, sigma=0.1, dt=0.02, noise="isotropic"), 200)
    assert swarm.consensus.isfinite().all()


def test_without_noise_particles_contract_to_the_consensus_by_one_minus_lam_dt_and_stay_in_their_hull():
    x = particles()
    swarm = CBO(x, sigma=0.0, lam=2.0, dt=0.1, alpha=3.0)
    swarm.tell(energy(x))
    torch.testing.assert_close(swarm.x - swarm.consensus, (1 - 2.0 * 0.1) * (x - swarm.consensus))
    for _ in range(20):
        before = swarm.x
        run(swarm, 1)
        for bounds in (before, swarm.x):
            assert (swarm.consensus >= bounds.amin(0) - 1e-12).all()
            assert (swarm.consensus <= bounds.amax(0) + 1e-12).all()
        assert (swarm.x.amin(0) >= before.amin(0) - 1e-12).all()
        assert (swarm.x.amax(0) <= before.amax(0) + 1e-12).all()


def test_alpha_zero_is_the_mean_and_a_huge_alpha_the_best_with_ties_averaged():
    x, E = particles(4), torch.tensor([3.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(consensus_point(x, E, 0.0), x.mean(0))
    torch.testing.assert_close(consensus_point(x, E, 1e15), (x[1] + x[2]) / 2)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 64.0), (8.0, 0.0)])
def test_shifting_the_energy_or_scaling_it_against_alpha_changes_nothing(scale, shift):
    plain = run(CBO(particles(), alpha=2.0), 10)
    other = run(CBO(particles(), alpha=2.0 / scale), 10, lambda x: scale * energy(x) + shift)
    torch.testing.assert_close(plain.x, other.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise", ["anisotropic", "isotropic"])
def test_translating_the_problem_translates_the_run(noise):
    shift = torch.tensor([4.0, -8.0, 0.5], dtype=torch.float64)
    options = {"noise": noise, "sigma": 0.3, "alpha": 2.0}
    plain = run(CBO(particles(), **options), 10)
    moved = run(CBO(particles() + shift, **options), 10, lambda x: energy(x - shift))
    torch.testing.assert_close(plain.x + shift, moved.x, rtol=1e-9, atol=1e-9)


def test_isotropic_steps_rotate_with_the_problem_and_anisotropic_ones_do_not():
    x, xi = particles(), particles(seed=1)
    Q = torch.linalg.qr(particles(3, 3, seed=2))[0]
    v = consensus_point(x, energy(x), 2.0)

    def isotropic(x, v, xi):
        return cbo_step(x, v, xi, 1.0, 0.01, 0.5, (x - v).norm(dim=1, keepdim=True))

    torch.testing.assert_close(isotropic(x @ Q, v @ Q, xi @ Q), isotropic(x, v, xi) @ Q)
    assert not torch.allclose(cbo_step(x @ Q, v @ Q, xi @ Q, 1, 0.01, 0.5), cbo_step(x, v, xi, 1, 0.01, 0.5) @ Q)
    scales = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64)
    anisotropic = cbo_step(x, v, xi, 1, 0.01, 0.5)
    torch.testing.assert_close(cbo_step(x * scales, v * scales, xi, 1, 0.01, 0.5), anisotropic * scales)


@pytest.mark.parametrize("noise", ["anisotropic", "isotropic"])
def test_equal_particles_do_not_move(noise):
    x = torch.tensor([0.1, 0.7, -1e8 / 3], dtype=torch.float64).expand(30, 3)
    swarm = run(CBO(x, noise=noise), 5)
    assert torch.equal(swarm.x, x)
    assert swarm.spread == 0


def test_permuting_particles_permutes_the_step():
    x, xi, order = particles(), particles(seed=1), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    v = consensus_point(x, energy(x), 2.0)
    torch.testing.assert_close(consensus_point(x[order], energy(x[order]), 2.0), v)
    assert torch.equal(cbo_step(x[order], v, xi[order], 1, 0.01, 5), cbo_step(x, v, xi, 1, 0.01, 5)[order])


def test_with_lam_dt_one_isotropic_particles_jump_to_noise_around_the_consensus():
    x, xi = particles(), particles(seed=1)
    v = consensus_point(x, energy(x), 2.0)
    radius = (x - v).norm(dim=1, keepdim=True)
    torch.testing.assert_close(cbo_step(x, v, xi, 10.0, 0.1, 0.7, radius), v + 0.7 * math.sqrt(0.1) * radius * xi)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "alpha_schedule": "ess"}, {"variant": "hopping"}], ids=str)
def test_ask_and_tell_equal_cbo_minimize_with_the_same_generator(options):
    def generator():
        return torch.Generator().manual_seed(7)

    swarm = run(CBO((12, 3, (-2.0, 4.0)), generator=generator(), **options), 15)
    result = cbo_minimize(energy, (12, 3, (-2.0, 4.0)), steps=15, generator=generator(), **options)
    assert np.array_equal(result.x, swarm.consensus.numpy())
    assert np.array_equal(result.best_x, swarm.best_x.numpy())
    assert (result.best_f, result.nit, result.nfev) == (swarm.best_f, 15, 15 * 12 + 1)
    assert result.fun == float(energy(swarm.consensus))
    assert not result.success
    one_by_one = cbo_minimize(
        energy, (12, 3, (-2.0, 4.0)), steps=15, vectorized=False, generator=generator(), **options
    )
    assert np.allclose(one_by_one.x, result.x)


def test_a_step_evaluates_every_particle_once():
    calls = []
    cbo_minimize(lambda x: calls.append(len(x)) or energy(x), particles(), steps=4)
    assert calls == [12] * 4 + [1]


def test_minimize_stops_when_the_particles_agree():
    result = cbo_minimize(energy, particles(), steps=1000, sigma=0.0, dt=0.5, tol_spread=1e-6)
    assert result.success
    assert result.nit < 40
    assert result.spread <= 1e-6


def test_vmap_over_runs_equals_the_runs():
    x = torch.stack([particles(seed=seed) for seed in range(4)])
    xi = torch.stack([particles(seed=10 + seed) for seed in range(4)])

    def one(x, xi):
        return cbo_step(x, consensus_point(x, energy(x), 2.0), xi, 1.0, 0.01, 5.0)

    single = torch.stack([one(x[i], xi[i]) for i in range(4)])
    torch.testing.assert_close(torch.vmap(one)(x, xi), single)
    torch.testing.assert_close(one(x, xi), single)  # leading dimensions do the same


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_lost_particle_counts_as_one_that_was_dropped(lost):
    x = particles()
    E = energy(x)
    E[[2, 5]] = lost
    rest = torch.tensor([i for i in range(12) if i not in (2, 5)])
    torch.testing.assert_close(consensus_point(x, E, 2.0), consensus_point(x[rest], E[rest], 2.0))
    swarm = CBO(x, alpha=2.0)
    swarm.tell(E)
    assert swarm.x.isfinite().all()
    assert swarm.best_f == float(E[rest].min())


def test_energies_that_are_all_lost_raise_and_change_nothing():
    swarm = run(CBO(particles()), 3)
    before = swarm.state_dict()
    with pytest.raises(FloatingPointError, match="none of 12 energies is finite"):
        swarm.tell(torch.full((12,), math.nan))
    after = swarm.state_dict()
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)


def test_a_batch_that_is_lost_follows_the_consensus_of_all():
    swarm = CBO(particles(4), batch_size=2, sigma=0.0, lam=100.0, dt=0.01)
    E = torch.full((4,), math.nan)
    E[1] = 1.0
    swarm.tell(E)
    torch.testing.assert_close(swarm.x, particles(4)[1].expand(4, 3))


def test_batches_are_disjoint_and_have_their_own_consensus():
    x = torch.arange(12.0, dtype=torch.float64).view(12, 1)
    swarm = CBO(x, batch_size=3, sigma=0.0, lam=100.0, dt=0.01, alpha=1e15)
    swarm.tell(x[:, 0])
    places, counts = swarm.x.flatten().unique(return_counts=True)
    assert counts.tolist() == [3, 3, 3, 3]
    assert 0.0 in places.tolist()
    assert swarm.consensus.tolist() == [0.0]


def test_a_hop_samples_around_the_consensus():
    swarm = CBO(torch.tensor([2.0, -3.0]).expand(4000, 2), variant="hopping", hop_width=0.4)
    swarm.tell(torch.zeros(4000))
    torch.testing.assert_close(swarm.x.mean(0), torch.tensor([2.0, -3.0]), rtol=0, atol=0.03)
    torch.testing.assert_close(swarm.x.std(0), torch.tensor([0.4, 0.4]), rtol=0, atol=0.02)


def test_positions_are_clipped():
    swarm = run(CBO(particles(), noise="isotropic", sigma=50.0, dt=1.0, clip=10.0), 10)
    assert swarm.x.abs().max() == 10


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "alpha_schedule": "ess"}, {"variant": "hopping"}], ids=str)
def test_copies_and_saved_states_continue_the_same(options):
    swarm = run(CBO(particles(), generator=torch.Generator().manual_seed(3), **options), 5)
    file = io.BytesIO()
    torch.save(swarm.state_dict(), file)
    file.seek(0)
    loaded = CBO(particles(seed=9), **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    others = [loaded, copy.deepcopy(swarm), pickle.loads(pickle.dumps(swarm))]
    run(swarm, 5)
    for other in others:
        run(other, 5)
        assert torch.equal(swarm.x, other.x)
        assert torch.equal(swarm.best_x, other.best_x)
        assert (swarm.best_f, swarm.n_evals, swarm.spread) == (other.best_f, other.n_evals, other.spread)


def test_the_global_random_state_is_not_used():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = run(CBO((12, 3, (-1.0, 1.0)), batch_size=4), 3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first.x, run(CBO((12, 3, (-1.0, 1.0)), batch_size=4), 3).x)


def test_wrong_arguments_are_named():
    x = particles()
    for options, message in (
        ({"dt": 0.0}, "dt must be > 0, got 0.0"),
        ({"sigma": -1.0}, "sigma must be >= 0, got -1.0"),
        ({"lam": 10.0, "dt": 0.2}, r"lam \* dt must be <= 1.*got 2.0"),
        ({"batch_size": 5}, "batch_size must divide the number of particles, 12, got 5"),
        ({"noise": "pink"}, "noise must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            CBO(x, **options)
    CBO(x, lam=10.0, dt=0.2, variant="hopping")
    with pytest.raises(ValueError, match="two or more particles"):
        CBO(x[:1])
    with pytest.raises(ValueError, match="n_particles must be a whole number >= 2, got 1"):
        CBO((1, 3, (0.0, 1.0)))
    with pytest.raises(ValueError, match="finite"):
        CBO(x * math.nan)
    with pytest.raises(ValueError, match=r"shape \(12,\), got \(12, 1\)"):
        CBO(x).tell(torch.zeros(12, 1))
    with pytest.raises(ValueError, match=r"shape \(12, 3\), got \(4, 3\)"):
        CBO(x).load_state_dict(CBO(particles(4)).state_dict())
