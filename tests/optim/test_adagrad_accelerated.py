import copy
import io
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headway.optim import AdaGradAGD, adagrad_accelerated
from headway.optim.adagrad_accelerated import adagrad_bound
from headway.testing import check_optimizer

MODES = ("norm", "tensor", "diag")
VARIANTS = ("adagrad", "averaging", "rsag", "accelegrad")
TWO_SEQUENCES = VARIANTS[1:]
SHAPES = ((4, 3), (5,), ())


def parameters(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def objective(params):
    """Smooth, not convex, with interacting parameters; L <= 4."""
    values = torch.cat([p.reshape(-1) for p in params])
    return (values.square() / (1 + values.square())).sum() + 0.5 * values.mean().square()


def trajectory(optimizer, params, steps, loss=objective):
    """The parameters before each step and after the last, and the gradients, flattened: (steps + 1, n), (steps, n)."""
    points, gradients = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(params).backward()
        points.append(torch.cat([p.detach().reshape(-1) for p in params]))
        gradients.append(torch.cat([p.grad.reshape(-1) for p in params]))
        optimizer.step()
    points.append(torch.cat([p.detach().reshape(-1) for p in params]))
    return torch.stack(points), torch.stack(gradients)


def run(steps=20, loss=objective, shapes=SHAPES, **settings):
    params = parameters(shapes)
    return trajectory(AdaGradAGD(params, **settings), params, steps, loss)


def template(x, gradient, steps, gamma, alpha, lr, accelegrad=False):
    """The two sequences as written, on plain numbers; `gamma(alpha_t)` in units of eta_t."""
    x_tilde, S, points = x, 0.0, []
    for t in range(1, steps + 1):
        x_bar = alpha(t) * x + (1 - alpha(t)) * x_tilde
        points.append(x_bar)
        g = gradient(x_bar)
        weight = 1 / alpha(t) if accelegrad else 1.0
        S += (weight * g) ** 2
        eta = lr / math.sqrt(S)
        x = x - weight * eta * g
        x_tilde = x_bar - gamma(alpha(t)) * eta * g
    points.append(alpha(steps + 1) * x + (1 - alpha(steps + 1)) * x_tilde)
    return points, x, x_tilde


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_keeps_the_contract(variant, mode):
    check_optimizer(AdaGradAGD, variant=variant, mode=mode)


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"variant": "rsag", "final_point": "x_tilde", "weight_decay": 0.1},
        {"variant": "averaging", "final_point": "x", "alpha": 0.3, "weight_decay": 0.1, "decoupled": True},
        {"variant": "rsag", "mode": "diag", "alpha": lambda t: 1 / t, "eps": 1e-10, "initial_accumulator": 0.1},
    ],
)
def test_keeps_the_contract_with_options(hyperparameters):
    check_optimizer(AdaGradAGD, **hyperparameters)


@pytest.mark.parametrize(
    ("variant", "gamma"),
    [("averaging", lambda a: 0.0), ("rsag", lambda a: 1 + a), ("accelegrad", lambda a: 1.0)],
)
@pytest.mark.parametrize("alpha", [None, 0.4, lambda t: 1 / t])
def test_variants_follow_the_template(variant, gamma, alpha):
    def at(t):
        return 2 / (t + 1) if alpha is None else alpha(t) if callable(alpha) else alpha

    expected, x, x_tilde = template(1.5, lambda z: 2 * z, 12, gamma, at, lr=0.3, accelegrad=variant == "accelegrad")
    for final_point, last in (("x_bar", expected[-1]), ("x", x), ("x_tilde", x_tilde)):
        p = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        optimizer = AdaGradAGD([p], lr=0.3, variant=variant, alpha=alpha, final_point=final_point)
        points, _ = trajectory(optimizer, [p], 12, loss=lambda params: params[0].square())
        assert points[:, 0].tolist() == pytest.approx(expected, abs=1e-12)
        optimizer.eval()
        assert p.item() == pytest.approx(last, abs=1e-12)
        optimizer.train()
        assert p.item() == points[-1, 0].item()


def test_first_step_by_hand():
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer = AdaGradAGD([p], lr=0.5, variant="rsag", initial_accumulator=75.0)
    optimizer.step()
    # S = 100, eta = 0.05, alpha_1 = 1, alpha_2 = 2/3: x = p - eta g, x_tilde = p - 2 eta g.
    expected = torch.tensor([1.0, 2.0]) - (2 / 3 + 2 / 3) * 0.05 * torch.tensor([3.0, 4.0])
    assert torch.allclose(p, expected.double(), atol=1e-15)
    assert optimizer.param_groups[0]["sum_of_squares"] == 100


@pytest.mark.parametrize("mode", MODES)
def test_the_default_learning_rate_belongs_to_the_mode(mode):
    assert AdaGradAGD(parameters(), mode=mode).defaults["lr"] == {"norm": 1.0, "tensor": 1.0, "diag": 0.01}[mode]


@pytest.mark.parametrize(("weight_decay", "maximize"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("eps", [1e-10, 1e-2])
def test_diag_equals_torch_adagrad(eps, weight_decay, maximize):
    def loss(params):
        return -objective(params) if maximize else objective(params)

    ours, theirs = parameters(), parameters()
    common = {"lr": 0.05, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    optimizer = AdaGradAGD(ours, mode="diag", initial_accumulator=0.01, **common)
    reference = torch.optim.Adagrad(theirs, initial_accumulator_value=0.01, **common)
    expected, _ = trajectory(reference, theirs, 30, loss)
    points, _ = trajectory(optimizer, ours, 30, loss)
    assert torch.allclose(points, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [None, lambda t: 1 / t, lambda t: 0.5 + 0.4 * math.sin(t)])
def test_equal_steps_are_plain_adagrad_for_every_alpha(monkeypatch, mode, alpha):
    monkeypatch.setitem(adagrad_accelerated._RATIO, "rsag", lambda alpha: 1.0)
    equal, _ = run(variant="rsag", alpha=alpha, mode=mode, lr=0.3)
    plain, _ = run(variant="adagrad", mode=mode, lr=0.3)
    assert torch.allclose(equal, plain, rtol=0, atol=1e-12)


def test_averaging_with_constant_alpha_is_heavy_ball():
    alpha, lr = 0.3, 0.4
    points, gradients = run(variant="averaging", alpha=alpha, lr=lr)
    eta = lr / gradients.square().sum(1).cumsum(0).sqrt()
    x_bar, v = points[0], torch.zeros_like(points[0])
    for t in range(len(gradients)):
        v = (1 - alpha) * v + alpha * eta[t] * gradients[t]
        x_bar = x_bar - v
        assert torch.allclose(points[t + 1], x_bar, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("alpha", "weights"), [(lambda t: 1 / t, torch.ones(21)), (None, torch.arange(1.0, 22.0))], ids=["1/t", "2/(t+1)"]
)
def test_averaging_reports_a_weighted_mean_of_x(alpha, weights):
    lr = 0.4
    points, gradients = run(variant="averaging", alpha=alpha, lr=lr)
    eta = lr / gradients.square().sum(1).cumsum(0).sqrt()
    x = torch.cat([points[:1], points[0] - (eta[:, None] * gradients).cumsum(0)])
    weights = weights.double()[:, None]
    means = (weights * x).cumsum(0) / weights.cumsum(0)
    assert torch.allclose(points, means, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=8, deadline=None)
@given(exponent=st.floats(-6, 6))
def test_scaling_the_loss_changes_nothing_from_an_empty_accumulator(variant, mode, exponent):
    scale = 10**exponent
    points, _ = run(variant=variant, mode=mode, lr=0.3, steps=10)
    scaled, _ = run(variant=variant, mode=mode, lr=0.3, steps=10, loss=lambda params: scale * objective(params))
    assert torch.allclose(points, scaled, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_diag_ignores_the_scale_of_each_coordinate(variant):
    scales = torch.tensor([1e-4, 1.0, 30.0], dtype=torch.float64)

    def steps(scales):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = AdaGradAGD([p], variant=variant, mode="diag")
        generator = torch.Generator().manual_seed(1)
        for _ in range(10):
            p.grad = scales * torch.randn(3, generator=generator, dtype=torch.float64)
            optimizer.step()
        return p.detach()

    assert torch.allclose(steps(scales), steps(torch.ones(3, dtype=torch.float64)), rtol=0, atol=1e-12)


def test_the_accumulator_never_falls_and_matches_the_gradients():
    params = parameters()
    optimizer = AdaGradAGD(params, initial_accumulator=0.5)
    last = 0.5
    for _ in range(10):
        _, gradients = trajectory(optimizer, params, 1)
        now = optimizer.param_groups[0]["sum_of_squares"].item()
        assert now == pytest.approx(last + gradients.square().sum().item(), rel=1e-12)
        assert now >= last
        last = now


@pytest.mark.parametrize("variant", VARIANTS)
def test_modes_agree_on_one_number(variant):
    runs = [run(variant=variant, mode=mode, lr=0.3, shapes=[(1,)])[0] for mode in MODES]
    assert torch.allclose(runs[0], runs[1], rtol=0, atol=1e-14)
    assert torch.allclose(runs[0], runs[2], rtol=0, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_norm_equals_tensor_for_one_parameter(variant):
    norm, tensor = (run(variant=variant, mode=mode, lr=0.3, shapes=[(7,)])[0] for mode in ("norm", "tensor"))
    assert torch.allclose(norm, tensor, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("mode", "same"), [("norm", True), ("tensor", False), ("diag", True)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_splitting_a_tensor_matters_in_tensor_mode_only(variant, mode, same):
    def steps(sizes, groups):
        p = torch.linspace(0.5, 2, 6, dtype=torch.float64)
        parts = [nn.Parameter(part.clone()) for part in p.split(sizes)]
        optimizer = AdaGradAGD([{"params": [part]} for part in parts] if groups else parts, 0.3, variant, mode)
        return trajectory(optimizer, parts, 15)[0]

    whole = steps([6], groups=False)
    assert torch.allclose(whole, steps([2, 4], groups=False), rtol=0, atol=1e-12) is same
    assert torch.allclose(whole, steps([2, 4], groups=True), rtol=0, atol=1e-12) is same


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(0.05, 20),
    b0=st.floats(1e-3, 3),
    start=st.lists(st.floats(-3, 3), min_size=1, max_size=6).filter(lambda values: any(abs(v) > 1e-3 for v in values)),
)
def test_sum_identities_and_the_explicit_bound(lr, b0, start):
    # f = sum x^2 / (1 + x^2): L = 2, f* = 0.
    p = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def f(params):
        return (params[0].square() / (1 + params[0].square())).sum()

    delta0 = f([p]).item()
    _, gradients = trajectory(AdaGradAGD([p], lr=lr, initial_accumulator=b0**2), [p], 60, f)
    squares = gradients.square().sum(1)
    S = b0**2 + squares.cumsum(0)
    assert (squares / S.sqrt()).sum() <= 2 * S[-1].sqrt() + 1e-12
    assert (squares / S).sum() <= (S[-1] / b0**2).log() + 1e-12
    assert squares.mean().item() <= adagrad_bound(2.0, delta0, lr, b0, 60) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"L": 0.0}, "L must be > 0, got 0.0"),
        ({"delta0": -1.0}, "delta0 must be >= 0, got -1.0"),
        ({"b0": 0.0}, "b0 must be > 0, got 0.0"),
        ({"T": 0}, "T must be a whole number >= 1, got 0"),
    ],
)
def test_the_bound_refuses_what_it_does_not_hold_for(arguments, message):
    with pytest.raises(ValueError) as caught:
        adagrad_bound(**{"L": 1.0, "delta0": 1.0, "lr": 1.0, "b0": 1.0, "T": 1, **arguments})
    assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_gradient_is_a_zero_step(variant, mode, dtype):
    params = parameters(dtype=dtype)
    before = [p.detach().clone() for p in params]
    optimizer = AdaGradAGD(params, variant=variant, mode=mode)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(a, p) for a, p in zip(before, params, strict=True))


def test_diag_stays_bounded_where_squares_underflow():
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1e-30, 1e-22, 1.0])
    AdaGradAGD([p], lr=1.0, mode="diag").step()
    assert (p.abs() <= 1).all()


def test_a_gradient_that_is_not_finite_is_refused_by_name_and_changes_nothing():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([float("nan"), 1.0])
    optimizer = AdaGradAGD([p])
    with pytest.raises(FloatingPointError, match="parameter 0 of group 0"):
        optimizer.step()
    assert p.tolist() == [0.0, 0.0]
    assert "sum_of_squares" not in optimizer.param_groups[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_accumulator_of_bfloat16_parameters_keeps_growing(mode):
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdaGradAGD([p], mode=mode)
    for _ in range(600):  # in bfloat16 a sum of ones stops at 256
        p.grad = torch.ones_like(p)
        optimizer.step()
    S = optimizer.param_groups[0]["sum_of_squares"] if mode == "norm" else optimizer.state[p]["sum_of_squares"]
    assert S.dtype == (torch.float32 if mode == "diag" else torch.float64)
    assert bool((S - 600 * (1 if mode == "diag" else 4) == 0).all())


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_state_keeps_its_precision(mode):
    def start():
        params = parameters(dtype=torch.bfloat16)
        return params, AdaGradAGD(params, variant="rsag", mode=mode)

    params, optimizer = start()
    for _ in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.7)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, loaded = start()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for p, other in zip(params, others, strict=True):
        for name, value in optimizer.state[p].items():
            if name != "step":
                assert loaded.state[other][name].dtype == value.dtype
                assert torch.equal(loaded.state[other][name], value)
    if mode == "norm":
        assert loaded.param_groups[0]["sum_of_squares"].dtype == torch.float64


def test_a_loaded_state_is_a_copy():
    params, others = parameters(), parameters()
    optimizer, loaded = AdaGradAGD(params, variant="rsag"), AdaGradAGD(others, variant="rsag")
    trajectory(optimizer, params, 2)
    loaded.load_state_dict(optimizer.state_dict())
    before = optimizer.state[params[0]]["x"].clone()
    trajectory(loaded, others, 2)
    assert torch.equal(before, optimizer.state[params[0]]["x"])


def test_a_callable_alpha_stays_out_of_the_state():
    def alpha(t):
        return 1 / t

    params, others = parameters(), parameters()
    optimizer = AdaGradAGD(params, variant="averaging", alpha=alpha)
    trajectory(optimizer, params, 3)
    state = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.load(file, weights_only=True)

    with pytest.raises(ValueError, match="alpha must be the function that the state was saved with, got None"):
        AdaGradAGD(others, variant="averaging").load_state_dict(state)
    loaded = AdaGradAGD(others, variant="averaging", alpha=alpha)
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["alpha"] is alpha
    assert optimizer.param_groups[0]["alpha"] is alpha


def test_the_state_holds_the_settings():
    params, others = parameters(), parameters()
    optimizer = AdaGradAGD(params, lr=0.3, variant="averaging", mode="diag", alpha=0.25)
    trajectory(optimizer, params, 3)
    loaded = AdaGradAGD(others)
    loaded.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            other.copy_(p)
    assert torch.equal(trajectory(optimizer, params, 3)[0], trajectory(loaded, others, 3)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_extra_memory_is_what_the_table_says(variant, mode):
    params = parameters()
    optimizer = AdaGradAGD(params, variant=variant, mode=mode)
    trajectory(optimizer, params, 3)
    buffers = sum(
        sum(t.numel() for t in optimizer.state[p].values() if isinstance(t, torch.Tensor) and t.shape == p.shape)
        for p in params[:2]
    )
    elements = sum(p.numel() for p in params[:2])
    assert buffers == elements * ((variant != "adagrad") + (mode == "diag"))


class NoReadBack(TorchDispatchMode):
    """Refuses to turn a tensor into a number, which would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_waits_for_the_device(variant, mode):
    params = parameters(dtype=torch.bfloat16)
    optimizer = AdaGradAGD(params, variant=variant, mode=mode, weight_decay=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        with NoReadBack():
            optimizer.step()
    with NoReadBack(), pytest.raises(AssertionError):
        params[0].sum().item()


def test_alpha_of_the_next_step_mixes_the_next_point():
    seen = []

    def alpha(t):
        seen.append(t)
        return 0.5

    params = parameters([(2,)])
    trajectory(AdaGradAGD(params, variant="rsag", alpha=alpha), params, 2)
    assert seen == [1, 2, 2, 3]


def test_a_parameter_counts_its_own_steps():
    early, late = parameters([(2,), (2,)])
    optimizer = AdaGradAGD([early, late], variant="rsag", mode="diag")
    for _ in range(3):
        early.grad = torch.ones_like(early)
        optimizer.step()
    late.grad = torch.ones_like(late)
    alone = nn.Parameter(late.detach().clone())
    alone.grad = torch.ones_like(alone)
    optimizer.step()
    AdaGradAGD([alone], variant="rsag", mode="diag").step()
    assert torch.equal(late, alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoupled_decay_stays_out_of_the_accumulator(variant):
    points, gradients = run(variant=variant, lr=0.1, weight_decay=0.3, decoupled=True, steps=1)
    direction = gradients[0] / gradients[0].norm() + 0.3 * points[0]
    alpha = 1.0 if variant == "adagrad" else 2 / 3
    gamma = {"adagrad": 1.0, "averaging": 0.0, "rsag": 2.0, "accelegrad": 1.0}[variant]
    expected = points[0] - 0.1 * (alpha + (1 - alpha) * gamma) * direction
    assert torch.allclose(points[1], expected, rtol=0, atol=1e-14)


def test_groups_of_different_modes_keep_their_sums_apart():
    def steps(groups):
        params = [p for group in groups for p in group["params"]]
        optimizer = AdaGradAGD(groups, lr=0.1)
        for k in range(4):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + k)
            optimizer.step()
        return params

    a, b = parameters([(2,), (3,)])
    mixed = steps([{"params": [a], "mode": "diag"}, {"params": [b], "mode": "norm"}])
    c, d = parameters([(2,), (3,)])
    steps([{"params": [c], "mode": "diag"}])
    steps([{"params": [d], "mode": "norm"}])
    assert torch.equal(mixed[0], c)
    assert torch.allclose(mixed[1], d, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "lr must be > 0, got -0.1"),
        ({"alpha": 1.5, "variant": "rsag"}, "alpha must be in (0, 1] or None, got 1.5"),
        (
            {"variant": "nesterov"},
            "variant must be one of 'adagrad', 'averaging', 'rsag', 'accelegrad', got 'nesterov'",
        ),
        ({"alpha": 0.5}, "alpha must be None with variant 'adagrad', which does not use it, got 0.5"),
        ({"final_point": "last"}, "final_point must be one of 'x_bar', 'x', 'x_tilde', got 'last'"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError) as caught:
        AdaGradAGD(parameters(), **arguments)
    assert str(caught.value) == message


def test_refuses_an_alpha_function_that_leaves_its_range_before_anything_changes():
    params = parameters()
    optimizer = AdaGradAGD(params, variant="rsag", alpha=lambda t: 1 / t if t < 3 else 0.0)
    trajectory(optimizer, params, 1)
    before, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"alpha\(3\) must be in \(0, 1\], got 0.0"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert state["param_groups"][0]["sum_of_squares"] == optimizer.param_groups[0]["sum_of_squares"]


def test_x_tilde_without_weight_is_reported_as_x_bar():
    params = parameters()
    optimizer = AdaGradAGD(params, variant="rsag", alpha=1.0, final_point="x_tilde")
    points, _ = trajectory(optimizer, params, 2)
    optimizer.eval()
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in params]), points[-1])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 4, generator=generator).double(), torch.randn(8, 1, generator=generator).double()


def train(network, inputs, targets, mode):
    optimizer = AdaGradAGD(network.parameters(), lr=0.3, variant="rsag", mode=mode)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(inputs), targets).backward()
        optimizer.step()
    return [p.detach().clone() for p in network.parameters()]


def rank_main(rank, folder):
    inputs, targets = batch()
    half = slice(4 * rank, 4 * rank + 4)
    results = {}
    for mode in MODES:
        network = nn.parallel.DistributedDataParallel(model())
        results["replicas", mode] = train(network, inputs[half], targets[half], mode)
    mesh = init_device_mesh("cpu", (2,))
    for mode in MODES:
        results["shards", mode] = train_shards(mesh, mode)
    try:
        AdaGradAGD([nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))])
    except ValueError as error:
        results["refusal"] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")


def train_shards(mesh, mode):
    """Every parameter is cut in two along its first dimension; gradients are those of the whole objective."""
    whole = parameters([(4, 3), (5,)])
    shards = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    group = None if mode == "diag" else dist.group.WORLD
    optimizer = AdaGradAGD(shards, lr=0.3, variant="rsag", mode=mode, final_point="x", process_group=group)
    for _ in range(6):
        whole = [nn.Parameter(p.full_tensor().detach()) for p in shards]
        objective(whole).backward()
        for p, full in zip(shards, whole, strict=True):
            p.grad = distribute_tensor(full.grad, mesh, [Shard(0)])
        optimizer.step()
    training = [p.full_tensor().detach() for p in shards]
    optimizer.eval()
    return training + [p.full_tensor().detach() for p in shards]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(rank_main, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_two_replicas_equal_one_process_on_the_union_batch(ranks, mode):
    expected = train(model(), *batch(), mode)
    for results in ranks:
        for p, q in zip(results["replicas", mode], expected, strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_two_shards_with_a_process_group_equal_the_whole(ranks, mode):
    params = parameters([(4, 3), (5,)])
    optimizer = AdaGradAGD(params, lr=0.3, variant="rsag", mode=mode, final_point="x")
    trajectory(optimizer, params, 6)
    expected = [p.detach().clone() for p in params]
    optimizer.eval()
    expected += [p.detach() for p in params]
    for results in ranks:
        for p, q in zip(results["shards", mode], expected, strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_shards_without_a_process_group_are_refused(ranks):
    assert all("process_group must be given for sharded parameters" in results["refusal"] for results in ranks)


def test_a_process_group_has_no_place_in_diag():
    with pytest.raises(ValueError, match="process_group must be None with mode 'diag'"):
        AdaGradAGD(parameters(), mode="diag", process_group=object())
