import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from headway.optim.damped_solve import LinearOperator, LowRank
from headway.optim.gradient_normalized_smoothness import (
    GNSNewton,
    exact_hessian,
    fisher,
    gns_minimize,
    power_norm,
    weighted_gauss_newton,
)
from headway.testing import check_optimizer

DTYPE = torch.float64


def identity(x):
    return torch.eye(x.numel(), dtype=x.dtype)


def identity_low_rank(x):
    return LowRank(identity(x))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"curvature": None},
        {"solver": "cg"},
        {"curvature": identity},
        {"curvature": identity_low_rank, "gamma0": 0.1},
    ],
    ids=lambda settings: ",".join(settings) or "defaults",
)
def test_keeps_the_contract(settings):
    check_optimizer(GNSNewton, **settings)


def data(rows=12, columns=5):
    i, j = torch.arange(rows, dtype=DTYPE).unsqueeze(1), torch.arange(columns, dtype=DTYPE).unsqueeze(0)
    return torch.sin(1 + 3 * i + 7 * j + 0.5 * i * j), torch.cos(2 * i[:, 0])


class LogSumExp:
    """mu logsumexp((A x - b) / mu) with its minimum at 0."""

    def __init__(self, mu=1.0):
        A, b = data()
        self.A, self.b, self.mu = A - A.mT @ torch.softmax(-b / mu, 0), b, mu

    def value(self, x):
        return self.mu * torch.logsumexp((self.A @ x - self.b) / self.mu, 0)

    def __call__(self, x):
        return self.value(x), self.A.mT @ torch.softmax((self.A @ x - self.b) / self.mu, 0)

    @property
    def exact(self):
        return exact_hessian(self.value)

    @property
    def gauss_newton(self):
        return weighted_gauss_newton(self.A, self.b, self.mu)


def autograd(f):
    def fun_and_grad(x):
        x = x.detach().requires_grad_()
        value = f(x)
        return value.detach(), torch.autograd.grad(value, x)[0]

    return fun_and_grad


def ones(d=5):
    return torch.ones(d, dtype=DTYPE)


def values(result):
    return [step.fun for step in result.history] + [result.fun]


def chebyshev(x):
    return torch.cat([(1 - x[:1]) / 2, x[1:] - (2 * x[:-1] ** 2 - 1)])


def cubed(x):
    """||u||^3 / 3."""
    return torch.linalg.vector_norm(chebyshev(x)) ** 3 / 3


CURVATURES = {
    "exact": lambda problem: problem.exact,
    "gauss_newton": lambda problem: problem.gauss_newton,
    "zero": lambda problem: None,
}

# epfml/grad-norm-smooth at 9f4ca00, grad_norm_smooth in float64: f before each iteration and at the end, gamma after
# it, and the number of solves. The code adds 1e-8 to gamma, hence the tolerance.
LOG_SUM_EXP = {
    (1.0, "exact"): (
        [3.8767377355973114, 3.210289309761917, 2.819297277417107, 2.7400238909487804, 2.7387615571695854],
        [2.0, 4.0, 8.0, 16.0],
        4,
    ),
    (1.0, "gauss_newton"): (
        [3.8767377355973114, 3.4712731185123262, 3.0753650508912544, 2.8217715077972465, 2.7421341164985433],
        [2.0, 4.0, 8.0, 16.0],
        4,
    ),
    (0.1, "exact"): (
        [2.562318362093278, 1.7176513518697178, 1.4573441013621133, 1.2541499708154087, 1.1639615224452171],
        [2.0, 2.0, 1.0, 0.5],
        9,
    ),
    (0.1, "gauss_newton"): (
        [2.562318362093278, 2.481463216477688, 2.4006080708621695, 2.3197529252468145, 2.238897779632145],
        [1.0, 1.0, 1.0, 1.0],
        8,
    ),
}
CHEBYSHEV = {
    "exact": ([1 / 3, 0.32332271837760096, 0.3140702269532542, 0.30196671067767, 0.29153751975726755], 8),
    "gauss_newton_full": ([1 / 3, 0.32332271837760096, 0.314778182921542, 0.3041818457131224, 0.29420369100315613], 8),
    "fisher_term": ([1 / 3, 0.3254412278471397, 0.3249529011174224, 0.3248486668455934, 0.32475013115491924], 15),
}


@pytest.mark.parametrize(("mu", "kind"), list(LOG_SUM_EXP))
def test_trajectory_of_the_official_code_on_log_sum_exp(mu, kind):
    problem = LogSumExp(mu)
    result = gns_minimize(problem, ones(), CURVATURES[kind](problem), max_iter=4)
    f, gamma, solves = LOG_SUM_EXP[mu, kind]
    assert values(result) == pytest.approx(f, rel=1e-6)
    assert [2 * step.gamma for step in result.history] == gamma
    assert result.nsolve == solves


@pytest.mark.parametrize("kind", list(CHEBYSHEV))
def test_trajectory_of_the_official_code_on_chebyshev_equations(kind):
    curvature = exact_hessian(cubed) if kind == "exact" else power_norm(chebyshev, 3, kind)
    result = gns_minimize(autograd(cubed), torch.tensor([-1.0, 1.0, 1.0], dtype=DTYPE), curvature, max_iter=4)
    f, solves = CHEBYSHEV[kind]
    assert values(result) == pytest.approx(f, rel=1e-5)
    assert result.nsolve == solves


def test_trajectory_of_the_official_code_in_a_metric():
    A, _ = data()
    result = gns_minimize(LogSumExp(0.1), ones(), None, B=A.mT @ A, max_iter=5)
    expected = [2.562318362093278, 2.2320410497331333, 1.5714880817078454, 1.3007337044122722, 1.2077425931502663]
    assert values(result) == pytest.approx([*expected, 1.1102193324274088], rel=1e-6)
    assert result.nsolve == 10


@pytest.mark.parametrize("mu", [1.0, 0.1])
@pytest.mark.parametrize("kind", list(CURVATURES))
def test_every_accepted_step_passes_the_test_and_stays_in_the_radius(mu, kind):
    problem = LogSumExp(mu)
    result = gns_minimize(problem, ones(), CURVATURES[kind](problem), gtol=1e-4, max_iter=100)
    norms = [step.grad_norm for step in result.history[1:]] + [float(result.jac.norm())]
    for step, (before, after), norm in zip(result.history, itertools.pairwise(values(result)), norms, strict=True):
        assert before - after >= norm**2 / (8 * step.damping)
        assert after <= before
        assert step.damping == step.grad_norm / step.gamma
        assert step.step_norm <= step.gamma * (1 + 1e-9)


@pytest.mark.parametrize("kind", list(CURVATURES))
def test_trials_follow_the_change_of_gamma(kind):
    problem = LogSumExp(0.1)
    result = gns_minimize(problem, ones(), CURVATURES[kind](problem), gamma0=64.0, gtol=1e-3, max_iter=60)
    trials = sum(step.trials for step in result.history)
    assert trials == result.nsolve
    assert trials == pytest.approx(2 * result.nit + math.log2(64.0 / result.gamma))


def test_every_first_trial_is_accepted_on_a_quadratic_and_convergence_is_superlinear():
    A, b = data()
    H, x_star = A.mT @ A, torch.linalg.solve(A.mT @ A, A.mT @ b)
    errors = []
    result = gns_minimize(
        lambda x: ((A @ x - b).square().sum() / 2, A.mT @ (A @ x - b)),
        ones(),
        lambda x: H,
        gamma0=0.5,
        gtol=1e-9,
        callback=lambda x, f: errors.append(float((x - x_star).norm())),
    )
    assert result.status == "gtol"
    assert [step.trials for step in result.history] == [1] * result.nit
    assert [step.gamma for step in result.history] == [0.5 * 2**k for k in range(result.nit)]
    ratios = [after / before for before, after in itertools.pairwise(errors)]
    assert all(after < before for before, after in itertools.pairwise(ratios))
    assert ratios[-1] < 1e-2


def test_without_curvature_the_step_is_normalised_gradient_descent():
    A, _ = data()
    B, problem = A.mT @ A, LogSumExp(0.5)
    points = []
    result = gns_minimize(problem, ones(), B=B, max_iter=6, callback=lambda x, f: points.append(x))
    for step, (before, after) in zip(result.history, itertools.pairwise(points), strict=True):
        expected = before - torch.linalg.solve(B, problem(before)[1]) / step.damping
        assert torch.allclose(after, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("L", [0.01, 1.0, 300.0])
def test_without_curvature_a_rejection_ends_below_twice_the_smoothness(L):
    scale = torch.linspace(0.1, 1.0, 5, dtype=DTYPE) * L
    result = gns_minimize(lambda x: ((scale * x * x).sum() / 2, scale * x), ones(), max_iter=60, gtol=1e-6)
    rejected = [step.damping for step in result.history if step.trials > 1]
    assert rejected
    assert max(rejected) <= 2 * L * (1 + 1e-12)


def test_gradient_descent_reaches_gradients_far_below_the_first_radii():
    scale = torch.tensor(
        [1e2, 1e4], dtype=DTYPE
    )  # radii near the end are 1e-12, where lam = ||g|| / (gamma + 1e-8) fails
    result = gns_minimize(lambda x: ((scale * x * x).sum() / 2, scale * x), ones(2), gtol=1e-8, max_iter=5000)
    assert result.status == "gtol"


def test_iterates_follow_a_linear_change_of_variables():
    A, _ = data()
    problem, B = LogSumExp(0.3), A.mT @ A
    T = torch.eye(5, dtype=DTYPE) + 0.2 * data(5)[0]
    back = torch.linalg.inv(T)

    def mapped(y):
        f, g = problem(back @ y)
        return f, back.mT @ g

    def mapped_curvature(y):
        return back.mT @ problem.gauss_newton(back @ y).dense() @ back

    first = gns_minimize(problem, ones(), problem.gauss_newton, B=B, max_iter=8)
    second = gns_minimize(mapped, T @ ones(), mapped_curvature, B=back.mT @ B @ back, max_iter=8)
    assert torch.allclose(T @ first.x, second.x, rtol=0, atol=1e-9)
    assert first.nsolve == second.nsolve


@pytest.mark.parametrize(("factor", "constant"), [(1e3, 0.0), (1e-3, 0.0), (1.0, 5.0)])
def test_scale_and_offset_of_the_function_do_not_matter(factor, constant):
    problem = LogSumExp(0.3)

    def changed(x):
        f, g = problem(x)
        return factor * f + constant, factor * g

    first = gns_minimize(problem, ones(), lambda x: problem.gauss_newton(x).dense(), max_iter=8)
    second = gns_minimize(changed, ones(), lambda x: factor * problem.gauss_newton(x).dense(), max_iter=8)
    assert torch.allclose(first.x, second.x, rtol=0, atol=1e-10)
    assert first.gamma == second.gamma


def test_solvers_agree():
    problem = LogSumExp(0.3)
    results = [
        gns_minimize(problem, ones(), problem.gauss_newton, max_iter=8, solver=solver, cg_tol=1e-13)
        for solver in ("cholesky", "woodbury", "cg")
    ]
    operator = gns_minimize(
        problem, ones(), lambda x: LinearOperator(problem.gauss_newton(x).matvec), max_iter=8, cg_tol=1e-13
    )
    for other in (*results[1:], operator):
        assert torch.allclose(results[0].x, other.x, rtol=0, atol=1e-8)
        assert results[0].nsolve == other.nsolve


def test_gauss_newton_without_residual_is_exact_newton():
    A, _ = data(5, 5)
    b = A @ torch.linspace(-1, 1, 5, dtype=DTYPE)
    f = autograd(lambda x: (A @ x - b).square().sum() / 2)
    first = gns_minimize(f, ones(), power_norm(lambda x: A @ x - b))
    second = gns_minimize(f, ones(), lambda x: A.mT @ A)
    assert first.status == "gtol"
    assert first.nit == second.nit
    assert [step.damping for step in first.history] == pytest.approx(
        [step.damping for step in second.history], rel=1e-4
    )


@pytest.mark.parametrize("p", [2.0, 3.0, 4.0, 5.0])
def test_power_norm_is_the_hessian_of_linear_equations(p):
    A, b = data(6, 3)
    x = torch.tensor([0.3, -0.2, 0.5], dtype=DTYPE)
    full = exact_hessian(lambda x: torch.linalg.vector_norm(A @ x - b) ** p / p)(x)
    u = A @ x - b
    assert torch.allclose(power_norm(lambda x: A @ x - b, p)(x).dense(), full, rtol=0, atol=1e-10)
    rank_one = power_norm(lambda x: A @ x - b, p, "fisher_term")(x).dense()
    assert torch.allclose(full - u.norm() ** (p - 2) * A.mT @ A, rank_one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["gauss_newton_full", "fisher_term"])
@pytest.mark.parametrize("p", [2.0, 3.0, 4.0, 5.0])
def test_power_norm_at_a_solution_of_the_equations(p, kind):
    A, _ = data(6, 3)
    H = power_norm(lambda x: A @ x, p, kind)(torch.zeros(3, dtype=DTYPE)).dense()
    assert torch.allclose(H, A.mT @ A if p == 2 and kind == "gauss_newton_full" else torch.zeros_like(H))


def test_fisher_of_the_logistic_loss_weighs_samples_by_squared_probabilities():
    X, b = data(8, 3)
    y, w = torch.sign(b), torch.tensor([0.2, -0.4, 0.1], dtype=DTYPE)
    H = fisher(lambda w: nn.functional.softplus(-y * (X @ w)))(w).dense()
    p = torch.sigmoid(-y * (X @ w))
    assert torch.allclose(H, X.mT @ torch.diag(p**2) @ X / len(X), rtol=0, atol=1e-14)


def test_weighted_gauss_newton_is_the_hessian_where_the_gradient_vanishes():
    problem, zero = LogSumExp(0.5), torch.zeros(5, dtype=DTYPE)
    assert torch.allclose(problem.gauss_newton(zero).dense(), problem.exact(zero), rtol=0, atol=1e-12)
    difference = problem.gauss_newton(ones()).dense() - problem.exact(ones())
    g = problem(ones())[1]
    assert torch.allclose(difference, torch.outer(g, g) / 0.5, rtol=0, atol=1e-12)


def test_a_failed_factorisation_is_a_rejected_trial():
    f = autograd(lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2)  # concave at the start along the first axis
    points = []
    result = gns_minimize(
        f,
        torch.tensor([0.1, 1.0], dtype=DTYPE),
        exact_hessian(lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2),
        gamma0=1e3,
        callback=lambda x, f: points.append(x),
    )
    assert result.success
    assert result.nfev - 1 < result.nsolve
    assert torch.allclose(result.x, torch.tensor([1.0, 0.0], dtype=DTYPE), atol=1e-8)


def test_trials_that_are_not_finite_are_rejected():
    def fun_and_grad(x):  # log barrier
        return x.sum() - x.log().sum(), 1 - 1 / x

    result = gns_minimize(fun_and_grad, torch.full((3,), 5.0, dtype=DTYPE), gamma0=100.0, gtol=1e-6)
    assert result.success
    assert torch.allclose(result.x, ones(3), atol=1e-6)


def test_a_search_without_success_keeps_the_point():
    def inconsistent(x):
        return x.square().sum(), -2 * x  # the gradient's sign is wrong

    result = gns_minimize(inconsistent, ones(2), max_trials=7)
    assert (result.status, result.success, result.nit, result.nsolve, result.gamma) == ("stalled", False, 0, 7, 1.0)
    assert torch.equal(result.x, ones(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_goes_on_to_fall_where_the_function_has_no_digits_left(dtype):
    problem = LogSumExp(0.5)
    eps = torch.finfo(dtype).eps
    problem.A, problem.b = problem.A.to(dtype), problem.b.to(dtype)
    result = gns_minimize(problem, ones().to(dtype), problem.exact, gtol=20 * eps, max_iter=60)
    assert result.status == "gtol"
    assert result.fun - min(values(result)) <= 20 * eps * abs(result.fun)


def test_gamma_is_bounded():
    H = torch.diag(torch.tensor([1.0, 0.0], dtype=DTYPE))  # singular
    result = gns_minimize(
        lambda x: (x[0] ** 2 / 2 + 1e-3 * x[1], torch.stack([x[0], x.new_tensor(1e-3)])),
        ones(2),
        lambda x: H,
        gamma0=1e11,
        max_iter=10,
    )
    assert result.gamma == 1e12
    assert [step.trials for step in result.history] == [1] * 10


def test_stops_where_it_is_told_to():
    problem = LogSumExp(0.3)
    at_minimum = gns_minimize(problem, torch.zeros(5, dtype=DTYPE), gtol=1e-12)
    assert (at_minimum.status, at_minimum.nit, at_minimum.nfev, at_minimum.success) == ("gtol", 0, 1, True)
    zero_gradient = gns_minimize(lambda x: (x.square().sum(), 2 * x), torch.zeros(5, dtype=DTYPE), gtol=0.0)
    assert (zero_gradient.status, zero_gradient.nit) == ("gtol", 0)
    limited = gns_minimize(problem, ones(), max_iter=3)
    assert (limited.status, limited.nit, limited.success) == ("max_iter", 3, False)
    called = gns_minimize(problem, ones(), callback=lambda x, f: f < 2.0)
    assert called.status == "callback"
    assert called.fun < 2.0 <= called.history[-1].fun
    flat = gns_minimize(problem, ones(), problem.exact, ftol=1e-3)
    decreases = [(before - after) / max(abs(before), 1) for before, after in itertools.pairwise(values(flat))]
    assert flat.status == "ftol"
    assert all(decrease > 1e-3 for decrease in decreases[:-1])
    assert decreases[-1] <= 1e-3


def quadratic(x):
    return x.square().sum(), 2 * x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma0": 0.0}, "gamma0 must be > 0, got 0.0"),
        ({"max_trials": 0}, "max_trials must be a whole number >= 1, got 0"),
        ({"gtol": -1.0}, "gtol must be >= 0, got -1.0"),
        ({"solver": "lu"}, "solver must be one of None, 'cholesky', 'woodbury', 'cg', got 'lu'"),
        ({"B": -torch.eye(2)}, "B must be positive definite"),
        ({"B": torch.eye(3)}, "B must be of shape (2, 2), got (3, 3)"),
        ({"curvature": lambda x: torch.tensor([[1.0, 1.0], [0.0, 1.0]])}, "H must be symmetric"),
        ({"curvature": lambda x: torch.eye(3)}, "H must be of shape (2, 2), got (3, 3)"),
        (
            {"curvature": lambda x: "exact"},
            "curvature must return a tensor, LowRank, LinearOperator or None, got str",
        ),
        ({"x0": torch.ones(2, 2)}, "x0 must be a vector of real floating-point numbers, got torch.float32 of (2, 2)"),
        ({"fun_and_grad": lambda x: (0.0, x[:1])}, "the gradient must be of shape (2,), got (1,)"),
    ],
)
def test_minimize_refuses(arguments, message):
    with pytest.raises(ValueError) as caught:
        gns_minimize(**{"fun_and_grad": quadratic, "x0": ones(2), **arguments})
    assert str(caught.value) == message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_minimize_refuses_a_start_that_is_not_finite(bad):
    with pytest.raises(FloatingPointError, match="must be finite at x0"):
        gns_minimize(lambda x: (bad, x), ones(2))
    with pytest.raises(FloatingPointError, match="must be finite at x0"):
        gns_minimize(lambda x: (0.0, bad * x), ones(2))


def split(x=None):
    """Two parameters that hold five numbers."""
    x = ones() if x is None else x
    return nn.Parameter(x[:2].clone()), nn.Parameter(x[2:].clone().view(3, 1))


def closure_of(problem, params):
    return lambda: problem.value(torch.cat([p.reshape(-1) for p in params]))


def joined(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("kind", list(CURVATURES))
def test_the_optimizer_takes_the_steps_of_minimize(kind, metric):
    problem = LogSumExp(0.3)
    A, _ = data()
    B = A.mT @ A if metric else None
    points = []
    result = gns_minimize(
        problem, ones(), CURVATURES[kind](problem), B=B, max_iter=6, callback=lambda x, f: points.append(x)
    )
    params = split()
    curvature = "exact" if kind == "exact" else CURVATURES[kind](problem)
    optimizer = GNSNewton([{"params": [p]} for p in params], curvature, B=B)
    for step, point in zip(result.history, points[1:], strict=True):
        assert float(optimizer.step(closure_of(problem, params))) == pytest.approx(step.fun)
        assert torch.allclose(joined(params), point, rtol=0, atol=1e-9)
        assert optimizer.gamma == 2 * step.gamma
    assert optimizer.param_groups[0]["iterations"] == 6
    assert optimizer.param_groups[0]["trials"] == result.nsolve


def test_products_alone_give_the_exact_step():
    problem = LogSumExp(0.3)
    dense, products = split(), split()
    one, other = GNSNewton(dense), GNSNewton(products, solver="cg", cg_tol=1e-13)
    for _ in range(6):
        one.step(closure_of(problem, dense))
        other.step(closure_of(problem, products))
    assert torch.allclose(joined(dense), joined(products), rtol=0, atol=1e-9)


def test_float32_parameters_follow_the_float64_ones_to_their_precision():
    problem = LogSumExp(0.3)
    double, single = split(), [nn.Parameter(p.detach().float()) for p in split()]
    one, other = GNSNewton(double), GNSNewton(single)
    for _ in range(30):
        one.step(closure_of(problem, double))
        other.step(lambda: problem.value(torch.cat([p.reshape(-1) for p in single]).double()).float())
    assert float(joined(double).norm()) < 1e-9
    assert float(joined(single).norm()) < 1e-5


def test_linear_loss_without_a_hessian():
    for solver in (None, "cg"):
        params = split()
        optimizer = GNSNewton(params, solver=solver)
        optimizer.step(lambda p=params: p[0].sum() + 2 * p[1].sum())
        assert torch.allclose(joined(params), ones() - torch.tensor([1.0, 1, 2, 2, 2], dtype=DTYPE) / 14**0.5)


def test_parameters_outside_the_loss_and_gradients_are_left_alone():
    problem = LogSumExp(0.3)
    params = split()
    frozen, unused = nn.Parameter(ones(2), requires_grad=False), nn.Parameter(ones(3))
    unused.grad = torch.full_like(unused, 7.0)
    seen = []

    def curvature(x):
        seen.append(x)
        return problem.gauss_newton(x)

    optimizer = GNSNewton([frozen, params[0], unused, params[1]], curvature, B=2 * identity(ones()))
    optimizer.step(closure_of(problem, params))
    assert torch.equal(seen[0], ones())
    assert not torch.equal(joined(params), ones())
    assert torch.equal(frozen, ones(2))
    assert torch.equal(unused, ones(3))
    assert torch.equal(unused.grad, torch.full_like(unused, 7.0))
    assert params[0].grad is None


def test_a_stalled_step_keeps_parameters_and_gamma():
    params = split()
    calls = itertools.count()
    optimizer = GNSNewton(params, curvature=None, max_trials=5)
    optimizer.step(lambda: 10 * next(calls) + sum(p.square().sum() for p in params))  # every trial is worse
    assert optimizer.stalled
    assert optimizer.gamma == 1.0
    assert torch.equal(joined(params), ones())
    assert next(calls) == 6
    optimizer.step(lambda: sum(p.square().sum() for p in params))
    assert not optimizer.stalled


def test_trial_points_that_are_not_finite_are_rejected_trials():
    p = nn.Parameter(torch.full((3,), 5.0, dtype=DTYPE))
    optimizer = GNSNewton([p], curvature=None, gamma0=1000.0)
    for _ in range(40):
        optimizer.step(lambda: p.sum() - p.log().sum())
    assert torch.allclose(p, ones(3), atol=1e-4)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(factor):
    params = split()
    optimizer = GNSNewton(params)
    optimizer.step(closure_of(LogSumExp(), params))
    before, state = joined(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        optimizer.step(lambda: factor * closure_of(LogSumExp(), params)())
    with pytest.raises(FloatingPointError, match="nothing was changed"):  # the gradient alone: d sqrt(0)
        optimizer.step(lambda: (0 * params[0]).sqrt().sum())
    assert torch.equal(joined(params), before)
    assert optimizer.state_dict() == state


def test_an_error_in_a_trial_restores_the_parameters():
    params = split()
    calls = itertools.count()

    def closure():
        if next(calls) == 2:  # the start, the Hessian, the first trial
            raise KeyError("gone")
        return closure_of(LogSumExp(), params)()

    with pytest.raises(KeyError):
        GNSNewton(params).step(closure)
    assert torch.equal(joined(params), ones())


def test_refuses_closures_without_a_scalar_or_a_graph():
    params = split()
    optimizer = GNSNewton(params)
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="as a scalar tensor"):
        optimizer.step(lambda: params[0])
    with pytest.raises(RuntimeError, match="without backward"):
        optimizer.step(lambda: params[0].detach().sum())


def test_refuses_sparse_gradients():
    embedding = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        GNSNewton(embedding.parameters(), curvature=None).step(lambda: embedding(torch.tensor([1])).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curvature": "fisher"}, "curvature must be 'exact', a function or None, got 'fisher'"),
        ({"solver": "woodbury"}, "solver must be 'cholesky' or 'cg' with curvature 'exact', got 'woodbury'"),
        ({"gamma0": -1.0}, "gamma0 must be > 0, got -1.0"),
        ({"B": -torch.eye(5)}, "B must be positive definite"),
        ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, "params must be real, got a complex tensor"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError) as caught:
        GNSNewton(**{"params": split(), **arguments})
    assert str(caught.value) == message


def test_refuses_a_metric_of_another_size_before_anything_changes():
    params = split()
    with pytest.raises(ValueError, match=r"B must be of shape \(5, 5\), got \(4, 4\)"):
        GNSNewton(params, B=torch.eye(4)).step(closure_of(LogSumExp(), params))
    assert torch.equal(joined(params), ones())


def test_groups_share_their_settings():
    a, b = split()
    with pytest.raises(ValueError, match=r"gamma0 must be the same in all groups, got 2\.0 beside 1\.0"):
        GNSNewton([{"params": [a]}, {"params": [b], "gamma0": 2.0}])
    optimizer = GNSNewton([{"params": [a], "gamma0": 2.0}, {"params": [b]}])
    assert optimizer.gamma == optimizer.param_groups[1]["gamma0"] == 2.0


def test_state_keeps_gamma_and_counters_and_not_the_function():
    problem = LogSumExp(0.3)
    params, others = split(), split()
    optimizer = GNSNewton(params, problem.gauss_newton, gamma0=8.0)
    for _ in range(3):
        optimizer.step(closure_of(problem, params))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with pytest.raises(ValueError, match="curvature must be the function that the state was saved with, got none"):
        GNSNewton(others).load_state_dict(state)
    loaded = GNSNewton(others, problem.gauss_newton)
    loaded.load_state_dict(state)
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            other.copy_(p)
    assert loaded.gamma == optimizer.gamma != 8.0
    for _ in range(3):
        optimizer.step(closure_of(problem, params))
        loaded.step(closure_of(problem, others))
    assert torch.equal(joined(params), joined(others))
    assert loaded.state_dict() == optimizer.state_dict()


def test_copies_keep_function_and_metric():
    params = split()
    optimizer = GNSNewton(params, identity, B=2 * identity(ones()))
    closure_of(LogSumExp(), params)
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        its_params, twin = duplicate((params, optimizer))
        reference = split()
        twin.step(closure_of(LogSumExp(), its_params))
        GNSNewton(reference, identity, B=2 * identity(ones())).step(closure_of(LogSumExp(), reference))
        assert torch.equal(joined(its_params), joined(reference))


def test_refuses_sharded_parameters():
    p = nn.Parameter(torch.ones(4))
    p.placements = (Shard(0),)  # what a DTensor has
    with pytest.raises(ValueError, match="GNSNewton does not take sharded parameters"):
        GNSNewton([p])
