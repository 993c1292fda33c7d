import io
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.ranks import RANKS, run_ranks
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from headway.numerics.curvature import hessian
from headway.numerics.lanczos import Spectrum
from headway.schedules.batch_size_scaling import (
    SpectralLRController,
    batch_hessian_edge,
    calibrate_noise,
    estimate_noise,
    hessian_matvec,
    max_learning_rate,
    polyak_pair,
    scale_learning_rate,
)
from headway.testing.controllers import check_controller

positive = st.floats(1e-3, 1e3)


# The contract.


def make(run, **arguments):
    batches = [run.batch(step) for step in (100, 101)]
    own = {"interval": 10, "bounds": BOUNDS, "lanczos_steps": 5, "ema": 0.5, "probe_batches": 2, "safety": 0.05}
    return SpectralLRController(run.optimizer, run.loss, **{"batches": batches, "model": run.model, **own, **arguments})


def drive(controller, run):
    run.backward()
    run.optimizer.step()
    controller.step()


BOUNDS = (1e-4, 0.5)


def test_the_controller_keeps_the_contract_of_its_role():
    check_controller(make, drive, bounds=BOUNDS, changes=("lr", "momentum"), stops=(0, 1, 15))


# The law.


@given(lam1=positive, c=positive, B=st.integers(1, 1000))
def test_the_edge_at_b_equal_n_is_the_eigenvalue_itself(lam1, c, B):
    assert batch_hessian_edge(lam1, c, B, N=B) == lam1


@given(lam1=positive, c=positive)
def test_the_edge_decreases_in_the_batch_size_and_stays_above_the_eigenvalue(lam1, c):
    edges = [batch_hessian_edge(lam1, c, B, N=5000) for B in (1, 2, 5, 20, 100, 1000, 4000, 5000)]
    assert edges == sorted(edges, reverse=True)
    assert edges[-1] == lam1


@given(lam1=positive)
def test_the_edge_is_continuous_where_the_outlier_meets_the_bulk(lam1):
    for factor in (1 - 1e-12, 1 + 1e-12):
        assert batch_hessian_edge(lam1, factor * lam1**2, 1) == pytest.approx(2 * lam1, rel=1e-9)


@given(lam1=positive, c=positive, B=st.integers(1, 900))
def test_calibration_inverts_the_edge(lam1, c, B):
    edge = batch_hessian_edge(lam1, c, B, N=1000)
    again = calibrate_noise(lam1, max(edge, lam1), B, N=1000)
    assert again == pytest.approx(c, rel=1e-6, abs=1e-9 * B * lam1**2)


def test_hand_computed_edges_of_the_card():
    edges = [batch_hessian_edge(10, 60, B, N=50_000) for B in (1, 4, 16, 64, 256, 1024)]
    assert edges == pytest.approx([16.0, 11.5, 10.375, 10.094, 10.023, 10.006], abs=1e-3)


@given(lam1=positive, c=positive, B0=st.floats(1, 1e4), factor=st.floats(1, 1e3))
def test_the_limit_grows_at_most_like_the_square_root_and_that_at_most_linearly(lam1, c, B0, factor):
    spiked = scale_learning_rate(1.0, B0, factor * B0, rule="spiked", lam1=lam1, c=c)
    root = scale_learning_rate(1.0, B0, factor * B0, rule="sqrt")
    assert 1 - 1e-12 <= spiked <= root * (1 + 1e-12)
    assert root <= scale_learning_rate(1.0, B0, factor * B0) * (1 + 1e-12)


@pytest.mark.parametrize("noise", [1e-3, 0.5, 0.999])
def test_of_an_outlier_the_limit_grows_by_the_share_of_noise_in_the_edge(noise):
    # noise = c / (b lam^2) < 1: d log(rate) / d log(B) = noise / (1 + noise), below 1/2 for every outlier.
    step = 1e-6
    grown = scale_learning_rate(1.0, 100, 100 * (1 + step), rule="spiked", lam1=2.0, c=noise * 100 * 4)
    assert (grown - 1) / step == pytest.approx(noise / (1 + noise), rel=1e-4)


def test_spiked_is_the_square_root_in_the_bulk_and_saturates_at_the_end():
    arguments = {"rule": "spiked", "lam1": 2.0, "c": 1e6}
    assert scale_learning_rate(0.1, 16, 64, **arguments) == pytest.approx(0.2)
    assert scale_learning_rate(0.1, 1e9, 1e10, **arguments) == pytest.approx(0.1, rel=1e-3)
    limit = max_learning_rate(2.0, 1e6, 5000, N=5000)
    assert limit == 1.0


def test_finite_rules_use_the_effective_batch_size():
    assert scale_learning_rate(1.0, 50, 80, N=100) == pytest.approx((80 / 0.2) / (50 / 0.5))
    assert scale_learning_rate(1.0, 50, 80, N=100, rule="sqrt") == pytest.approx(2.0)
    assert scale_learning_rate(1.0, 50, 80, rule="sqrt") == pytest.approx(math.sqrt(1.6))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("factor", "stable"), [(0.99, True), (1.01, False)])
def test_descent_on_a_quadratic_is_stable_just_below_the_largest_rate_and_diverges_above(factor, stable, momentum):
    eigenvalues = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    lr = factor * max_learning_rate(4.0, 0.0, 1, momentum=momentum)
    optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum)
    for _ in range(3000):
        x.grad = eigenvalues * x.detach()
        optimizer.step()
    assert (float(x.detach().abs().max()) < 1e-6) is stable


def test_the_top_eigenvalue_of_spikes_plus_noise_is_the_edge():
    generator = torch.Generator().manual_seed(0)
    P, c = 600, 60.0
    G = torch.randn(P, P, generator=generator)
    E = (G + G.T) / math.sqrt(2) * math.sqrt(c / P)
    H = torch.zeros(P)
    H[:2] = torch.tensor([10.0, 4.0])
    for B in (1, 16):
        top = float(torch.linalg.eigvalsh(torch.diag(H) + E / math.sqrt(B))[-1])
        assert top == pytest.approx(batch_hessian_edge(10, c, B), rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_hessian_edge(0.0, 1, 1), "lam1 must be > 0, got 0.0"),
        (lambda: batch_hessian_edge(-1.0, 1, 1), "lam1 must be > 0, got -1.0"),
        (lambda: batch_hessian_edge(1, -1.0, 1), "c must be >= 0, got -1.0"),
        (lambda: batch_hessian_edge(1, 1, 0), "B must be >= 1, got 0"),
        (lambda: batch_hessian_edge(1, 1, 101, N=100), "B must be <= N = 100, got 101"),
        (lambda: max_learning_rate(1, 1, 1, momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: calibrate_noise(2, 1.0, 1), "lam_batch must be >= lam1 = 2, got 1.0"),
        (lambda: calibrate_noise(1, 2, 100, N=100), "B must be < N = 100, got 100"),
        (lambda: scale_learning_rate(0.0, 1, 2), "lr must be > 0, got 0.0"),
        (lambda: scale_learning_rate(0.1, 0, 2), "base_batch must be >= 1, got 0"),
        (lambda: scale_learning_rate(0.1, 1, 0), "batch must be >= 1, got 0"),
        (lambda: scale_learning_rate(0.1, 1, 2, rule="cubic"), "rule must be one of 'linear', 'sqrt', 'spiked', got"),
        (
            lambda: scale_learning_rate(0.1, 1, 2, rule="spiked", lam1=1.0),
            "lam1 and c must be given .*, got 1.0 and None",
        ),
        (lambda: scale_learning_rate(0.1, 1, 9, N=9), "batch must be < N = 9, got 9"),
        (lambda: polyak_pair(0.0, 0.0), "L must be > 0, got 0.0"),
        (lambda: polyak_pair(1.0, 2.0), "l must be <= L = 1, got 2.0"),
    ],
    ids=[f"{number}" for number in range(16)],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_polyaks_pair():
    assert polyak_pair(4.0, 0.01) == pytest.approx((0.9070, 0.8186), abs=1e-4)
    assert polyak_pair(5.0, 5.0) == pytest.approx((0.2, 0.0))


# Products.


def network(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


def batch(seed, rows=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator, dtype=dtype), torch.randint(3, (rows,), generator=generator)


def loss_of(model):
    return lambda pair: functional.cross_entropy(model(pair[0]), pair[1])


def vector(model, seed):
    n = sum(p.numel() for p in model.parameters())
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products_equal_the_dense_hessian_of_the_mean_over_batches_and_are_symmetric():
    model, batches = network(), [batch(0), batch(1), batch(2)]
    loss, params = loss_of(model), list(model.parameters())
    matvec = hessian_matvec(loss, params, batches)
    dense = hessian(lambda: sum(loss(pair) for pair in batches) / 3, params)
    u, v = vector(model, 1), vector(model, 2)
    torch.testing.assert_close(matvec(v), dense @ v, rtol=1e-6, atol=1e-9)
    assert float(u @ matvec(v)) == pytest.approx(float(v @ matvec(u)), rel=1e-9)


def test_gauss_newton_products_equal_the_dense_matrix():
    model, batches = network(), [batch(0), batch(1)]
    params = dict(model.named_parameters())

    def outputs_and_loss(pair):
        outputs = model(pair[0])
        return outputs, functional.cross_entropy(outputs, pair[1])

    v = vector(model, 3)
    expected = torch.zeros_like(v)
    for x, _ in batches:
        # J row by row and the softmax's Hessian diag(p) - p p^T of each row, by hand.
        J = torch.func.jacrev(lambda named, x=x: torch.func.functional_call(model, named, x))(params)
        J = torch.cat([part.detach().reshape(len(x), 3, -1) for part in J.values()], dim=-1)
        p = model(x).detach().softmax(-1)
        curvature = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        expected += torch.einsum("bip,bij,bjq,q->p", J, curvature, J, v) / len(x) / len(batches)
    matvec = hessian_matvec(outputs_and_loss, params.values(), batches, ggn=True)
    torch.testing.assert_close(matvec(v), expected, rtol=1e-9, atol=1e-12)
    assert float(v @ matvec(v)) >= 0


def test_gauss_newton_equals_the_hessian_for_a_linear_model():
    layer = nn.Linear(5, 3).double()
    loss = loss_of(layer)
    v = vector(layer, 0)

    def outputs_and_loss(pair):
        outputs = layer(pair[0])
        return outputs, functional.cross_entropy(outputs, pair[1])

    gauss_newton = hessian_matvec(outputs_and_loss, layer.parameters(), [batch(0)], ggn=True)
    torch.testing.assert_close(gauss_newton(v), hessian_matvec(loss, layer.parameters(), [batch(0)])(v))


def test_products_of_16_bit_parameters_are_float32():
    model = network(torch.bfloat16)
    matvec = hessian_matvec(loss_of(model), model.parameters(), [batch(0, dtype=torch.bfloat16)])
    product = matvec(vector(model, 1).float())
    assert product.dtype == torch.float32
    exact = hessian_matvec(loss_of(network()), network().parameters(), [batch(0)])
    assert exact(vector(model, 1)).dtype == torch.float64


def test_dropout_gives_one_and_the_same_operator_at_every_product():
    layer = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3)).double()
    matvec = hessian_matvec(loss_of(layer), layer.parameters(), [batch(0)])
    v = vector(layer, 0)
    assert torch.equal(matvec(v), matvec(v))


def test_fused_attention_is_replaced_by_what_can_be_differentiated_twice():
    weight = nn.Parameter(torch.eye(8) / 4)
    x = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    matvec = hessian_matvec(
        lambda x: functional.scaled_dot_product_attention(x @ weight, x, x).square().mean(), [weight], [x]
    )
    assert bool(matvec(torch.ones(64)).isfinite().all())


def test_changing_a_parameter_between_products_is_an_error_not_a_wrong_product():
    model = network()
    matvec = hessian_matvec(loss_of(model), model.parameters(), [batch(0)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        matvec(vector(model, 0))


@pytest.mark.parametrize(
    ("params", "batches", "message"),
    [
        ([torch.ones(1, requires_grad=True)], [], "batches must hold one batch at least"),
        ([], [1], "params must hold one parameter at least"),
        ([torch.ones(1)], [1], "all with requires_grad"),
    ],
    ids=["no batch", "no parameter", "frozen parameter"],
)
def test_products_of_nothing_are_refused(params, batches, message):
    with pytest.raises(ValueError, match=message):
        hessian_matvec(lambda number: number * params[0].square().sum(), params, batches)


def test_random_directions_find_the_noise_of_isotropic_batches():
    generator = torch.Generator().manual_seed(0)
    P, s, B = 60, 0.5, 4
    x = nn.Parameter(torch.zeros(P))

    def noisy():
        G = torch.randn(P, P, generator=generator) * s / math.sqrt(B)
        return torch.diag(torch.arange(P) / P) + (G + G.T) / math.sqrt(2)

    def loss(A):
        return x @ A @ x / 2

    batches = [noisy() for _ in range(20)]
    assert estimate_noise(loss, [x], batches, 5, B=B) == pytest.approx(P * s**2, rel=0.1)
    whole = [torch.diag(torch.arange(P) / P)]
    assert estimate_noise(loss, [x], batches, 5, B=B, reference=whole) == pytest.approx(P * s**2, rel=0.1)


def test_one_batch_shows_no_noise():
    x = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="batches must hold two batches at least, or one and a reference, got 1"):
        estimate_noise(lambda a: a * x.square().sum(), [x], [1.0], B=1)


# The controller.


def quadratic(eigenvalues, lr=0.01, groups=None, **options):
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    w = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in values]
    if groups is None:
        optimizer = torch.optim.SGD(w, lr=lr, momentum=0.9, **options)
    else:
        optimizer = torch.optim.SGD(
            [{"params": [p], **group} for p, group in zip(w, groups, strict=True)], momentum=0.9
        )

    def loss(scale):
        return scale * sum(value * p.square().sum() for value, p in zip(values, w, strict=True)) / 2

    return optimizer, loss


def pair(optimizer):
    return [optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]]


class Clock:
    """Seconds that pass as told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_first_step_sets_polyaks_pair_and_safety_scales_the_rate_alone():
    optimizer, loss = quadratic([4.0, 1.0, 0.01])
    SpectralLRController(optimizer, loss, batches=[1.0], safety=0.5).step()
    assert pair(optimizer) == pytest.approx([0.9070 / 2, 0.8186], abs=1e-4)


def test_probes_come_at_the_first_step_and_every_interval_and_are_averaged():
    optimizer, loss = quadratic([1.0, 0.25])
    controller = SpectralLRController(optimizer, loss, interval=3, ema=0.75, bounds=(1e-5, 10))
    seen = []
    for scale in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0):
        controller.step([scale])
        seen.append(pair(optimizer)[0])
    lr, momentum = polyak_pair(1.0, 0.25)
    once = 0.75 * lr + 0.25 * lr / 4
    assert seen == pytest.approx([lr] * 3 + [once] * 3 + [0.75 * once + 0.25 * lr / 7])
    assert pair(optimizer)[1] == pytest.approx(momentum)
    assert [entry["step"] for entry in controller.history] == [1, 4, 7]


def test_batches_are_drawn_only_if_a_probe_is_due():
    optimizer, loss = quadratic([1.0, 0.25])
    controller = SpectralLRController(optimizer, loss, interval=5, probe_batches=2)
    source = iter([1.0] * 10)
    for _ in range(6):
        controller.step(source)
    assert len(list(source)) == 6


def test_too_few_batches_and_no_batches_are_refused():
    optimizer, loss = quadratic([1.0, 0.25])
    with pytest.raises(ValueError, match="batches must be given to step"):
        SpectralLRController(optimizer, loss).step()
    with pytest.raises(ValueError, match="batches must hold probe_batches = 3, got 2"):
        SpectralLRController(optimizer, loss, batches=[1.0, 1.0], probe_batches=3).step()


def test_rate_and_momentum_are_held_in_their_bounds():
    optimizer, loss = quadratic([1e-4, 5e-5])
    SpectralLRController(optimizer, loss, batches=[1.0]).step()
    assert pair(optimizer)[0] == 1.0
    optimizer, loss = quadratic([1e9, 1.0])
    SpectralLRController(optimizer, loss, batches=[1.0], floor=0.0).step()
    assert pair(optimizer) == [1e-5, 0.99]


def test_negative_curvature_is_never_rooted_and_without_positive_curvature_nothing_changes():
    optimizer, loss = quadratic([4.0, 0.01, -3.0])
    controller = SpectralLRController(optimizer, loss, batches=[1.0])
    controller.step()
    assert pair(optimizer) == pytest.approx([0.9070, 0.8186], abs=1e-4)
    assert controller.history[0]["smallest"] == pytest.approx(-3)
    optimizer, loss = quadratic([-1.0, -2.0])
    SpectralLRController(optimizer, loss, batches=[1.0]).step()
    assert pair(optimizer) == [0.01, 0.9]


@pytest.mark.parametrize(
    ("lower", "expected"),
    [("ritz", 1.0), (0.25, 0.25), (lambda spectrum: spectrum.lam_max / 2, 2.0), (9.0, 4.0), (lambda _: 0.5, 0.5)],
    ids=["ritz", "number", "function", "more than L", "constant function"],
)
def test_the_lower_eigenvalue_is_the_smallest_above_the_floor_or_as_told(lower, expected):
    optimizer, loss = quadratic([4.0, 1.0, 0.1])
    controller = SpectralLRController(optimizer, loss, batches=[1.0], floor=0.1, lower=lower, max_momentum=0.999)
    spectrum = controller.probe()
    assert isinstance(spectrum, Spectrum)
    assert controller.history[0]["l"] == pytest.approx(expected)
    assert pair(optimizer) == pytest.approx(polyak_pair(4.0, expected), abs=1e-9)


def test_noise_replaces_the_top_by_the_edge_of_the_training_batch():
    optimizer, loss = quadratic([4.0, 1.0])
    controller = SpectralLRController(
        optimizer, loss, batches=[1.0], noise=100.0, batch_size=20, dataset_size=100, bounds=(1e-5, 10)
    )
    controller.step()
    assert controller.history[0]["L"] == pytest.approx(batch_hessian_edge(4.0, 100.0, 20, 100))
    assert controller.history[0]["largest"] == pytest.approx(4.0)


def test_weight_decay_shifts_all_eigenvalues():
    optimizer, loss = quadratic([4.0, 1.0], weight_decay=0.5)
    controller = SpectralLRController(optimizer, loss, batches=[1.0])
    controller.step()
    assert [controller.history[0][name] for name in ("L", "l")] == pytest.approx([4.5, 1.5])


def test_curvature_is_that_of_the_problem_scaled_by_the_groups_ratios():
    groups = [{"lr": 0.1, "weight_decay": 1.0}, {"lr": 0.4}]
    optimizer, loss = quadratic([8.0, 1.0], groups=groups)
    controller = SpectralLRController(optimizer, loss, batches=[1.0])
    controller.step()
    assert [controller.history[0][name] for name in ("L", "l")] == pytest.approx([(8 + 1) / 4, 1.0])
    rates = controller.get_last_lr()
    assert rates[1] == pytest.approx(polyak_pair(9 / 4, 1.0)[0])
    assert rates[0] == pytest.approx(rates[1] / 4)


def test_parameters_that_are_not_trained_are_left_out():
    optimizer, loss = quadratic([100.0, 4.0, 1.0])
    optimizer.param_groups[0]["params"][0].requires_grad_(False)
    controller = SpectralLRController(optimizer, loss, batches=[1.0])
    controller.step()
    assert controller.history[0]["L"] == pytest.approx(4.0)


def test_a_tensor_lr_is_updated_in_place():
    optimizer, loss = quadratic([4.0, 0.01], lr=torch.tensor(0.01))
    tensor = optimizer.param_groups[0]["lr"]
    SpectralLRController(optimizer, loss, batches=[1.0]).step()
    assert optimizer.param_groups[0]["lr"] is tensor
    assert float(tensor) == pytest.approx(0.9070, abs=1e-4)


def test_a_probe_freezes_batch_norm_and_dropout_and_moves_nothing():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3)).double()
    model[2].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(batch(0)[0]).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = []
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def loss(pair):
        modes.extend(module.training for module in model)
        torch.rand(1), random.random(), np.random.rand()  # what a loss with augmentation would draw
        return functional.cross_entropy(model(pair[0]), pair[1])

    SpectralLRController(optimizer, loss, batches=[batch(1)], model=model).step()
    assert modes == [False] * 4
    assert [module.training for module in model] == [True, True, False, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


def test_an_error_in_a_probe_leaves_modes_and_generators_as_they_were():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = torch.get_rng_state()

    def loss(pair):
        torch.rand(1)
        return functional.cross_entropy(model(pair[0]), pair[1]) * math.nan

    with pytest.raises(FloatingPointError, match="product 1 is not finite"):
        SpectralLRController(optimizer, loss, batches=[batch(1)], model=model).step()
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert optimizer.param_groups[0]["lr"] == 0.1


def timed(probe_seconds, step_seconds, steps, **options):
    """A run on a clock where a probe takes so long, by the loss that it evaluates, and a step so long."""
    optimizer, quadratic_loss = quadratic([4.0, 1.0])
    clock = Clock()

    def loss(scale):
        clock.now += probe_seconds
        return quadratic_loss(scale)

    controller = SpectralLRController(optimizer, loss, batches=[1.0], clock=clock, **options)
    shares = []
    for _ in range(steps):
        clock.now += step_seconds
        controller.step()
        shares.append(controller.share)
    return controller, shares


@pytest.mark.parametrize("ratio", [3.0, 40.0])
@pytest.mark.parametrize("max_share", [0.05, 0.2])
def test_auto_keeps_the_share_from_the_second_probe_on_and_uses_it(ratio, max_share):
    controller, shares = timed(ratio, 1.0, int(80 * ratio), interval="auto", max_share=max_share)
    assert len(controller.history) > 2
    second = int(controller.history[1]["step"])
    assert max(shares[second - 1 :]) <= max_share * (1 + 1e-9)
    # Nothing is given away but what the shortest pause of m = 20 steps takes.
    assert shares[int(controller.history[-1]["step"]) - 1] >= 0.9 * min(max_share, ratio / (ratio + 20))


def test_the_default_is_auto_with_five_percent():
    controller, _ = timed(10.0, 1.0, 1)
    assert (controller.interval, controller.max_share) == ("auto", 0.05)


def test_a_number_as_interval_takes_no_heed_of_the_clock():
    controller, shares = timed(1000.0, 1.0, 11, interval=5)
    assert [entry["step"] for entry in controller.history] == [1, 6, 11]
    assert shares[0] == 1.0
    assert shares[-1] == pytest.approx(3000 / 3010)


def test_share_does_not_count_the_time_between_saving_and_loading():
    controller, _ = timed(10.0, 1.0, 50)
    state = controller.state_dict()
    resumed, _ = timed(10.0, 1.0, 0)
    resumed.clock.now = 1e6
    resumed.load_state_dict(state)
    resumed.step()
    assert resumed.share == controller.share


def test_a_state_dict_keeps_averages_and_counters_and_survives_a_file():
    optimizer, loss = quadratic([4.0, 0.5])
    controller = SpectralLRController(optimizer, loss, interval=4)
    for scale in range(1, 7):
        controller.step([float(scale)])
    file = io.BytesIO()
    torch.save(controller.state_dict(), file)
    file.seek(0)
    other, other_loss = quadratic([4.0, 0.5])
    resumed = SpectralLRController(other, other_loss, interval=4)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert pair(other) == pair(optimizer)
    for scale in range(7, 20):
        controller.step([float(scale)])
        resumed.step([float(scale)])
        assert pair(other) == pair(optimizer)
    assert resumed.history == controller.history


def test_a_state_of_other_groups_and_a_later_group_are_refused():
    optimizer, loss = quadratic([4.0, 0.5])
    controller = SpectralLRController(optimizer, loss, batches=[1.0], interval=1)
    two, two_loss = quadratic([4.0, 0.5], groups=[{"lr": 0.1}, {"lr": 0.2}])
    with pytest.raises(ValueError, match="the state has 2 groups, the optimizer 1"):
        controller.load_state_dict(SpectralLRController(two, two_loss).state_dict())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="other parameter groups"):
        controller.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": (1.0, 0.1)}, r"bounds must be \(lowest, highest\), got \(1.0, 0.1\)"),
        ({"noise": 1.0}, "batch_size must be given with noise, got None"),
        ({"noise": 1.0, "batch_size": 20, "dataset_size": 10}, "batch_size must be <= N = 10, got 20"),
        ({"interval": "epoch"}, "interval must be 'auto' or a whole number >= 1, got 'epoch'"),
    ],
    ids=["bounds", "noise alone", "more than all", "interval"],
)
def test_arguments_that_do_not_go_together_are_refused(options, message):
    optimizer, loss = quadratic([1.0, 0.5])
    with pytest.raises(ValueError, match=message):
        SpectralLRController(optimizer, loss, **options)


def test_an_optimizer_without_momentum_or_with_a_rate_of_zero_is_refused():
    w = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="optimizer must have 'momentum' in its groups, as SGD has, got Adam"):
        SpectralLRController(torch.optim.Adam(w), lambda _: w[0])
    with pytest.raises(ValueError, match=r"the lr of every group must be > 0, got \[0.0\]"):
        SpectralLRController(torch.optim.SGD(w, lr=0.0, momentum=0.9), lambda _: w[0])


def on_a_rank(rank, folder):
    model = network()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clock = Clock()
    controller = SpectralLRController(
        optimizer, loss_of(replica), batches=[batch(50 + rank)], model=replica, ema=0.5, max_share=0.5, clock=clock
    )
    rates = []
    for step in range(60):
        clock.now += 1 + rank  # one rank is slower: alone, they would probe at different steps
        optimizer.zero_grad()
        loss_of(replica)(batch(2 * step + rank)).backward()
        optimizer.step()
        clock.now += 10 * (controller._steps + 1 >= controller._due)
        controller.step()
        rates.append(pair(optimizer))
    reached = {"rates": rates, "history": controller.history, "parameters": [p.detach() for p in model.parameters()]}
    v = vector(model, 1)
    model = network()
    reached["product"] = hessian_matvec(loss_of(model), model.parameters(), [batch(rank)])(v)
    torch.save(reached, f"{folder}/{rank}")


@pytest.fixture(scope="module")
def reached_by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(on_a_rank, folder)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


def test_ranks_with_different_data_and_clocks_decide_alike_to_the_bit(reached_by_rank):
    first, second = reached_by_rank
    assert first["rates"] == second["rates"]
    assert first["history"] == second["history"]
    assert len(first["history"]) > 1
    assert all(torch.equal(a, b) for a, b in zip(first["parameters"], second["parameters"], strict=True))


def test_the_product_over_ranks_is_that_of_all_their_batches(reached_by_rank):
    model = network()
    expected = hessian_matvec(loss_of(model), model.parameters(), [batch(0), batch(1)])(vector(model, 1))
    for reached in reached_by_rank:
        torch.testing.assert_close(reached["product"], expected)
