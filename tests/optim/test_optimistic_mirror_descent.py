import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks
from torch import nn

from headway.optim.mirror import Ball, Box, Simplex
from headway.optim.optimistic_mirror_descent import OptimisticEnsemble, OptimisticOMD, SEAOptimizer
from headway.testing import check_optimizer

MODES = {
    "convex": {"D": 2.0, "G": 4.0, "L": 1.0},
    "strongly_convex": {"mode": "strongly_convex", "lam": 0.5, "D": 2.0},
    "exp_concave": {"mode": "exp_concave", "D": 2.0, "G": 4.0, "alpha": 1.0},
}


def vectors(count, d=4, seed=0):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(d=4):
    return 0.1 * torch.ones(d, dtype=torch.float64)


def play(learner, gradients):
    points = []
    for g in gradients:
        points.append(learner.predict())
        learner.update(g)
    return torch.stack(points)


@pytest.mark.parametrize(
    "hyperparameters",
    [{}, {"D": 20.0, "lr": 0.5}, {"mode": "strongly_convex"}, {"mode": "exp_concave", "D": 20.0}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:a gradient has norm")
def test_contract(hyperparameters):
    check_optimizer(SEAOptimizer, **hyperparameters)


def test_zero_hint_is_projected_descent_with_the_same_steps():
    learner = OptimisticOMD(start(), **MODES["convex"], project=Ball(1.0), hint=lambda t: torch.zeros(4))
    x = start()
    for g in vectors(50):
        eta = learner.eta
        torch.testing.assert_close(learner.predict(), x, rtol=0, atol=1e-15)
        learner.update(g)
        x = Ball(1.0)(x - eta * g)


def test_both_half_steps_start_from_xhat_with_the_eta_of_before_the_gradient():
    learner = OptimisticOMD(start(), **MODES["convex"], project=Ball(1.0))
    xhat, hint, V = start(), torch.zeros(4, dtype=torch.float64), 0.0
    for g in vectors(30):
        eta = 2.0 / math.sqrt(10 * 4.0 + 4 * 16.0 + V)
        torch.testing.assert_close(learner.predict(), Ball(1.0)(xhat - eta * hint), rtol=1e-13, atol=1e-14)
        learner.update(g)
        xhat = Ball(1.0)(xhat - eta * g)
        V += float((g - hint).square().sum())
        hint = g
        assert pytest.approx(V) == learner.V


def test_first_gradient_counts_in_v_because_the_first_hint_is_zero():
    learner = OptimisticOMD(start(), **MODES["convex"])
    learner.predict()
    learner.update(torch.tensor([3.0, 0, 0, 0]))
    assert learner.V == 9.0


def test_perfect_hint_leaves_v_zero_eta_constant_and_regret_below_the_bound():
    gradients = vectors(200)
    learner = OptimisticOMD(
        torch.zeros(4).double(), **MODES["convex"], project=Ball(1.0), hint=lambda t: gradients[t - 1]
    )
    eta = learner.eta
    points = play(learner, gradients)
    assert learner.V == 0
    assert learner.eta == eta
    regret = float((points * gradients).sum() + gradients.sum(0).norm())  # the best point is the ball's end
    assert regret <= 2.0**2 / (2 * eta)


def test_constant_linear_loss_reaches_the_boundary_and_stays_there_with_bounded_regret():
    g = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    points = play(OptimisticOMD(torch.zeros(4).double(), D=2.0, G=1.0, L=1.0), g.expand(400, -1))
    torch.testing.assert_close(points[-300:], -g.expand(300, -1))
    assert float((points @ g + 1).sum()) == pytest.approx(float((points[:50] @ g + 1).sum()))


@pytest.mark.filterwarnings("ignore:a gradient has norm")
@pytest.mark.parametrize("mode", MODES)
def test_points_are_feasible_eta_does_not_grow_and_v_does_not_shrink(mode):
    learner = OptimisticOMD(torch.zeros(4).double(), **MODES[mode], project=Ball(1.0))
    etas, Vs = [], []
    for g in 10 * vectors(60):
        etas.append(learner.eta)
        Vs.append(learner.V)
        assert float(learner.predict().norm()) <= 1 + 1e-12
        learner.update(g)
        assert float(learner.state_dict()["xhat"].norm()) <= 1 + 1e-12
    assert etas == sorted(etas, reverse=True)
    assert sorted(Vs) == Vs


def test_strongly_convex_mode_converges_to_the_minimiser_and_takes_eta_2_over_lam_t():
    c = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    learner = OptimisticOMD(start(), mode="strongly_convex", lam=0.5, project=Ball(1.0))
    for t in range(1, 400):
        assert learner.eta == 2 / (0.5 * t)
        learner.update(0.5 * (learner.predict() - c))
    torch.testing.assert_close(learner.predict(), c, rtol=0, atol=1e-4)


def test_exp_concave_metric_is_shrunk_along_the_gradients_only():
    learner = OptimisticOMD(start(), **MODES["exp_concave"])
    first = learner.state_dict()["H_inverse"]
    play(learner, torch.tensor([2.0, 0, 0, 0], dtype=torch.float64).expand(10, -1))
    inverse = learner.state_dict()["H_inverse"]
    assert float(inverse[0, 0]) < float(first[0, 0])
    assert torch.equal(inverse[1:, 1:], first[1:, 1:])
    assert not inverse[0, 1:].any()


@pytest.mark.filterwarnings("ignore:a gradient has norm")
def test_sherman_morrison_is_the_inverse_of_the_metric_of_the_docstring():
    learner = OptimisticOMD(start(), **MODES["exp_concave"])
    gradients = 3 * vectors(200)
    play(learner, gradients)
    beta = min(1 / (4 * 4.0 * 2.0), 1.0) / 2
    H = (1 + beta * 16 / 2) * torch.eye(4, dtype=torch.float64) + beta / 2 * gradients.T @ gradients
    state = learner.state_dict()
    torch.testing.assert_close(state["H"], H, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["H_inverse"], torch.linalg.inv(H), rtol=0, atol=1e-10)


def test_a_function_projects_under_the_metric_in_exp_concave_mode():
    seen = []

    def project(v, H):
        seen.append(H.shape)
        return v

    play(OptimisticOMD(start(), **MODES["exp_concave"], project=project), 0.1 * vectors(3))
    assert set(seen) == {(4, 4)}


@pytest.mark.filterwarnings("ignore:a gradient has norm")
@pytest.mark.parametrize(
    ("project", "torch_project"),
    [
        (Ball(1.0), Ball(1.0)),
        (Box(-0.5, 0.5), Box(-0.5, 0.5)),
        (Simplex(), Simplex()),
        (lambda v: np.clip(v, -0.5, 0.5), lambda v: v.clamp(-0.5, 0.5)),
    ],
)
def test_numpy_arrays_go_in_and_come_out_and_give_the_same_points(project, torch_project):
    first = np.full(4, 0.25)
    learner = OptimisticOMD(first, **MODES["convex"], project=project)
    twin = OptimisticOMD(torch.from_numpy(first), **MODES["convex"], project=torch_project)
    for g in vectors(20).numpy():
        x = learner.predict()
        assert isinstance(x, np.ndarray)
        np.testing.assert_array_equal(x, twin.predict().numpy())
        x[:] = 99  # a copy: nothing happens to the learner
        learner.update(g)
        twin.update(torch.from_numpy(g))
    assert np.abs(learner.predict()).max() <= 1


def ensembles():
    return OptimisticEnsemble(start(), D=2.0, G=4.0, L=1.0, T=2000)


def learners():
    return {**{mode: OptimisticOMD(start(), **options) for mode, options in MODES.items()}, "ensemble": ensembles()}


@pytest.mark.filterwarnings("ignore:a gradient has norm")
@pytest.mark.parametrize("name", [*MODES, "ensemble"])
@pytest.mark.parametrize("played", [False, True])
def test_a_state_saved_in_mid_stream_continues_to_the_bit(name, played):
    one, other = learners()[name], learners()[name]
    gradients = vectors(40)
    play(one, gradients[:20])
    if played:
        one.predict()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    rest = play(one, gradients[20:])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(rest, play(other, gradients[20:]))


@pytest.mark.parametrize("name", [*MODES, "ensemble"])
def test_predict_twice_is_one_point_and_update_needs_a_predict(name):
    learner = learners()[name]
    with pytest.raises(RuntimeError, match="predict"):
        learner.update(torch.zeros(4))
    assert torch.equal(learner.predict(), learner.predict())
    learner.update(torch.ones(4))
    with pytest.raises(RuntimeError, match="predict"):
        learner.update(torch.zeros(4))
    assert learner.t == 2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"G": 1.0, "L": 1.0}, "D"),
        ({"D": 2.0, "L": 1.0}, "G"),
        ({"D": 2.0, "G": 1.0}, "L"),
        ({"mode": "strongly_convex"}, "lam"),
        ({"mode": "exp_concave", "D": 2.0, "G": 1.0}, "alpha"),
        ({"D": 0.0, "G": 1.0, "L": 1.0}, "D"),
        ({**MODES["convex"], "project": Ball(0.01)}, "x0"),
        ({**MODES["exp_concave"], "project": Box(-1.0, 1.0)}, "project"),
        ({**MODES["convex"], "hint": "first"}, "hint"),
        ({"mode": "concave"}, "mode"),
    ],
)
def test_missing_and_wrong_arguments_raise_and_name_themselves(options, name):
    with pytest.raises(ValueError, match=rf"^{name} "):
        OptimisticOMD(start(), **options)


def test_start_must_be_a_vector_of_floats():
    for x0 in (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="x0 must be a vector"):
            OptimisticOMD(x0, **MODES["convex"])


@pytest.mark.parametrize("name", [*MODES, "ensemble"])
def test_bad_gradients_are_refused_before_anything_changes(name):
    learner = learners()[name]
    learner.predict()
    before = learner.state_dict()
    for bad, error in ((torch.tensor([math.nan, 0, 0, 0]), FloatingPointError), (torch.zeros(3), ValueError)):
        with pytest.raises(error, match="gradient"):
            learner.update(bad)
    assert str(learner.state_dict()) == str(before)


def test_gradients_whose_square_overflows_are_refused_before_anything_changes():
    learner = OptimisticOMD(start(), **MODES["convex"])
    learner.predict()
    before = str(learner.state_dict())
    with pytest.raises(FloatingPointError, match="too large"):
        learner.update(torch.full((4,), 1e200, dtype=torch.float64))
    assert str(learner.state_dict()) == before
    parameters = weights()
    optimizer = SEAOptimizer(parameters)
    set_gradients(parameters, 0, scale=1e200)
    with pytest.raises(FloatingPointError, match="too large"):
        optimizer.step()
    assert optimizer.param_groups[0]["V"] == 0
    assert torch.equal(flat(parameters), flat(weights()))


def test_delta_takes_the_place_of_l():
    learner = OptimisticOMD(start(), D=2.0, G=1.0, delta=12.0)
    assert learner.eta == 2.0 / math.sqrt(12 + 4)


def test_gradients_above_g_are_used_as_they_are_and_warned_of_once():
    loud, quiet = (OptimisticOMD(start(), D=2.0, G=G, delta=100.0 - 4 * G**2) for G in (1.0, 4.0))
    with pytest.warns(UserWarning, match="norm 3 > G = 1") as seen:
        points = play(loud, torch.tensor([3.0, 0, 0, 0], dtype=torch.float64).expand(5, -1))
    assert len(seen) == 1
    torch.testing.assert_close(points, play(quiet, torch.tensor([3.0, 0, 0, 0], dtype=torch.float64).expand(5, -1)))


def test_ensemble_grid_is_that_of_the_docstring():
    assert list(OptimisticEnsemble(start(), D=2.0, G=2.0, L=1.0, T=4000).eta) == pytest.approx(
        [min(1 / 8, math.sqrt(4 / (8 * 4 * 4000)) * 2**i) for i in range(6)]
    )


def test_ensemble_of_one_is_the_learner_with_its_step():
    ensemble = OptimisticEnsemble(start(), D=2.0, G=1.0, L=1.0, T=10)
    assert len(ensemble.eta) == 1
    eta = float(ensemble.eta[0])
    base = OptimisticOMD(start(), D=2.0, mode="strongly_convex", lam=1.0)
    for g in 0.4 * vectors(10):
        base._constants["lam"] = 2 / (eta * base.t)  # eta_t = 2 / (lam t)
        torch.testing.assert_close(ensemble.predict(), base.predict(), rtol=1e-13, atol=1e-14)
        for learner in (ensemble, base):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                learner.update(g)


@pytest.mark.filterwarnings("ignore:a gradient has norm")
def test_ensemble_equals_its_formulas_expert_by_expert():
    ensemble = ensembles()
    etas, N = [float(eta) for eta in ensemble.eta], len(ensemble.eta)
    ball = Ball(1.0, center=start())
    xhat = [start()] * N
    before = [start()] * N
    losses, V, hint = [0.0] * N, 0.0, torch.zeros(4, dtype=torch.float64)
    for g in vectors(30):
        x = [ball(h - eta * hint) for h, eta in zip(xhat, etas, strict=True)]
        moves = [2 * float((a - b).square().sum()) for a, b in zip(x, before, strict=True)]
        eps = min(1 / 32, math.sqrt(math.log(N) / (4 * V)) if V else math.inf)
        weights = [math.exp(-eps * (losses[i] + float(hint @ x[i]) + moves[i])) for i in range(N)]
        weights = [w / sum(weights) for w in weights]
        torch.testing.assert_close(ensemble.predict(), sum(w * p for w, p in zip(weights, x, strict=True)))
        assert ensemble.weights.tolist() == pytest.approx(weights)
        assert float(ensemble.weights.sum()) == pytest.approx(1.0, abs=1e-14)
        ensemble.update(g)
        losses = [losses[i] + float(g @ x[i]) + moves[i] for i in range(N)]
        V += float((g - hint).square().sum())
        xhat = [ball(h - eta * g) for h, eta in zip(xhat, etas, strict=True)]
        before, hint = x, g


def test_ensemble_with_a_function_projects_expert_by_expert():
    shapes = set()

    def project(v):
        shapes.add(tuple(v.shape))
        return v.clamp(-1, 1)

    ours = OptimisticEnsemble(start(), D=4.0, G=4.0, L=1.0, T=2000, project=project)
    theirs = OptimisticEnsemble(start(), D=4.0, G=4.0, L=1.0, T=2000, project=Box(-1.0, 1.0))
    gradients = vectors(20)
    assert torch.equal(play(ours, gradients), play(theirs, gradients))
    assert shapes == {(4,)}


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(5, 2), (3,), ()]]


def set_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.filterwarnings("ignore:a gradient has norm")
@pytest.mark.parametrize("mode", MODES)
def test_optimizer_is_the_learner_on_the_flattened_group(mode):
    parameters = weights()
    optimizer = SEAOptimizer(parameters, **MODES[mode])
    learner = OptimisticOMD(flat(parameters), **MODES[mode])
    for step in range(30):
        torch.testing.assert_close(flat(parameters), learner.predict(), rtol=1e-10, atol=1e-12)
        set_gradients(parameters, step)
        learner.update(flat([p.grad for p in parameters]))
        optimizer.step()


@pytest.mark.filterwarnings("ignore:a gradient has norm")
@pytest.mark.parametrize("mode", MODES)
def test_parameters_stay_in_the_ball_around_the_start_also_when_gradients_are_missing(mode):
    parameters = weights()
    first = flat(parameters)
    optimizer = SEAOptimizer(parameters, **{**MODES[mode], "D": 0.6})
    for step in range(12):
        set_gradients(parameters, step, scale=10.0)
        if step % 3 == 1:
            parameters[step % 2].grad = None
        kept = [p.detach().clone() for p in parameters if p.grad is None]
        optimizer.step()
        assert all(torch.equal(a, p) for a, p in zip(kept, [p for p in parameters if p.grad is None], strict=True))
        assert float((flat(parameters) - first).norm()) <= 0.3 + 1e-10


def test_optimizer_warns_once_of_gradients_above_g_and_not_at_construction():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameters = weights()
        optimizer = SEAOptimizer(parameters, G=0.1)
    set_gradients(parameters, 0)
    with pytest.warns(UserWarning, match="G = 0.1"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_strongly_convex_mode_does_not_warn_of_g():
    parameters = weights()
    optimizer = SEAOptimizer(parameters, mode="strongly_convex", G=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_gradients(parameters, 0)
        optimizer.step()


def test_both_half_steps_of_a_round_have_the_same_lr():
    ours, expected = weights(), weights()
    optimizer, reference = SEAOptimizer(ours, lr=1.0), SEAOptimizer(expected, lr=1.0)
    for o, p in ((optimizer, ours), (reference, expected)):
        set_gradients(p, 0)
        o.step()
    optimizer.param_groups[0]["lr"] = 0.5
    eta = optimizer.param_groups[0]["eta"]
    xhat = [optimizer.state[p]["xhat"].clone() for p in ours]
    set_gradients(ours, 1)
    optimizer.step()
    moved = [x - eta * p.grad for x, p in zip(xhat, ours, strict=True)]
    torch.testing.assert_close(flat([optimizer.state[p]["xhat"] for p in ours]), flat(moved))
    assert optimizer.param_groups[0]["eta"] < 0.51 * eta


def test_state_of_bfloat16_parameters_is_float32_after_loading_too():
    parameters = weights(torch.bfloat16)
    optimizer = SEAOptimizer(parameters)
    set_gradients(parameters, 0)
    optimizer.step()
    loaded = SEAOptimizer(weights(torch.bfloat16))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    states = [*optimizer.state.values(), *loaded.state.values()]
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}


def sharded_run(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def distribute(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0) if tensor.ndim else Replicate()])

    for mode in ("convex", "strongly_convex"):
        parameters = [nn.Parameter(distribute(p.detach())) for p in weights()]
        optimizer = SEAOptimizer(parameters, **{**MODES[mode], "D": 0.5})
        for step in range(4):
            plain = weights()
            set_gradients(plain, step)
            for p, q in zip(parameters, plain, strict=True):
                p.grad = distribute(q.grad)
            optimizer.step()
        torch.save([p.detach().full_tensor() for p in parameters], f"{folder}/{mode}-{rank}.pt")
    with pytest.raises(ValueError, match="couples all entries"):
        SEAOptimizer(parameters, mode="exp_concave")


@pytest.mark.filterwarnings("ignore:a gradient has norm")
def test_sharded_parameters_take_the_steps_of_whole_ones(tmp_path):
    run_ranks(sharded_run, tmp_path)
    for mode in ("convex", "strongly_convex"):
        parameters = weights()
        optimizer = SEAOptimizer(parameters, **{**MODES[mode], "D": 0.5})
        for step in range(4):
            set_gradients(parameters, step)
            optimizer.step()
        for rank in range(2):
            for p, whole in zip(parameters, torch.load(tmp_path / f"{mode}-{rank}.pt"), strict=True):
                torch.testing.assert_close(whole, p.detach(), rtol=1e-9, atol=1e-12)
