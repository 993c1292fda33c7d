import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from headway.optim.target_surrogate import TargetSurrogate, autograd_target_grad
from headway.testing import check_optimizer

DTYPE = torch.float64


def gradient_steps(params, lr=0.5):
    return SGD(params, lr=lr)


class ExactLeastSquares(SGD):
    """The exact minimiser of the surrogate of a linear model X: theta - pinv(X) g for its gradient X^T g / n."""

    def __init__(self, params, X):
        super().__init__(params, lr=1.0)
        self.inverse = len(X) * torch.linalg.pinv(X.mT @ X)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= self.inverse @ p.grad


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 0.3, "schedule": "sqrt", "inner_steps": 2},
        {"inner": gradient_steps},
    ],
    ids=lambda settings: ",".join(settings) or "defaults",
)
def test_keeps_the_contract(settings):
    check_optimizer(TargetSurrogate, **settings)


def problem(n=12, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=DTYPE)
    y = torch.randn(n, generator=generator, dtype=DTYPE)
    return X, y, nn.Parameter(torch.randn(d, generator=generator, dtype=DTYPE))


def logistic(y):
    labels = torch.sign(y)

    def value(z):
        return torch.nn.functional.softplus(-labels * z).sum()

    return value


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def test_one_gradient_step_is_sgd_with_the_step_over_lr():
    X, y, theta = problem()
    before, a, eta = theta.detach().clone(), 0.03, 0.7
    loss = logistic(y)
    # S is the mean over n outputs of the sum-form surrogate times eta
    optimizer = TargetSurrogate([theta], lr=eta, inner_steps=1, inner=functools.partial(SGD, lr=a * len(X) / eta))
    optimizer.step(lambda: X @ theta, autograd_target_grad(lambda z, _: loss(z), None))
    p = before.clone().requires_grad_()
    expected = before - a * torch.autograd.grad(loss(X @ p), p)[0]
    assert torch.allclose(theta, expected, rtol=0, atol=1e-14)


def test_squared_loss_of_a_linear_model_is_solved_in_one_step():
    X, y, theta = problem()
    optimizer = TargetSurrogate([theta], lr=1.0, inner_steps=1, inner=functools.partial(ExactLeastSquares, X=X))
    optimizer.step(lambda: X @ theta, lambda z: z - y)
    assert torch.allclose(theta, torch.linalg.lstsq(X, y.unsqueeze(1)).solution[:, 0], rtol=0, atol=1e-12)


def test_exact_inner_solve_is_a_projected_step_in_target_space():
    X, y, theta = problem()
    gradient = autograd_target_grad(lambda z, _: logistic(y)(z), None)
    z = X @ theta.detach()
    optimizer = TargetSurrogate([theta], lr=1.7, inner_steps=1, inner=functools.partial(ExactLeastSquares, X=X))
    optimizer.step(lambda: X @ theta, gradient)
    P = X @ torch.linalg.pinv(X)
    assert torch.allclose(X @ theta, z - 1.7 * P @ gradient(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("L", "value"),
    [
        (1.0, lambda z, y: (z - y).square().sum() / 2),
        (2.0, lambda z, y: (z - y).square().sum()),
        (0.25, lambda z, y: logistic(y)(z)),
    ],
)
def test_the_surrogate_bounds_the_loss_from_above_and_touches_it(L, value):
    X, y, theta = problem()
    z = X @ theta.detach()
    g = autograd_target_grad(value, y)(z)

    def bound(other):
        return value(z, y) + (g * (other - z)).sum() + L / 2 * (other - z).square().sum()

    assert float(bound(z)) == pytest.approx(float(value(z, y)))
    for seed in range(50):
        other = X @ problem(seed=seed + 1)[2].detach() * (seed + 1) ** 0.5
        assert float(bound(other)) >= float(value(other, y)) - 1e-9


@pytest.mark.parametrize("inner_steps", [1, 5, 40])
@pytest.mark.parametrize("inner", ["linesearch", gradient_steps])
@pytest.mark.parametrize("linear", [True, False])
def test_the_full_batch_loss_never_increases_up_to_one_over_l(inner_steps, inner, linear):
    X, y, theta = problem()
    model = (lambda: X @ theta) if linear else None
    params = [theta]
    if not linear:
        net = network()
        model, params = lambda: net(X)[:, 0], list(net.parameters())
    loss, inner = logistic(y), inner if inner == "linesearch" else functools.partial(SGD, lr=0.1)
    optimizer = TargetSurrogate(params, lr=4.0, inner_steps=inner_steps, inner=inner)
    losses = [loss(model()).item()]
    for _ in range(10):
        report = optimizer.step(model, autograd_target_grad(lambda z, _: loss(z), None))
        losses.append(loss(model()).item())
        assert report["surrogate"] <= 0
        assert not report["surrogate_increased"]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("inner", ["linesearch", gradient_steps])
@pytest.mark.parametrize("inner_steps", [1, 4])
def test_the_oracle_is_called_once_per_step_and_forward_once_more_than_evaluations(inner, inner_steps):
    X, y, theta = problem()
    calls = {"forward": 0, "oracle": 0}

    def forward():
        calls["forward"] += 1
        return X @ theta

    def oracle(z):
        calls["oracle"] += 1
        assert not z.requires_grad
        return z - y

    optimizer = TargetSurrogate([theta], lr=0.5, inner=inner, inner_steps=inner_steps)
    for step in range(1, 4):
        before = calls["forward"]
        report = optimizer.step(forward, oracle)
        assert calls["oracle"] == step
        assert calls["forward"] - before == report["forward_calls"]
        assert report["oracle_calls"] == 1
        assert report["inner_steps"] == inner_steps
        if inner != "linesearch":
            assert report["forward_calls"] == 1 + inner_steps


def test_a_mean_loss_with_a_larger_step_size_is_the_sum_loss():
    X, y, theta = problem()
    other = nn.Parameter(theta.detach().clone())
    total, mean = TargetSurrogate([theta], lr=0.5), TargetSurrogate([other], lr=0.5 * len(X))
    for _ in range(5):
        total.step(lambda: X @ theta, lambda z: z - y)
        mean.step(lambda: X @ other, lambda z: (z - y) / len(X))
    assert torch.allclose(theta, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("inner", ["linesearch", functools.partial(SGD, lr=0.1, weight_decay=0.1)])
def test_a_zero_target_gradient_moves_nothing(inner):
    X, _, theta = problem()
    before = theta.detach().clone()
    report = TargetSurrogate([theta], inner=inner).step(lambda: X @ theta, torch.zeros_like)
    assert torch.equal(theta, before)
    assert report["inner_steps"] == 0
    assert report["surrogate"] == 0


# WilderLavington/Target-Based-Surrogates-For-Stochastic-Optimization at 205dde6, SGD_FMDOpt and SLS_FMDOpt with m = 3,
# stepsize 2 (its eta = 1/2), c = 0.1, beta 0.9, expansion 2, in float64 except for scheduled step sizes (float32):
# the parameters after steps 1 and 4.
GOLDEN = {
    "constant": (
        [0.2285353397619942, -0.08617568540108503, 0.8441891941643695],
        [-0.1504808447759653, 1.2013018090098952, 1.7849761477341135],
    ),
    "sqrt": (
        [0.2285353397619942, -0.08617568540108503, 0.8441891941643695],
        [-0.057705274523455655, 0.7180288094784997, 1.4189213990238831],
    ),
    "exp": (
        [0.2843679601192602, -0.17128766952214847, 0.7219812438953257],
        [0.0635292030601018, 0.5976531516378834, 1.3604058483000057],
    ),
}


def golden_problem():
    i, j = torch.arange(8, dtype=DTYPE).unsqueeze(1), torch.arange(3, dtype=DTYPE).unsqueeze(0)
    X, y = torch.sin(1 + 3 * i + 7 * j + 0.5 * i * j), (torch.cos(2 * i) > 0).to(DTYPE)
    return X, y, nn.Parameter(torch.tensor([0.5, -0.5, 0.25], dtype=DTYPE))


@pytest.mark.parametrize("schedule", list(GOLDEN))
def test_trajectory_of_the_official_code(schedule):
    X, y, theta = golden_problem()
    loss = nn.BCEWithLogitsLoss(reduction="sum")
    optimizer = TargetSurrogate([theta], lr=1.0, inner_steps=3, schedule=schedule, total_steps=10, init_step=20.0)
    points = []
    for _ in range(4):
        optimizer.step(lambda: (X @ theta).unsqueeze(1), autograd_target_grad(loss, y))
        points.append(theta.detach().clone())
    for point, expected in zip((points[0], points[3]), GOLDEN[schedule], strict=True):
        assert torch.allclose(
            point, torch.tensor(expected, dtype=DTYPE), rtol=0, atol=1e-10 if schedule == "constant" else 1e-6
        )


def test_one_inner_step_of_the_official_code():
    X, y, theta = golden_problem()
    optimizer = TargetSurrogate([theta], lr=4.0, inner_steps=1, init_step=20.0)
    for _ in range(4):
        optimizer.step(lambda: (X @ theta).unsqueeze(1), autograd_target_grad(nn.BCEWithLogitsLoss(reduction="sum"), y))
    expected = torch.tensor([0.1699807503853873, 3.4038144970244533, 3.930483892302716], dtype=DTYPE)
    assert torch.allclose(theta, expected, rtol=0, atol=1e-10)


def test_searched_step_size_keeps_the_armijo_condition_and_grows_from_the_last():
    X, y, theta = problem()
    loss = logistic(y)
    optimizer = TargetSurrogate([theta], lr=1.0, line_search="sls")
    previous = 1.0
    for _ in range(6):
        z = (X @ theta).detach()
        gradient = autograd_target_grad(lambda z, _: loss(z), None)
        eta = optimizer.step(lambda: X @ theta, gradient, loss)["eta"]
        g = gradient(z)
        assert float(loss(z - eta * g)) <= float(loss(z) - 0.5 * eta * g.square().sum())
        assert eta <= 1.8 * previous * (1 + 1e-12)
        if eta < 1.8 * previous * (1 - 1e-12):
            larger = eta / 0.9
            assert float(loss(z - larger * g)) > float(loss(z) - 0.5 * larger * g.square().sum())
        previous = eta
    assert previous > 4


def test_searched_step_size_stays_in_its_range():
    X, _, theta = problem()
    optimizer = TargetSurrogate([theta], lr=9e3, line_search="sls")
    report = optimizer.step(lambda: X @ theta, lambda z: torch.full_like(z, 1e-9), lambda z: 1e9 * z.sum())
    assert report["eta"] == 1e4
    optimizer = TargetSurrogate([theta], lr=1e-4, line_search="sls")
    report = optimizer.step(lambda: X @ theta, torch.ones_like, lambda z: -z.sum())
    assert report["eta"] == 1e-4
    with pytest.raises(FloatingPointError, match="the loss is not finite, nan"):
        optimizer.step(lambda: X @ theta, torch.ones_like, lambda z: float("nan"))


@pytest.mark.parametrize(("schedule", "expected"), [("constant", 1.0), ("sqrt", 1 / 3), ("exp", 20 ** (-9 / 20))])
def test_schedules_count_outer_steps(schedule, expected):
    X, y, theta = problem()
    optimizer = TargetSurrogate([theta], lr=0.5, schedule=schedule, total_steps=20)
    etas = [optimizer.step(lambda: X @ theta, lambda z: z - y)["eta"] for _ in range(9)]
    assert etas[8] == pytest.approx(0.5 * expected)


def test_a_scheduler_sets_the_target_step_size():
    X, y, theta = problem()
    optimizer = TargetSurrogate([theta], lr=0.5)
    schedule = LambdaLR(optimizer, lambda t: 1 - t / 2)
    etas = []
    for _ in range(3):
        etas.append(optimizer.step(lambda: X @ theta, lambda z: z - y)["eta"])
        schedule.step()
    assert etas == [0.5, 0.25, 0.0]


def test_state_keeps_the_outer_counter():
    X, y, theta = problem()
    other = nn.Parameter(theta.detach().clone())
    optimizer = TargetSurrogate([theta], lr=0.5, schedule="sqrt", line_search="sls")
    value = lambda z: (z - y).square().sum() / 2  # noqa: E731
    for _ in range(3):
        optimizer.step(lambda: X @ theta, lambda z: z - y, value)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = TargetSurrogate([other])
    loaded.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        other.copy_(theta)
    for _ in range(3):
        first = optimizer.step(lambda: X @ theta, lambda z: z - y, value)
        second = loaded.step(lambda: X @ other, lambda z: z - y, value)
        assert first == second
    assert loaded.param_groups[0]["outer_steps"] == 6
    assert torch.equal(theta, other)


def test_a_callable_inner_stays_out_of_the_state():
    _, _, theta = problem()
    state = TargetSurrogate([theta], inner=gradient_steps).state_dict()
    with pytest.raises(ValueError, match="inner must be the function that the state was saved with, got none"):
        TargetSurrogate([theta]).load_state_dict(state)
    TargetSurrogate([theta], inner=gradient_steps).load_state_dict(state)


def test_copies_keep_a_callable_inner():
    X, y, theta = problem()
    optimizer = TargetSurrogate([theta], lr=0.5, inner=gradient_steps)
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        parameter, twin = duplicate((theta, optimizer))
        twin.step(lambda p=parameter: X @ p, lambda z: z - y)
        assert not torch.equal(parameter, theta)


def test_the_kl_surrogate_is_smallest_at_the_mirror_step():
    logits = nn.Parameter(torch.tensor([0.3, -1.0, 0.0], dtype=DTYPE))
    g, eta = torch.tensor([0.4, -0.2, 1.0], dtype=DTYPE), 0.5
    expected = torch.sigmoid(logits.detach()) * torch.exp(-eta * g)
    optimizer = TargetSurrogate([logits], lr=eta, geometry="kl", inner_steps=500, grad_tol=1e-10)
    report = optimizer.step(lambda: torch.sigmoid(logits), lambda z: g)
    assert torch.allclose(torch.sigmoid(logits), expected, rtol=0, atol=1e-8)
    assert report["surrogate"] < 0


def test_probabilities_that_sum_to_one_follow_the_multiplicative_update():
    logits = nn.Parameter(torch.tensor([[0.3, -1.0, 0.0]], dtype=DTYPE))
    g = torch.tensor([[0.4, -0.2, 1.0]], dtype=DTYPE)
    expected = torch.softmax(logits.detach() - 0.5 * g, dim=1)
    optimizer = TargetSurrogate([logits], lr=0.5, geometry="kl", inner_steps=500, grad_tol=1e-10)
    optimizer.step(lambda: torch.softmax(logits, dim=1), lambda z: g)
    assert torch.allclose(torch.softmax(logits, dim=1), expected, rtol=0, atol=1e-8)


def test_only_trainable_parameters_that_take_part_move_and_gradients_stay():
    net, unused = network(), nn.Parameter(torch.ones(2, dtype=DTYPE))
    X, y, _ = problem()
    net[0].weight.requires_grad_(False)
    net[2].bias.grad = torch.ones_like(net[2].bias)
    before = copy.deepcopy(net.state_dict())
    for inner in ("linesearch", functools.partial(SGD, lr=0.1, weight_decay=0.1)):
        TargetSurrogate([*net.parameters(), unused], lr=0.5, inner=inner).step(lambda: net(X)[:, 0], lambda z: z - y)
        assert torch.equal(net[0].weight, before["0.weight"])
        assert torch.equal(unused, torch.ones(2, dtype=DTYPE))
        assert not torch.equal(net[0].bias, before["0.bias"])
        assert net[0].bias.grad is None
        assert torch.equal(net[2].bias.grad, torch.ones_like(net[2].bias))


def test_a_failed_search_leaves_the_parameters():
    theta = nn.Parameter(torch.ones(3, dtype=DTYPE))
    calls = []

    def forward():  # after the first call the outputs are elsewhere, at any step
        calls.append(0)
        return theta + (0 if len(calls) == 1 else 100)

    report = TargetSurrogate([theta]).step(forward, torch.ones_like)
    assert torch.equal(theta, torch.ones(3, dtype=DTYPE))
    assert report["inner_steps"] == 0
    assert report["forward_calls"] == 101


def test_reports_an_inner_step_that_increases_the_surrogate():
    X, y, theta = problem()
    optimizer = TargetSurrogate([theta], lr=0.5, inner_steps=3, inner=functools.partial(SGD, lr=100.0))
    assert optimizer.step(lambda: X @ theta, lambda z: z - y)["surrogate_increased"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_target_gradient_that_is_not_finite_changes_nothing(bad):
    X, y, theta = problem()
    optimizer = TargetSurrogate([theta])
    before, state = theta.detach().clone(), copy.deepcopy(optimizer.state_dict())

    def gradient(z):
        g = z - y
        g[3] = bad
        return g

    with pytest.raises(FloatingPointError, match="target gradient is not finite"):
        optimizer.step(lambda: X @ theta, gradient)
    assert torch.equal(theta, before)
    assert optimizer.state_dict() == state
    with pytest.raises(FloatingPointError, match="outputs are not finite"):
        optimizer.step(lambda: X @ theta * bad, lambda z: z - y)


def test_a_surrogate_that_diverges_changes_nothing():
    X, y, theta = problem()
    before = theta.detach().clone()
    optimizer = TargetSurrogate([theta], inner_steps=100, inner=functools.partial(SGD, lr=1e200))
    with pytest.raises(FloatingPointError, match="surrogate is not finite"):
        optimizer.step(lambda: X @ theta, lambda z: z - y)
    assert torch.equal(theta, before)
    assert "outer_steps" not in optimizer.param_groups[0]


def test_sixteen_bit_parameters_follow_the_float32_ones():
    X, y, theta = problem()
    single, half = (nn.Parameter(theta.detach().to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    for p in (single, half):
        optimizer = TargetSurrogate([p], lr=1.0, inner_steps=20)
        for _ in range(5):
            optimizer.step(lambda p=p: X.to(p.dtype) @ p, lambda z: z - y.to(z.dtype))
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), single, rtol=0, atol=0.05)


def test_outputs_of_one_step_need_a_path_to_the_parameters():
    X, y, theta = problem()
    with pytest.raises(RuntimeError, match="tensor without graph"):
        TargetSurrogate([theta]).step(lambda: X @ theta.detach(), lambda z: z - y)


def test_refuses_a_target_gradient_of_another_shape():
    X, y, theta = problem()
    with pytest.raises(ValueError, match=r"target_grad must return a tensor of shape \(12,\), got \(12, 1\)"):
        TargetSurrogate([theta]).step(lambda: X @ theta, lambda z: (z - y).unsqueeze(1))


def test_kl_refuses_outputs_outside_the_open_interval_and_restores_the_parameters():
    theta = nn.Parameter(torch.tensor([0.5, 0.9], dtype=DTYPE))
    with pytest.raises(ValueError, match=r"outputs must be in \(0, 1\) with geometry 'kl'"):
        TargetSurrogate([theta], geometry="kl").step(lambda: theta + 0.1, lambda z: z)
    before = theta.detach().clone()
    with pytest.raises(ValueError, match=r"outputs must be in \(0, 1\) with geometry 'kl'"):
        TargetSurrogate([theta], geometry="kl", inner=functools.partial(SGD, lr=100.0)).step(
            lambda: theta + 0.0, torch.ones_like
        )
    assert torch.equal(theta, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"inner_steps": 0}, "inner_steps must be a whole number >= 1, got 0"),
        ({"inner": "adam"}, "inner must be 'linesearch' or a function, got 'adam'"),
        ({"schedule": "exp"}, "total_steps must be given with schedule 'exp', got None"),
        ({"geometry": "l1"}, "geometry must be one of 'euclidean', 'kl', got 'l1'"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError) as caught:
        TargetSurrogate([nn.Parameter(torch.ones(2))], **arguments)
    assert str(caught.value) == message


def test_line_search_needs_the_loss():
    X, y, theta = problem()
    with pytest.raises(ValueError, match="loss_value must be given with line_search 'sls', got None"):
        TargetSurrogate([theta], line_search="sls").step(lambda: X @ theta, lambda z: z - y)


def test_groups_share_their_settings():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match=r"lr must be the same in all groups, got 2\.0 beside 1\.0"):
        TargetSurrogate([{"params": [a]}, {"params": [b], "lr": 2.0}])
    optimizer = TargetSurrogate([{"params": [a], "lr": 2.0}, {"params": [b]}])
    assert optimizer.param_groups[1]["lr"] == 2.0
    optimizer.param_groups[1]["lr"] = 3.0
    with pytest.raises(ValueError, match=r"lr must be the same in all groups, got \[2.0, 3.0\]"):
        optimizer.step(lambda: torch.cat([a, b]), lambda z: z)


def test_refuses_sharded_and_complex_parameters():
    p = nn.Parameter(torch.ones(4))
    p.placements = (Shard(0),)  # what a DTensor has
    with pytest.raises(ValueError, match="TargetSurrogate does not take sharded parameters"):
        TargetSurrogate([p])
    with pytest.raises(ValueError, match="params must be real, got a complex tensor"):
        TargetSurrogate([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
