import copy
import io
import math

import pytest
import torch
from tests.ranks import run_ranks
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from headway.optim.last_iterate_mirror_descent import (
    CompositeMirrorDescent,
    LastIterateLR,
    StepSize,
    last_iterate_lambda,
    suggest_eta,
)
from headway.optim.mirror import Entropy, Euclidean, PowerMap
from headway.testing import check_optimizer

SHAPES = [(), (3,), (4, 3), (2, 3, 2, 2)]


def weights(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(optimizer, parameters, steps, start=0, scheduler=None):
    for step in range(start, start + steps):
        set_gradients(parameters, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def simplex_rows(dtype=torch.float64):
    return nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype).softmax(-1))


def assert_all_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"schedule": "constant", "prox": "l1", "reg": 0.1},
        {"schedule": "heavy_tail", "mirror": "power", "p": 1.5, "total_steps": 100, "lr": 1.0},
        {"prox": "ball", "radius": 1.0},
        {"prox": "simplex"},
        {"prox": "box", "bounds": (-0.5, 0.5)},
        {"schedule": "strongly_convex_h", "mu": 1.0, "prox": "l2", "reg": 1.0},
        {"schedule": StepSize.strongly_convex_f(mu=1.0, L=1.0, T=100)},
        {"mirror": PowerMap(1.5)},
    ],
    ids=str,
)
def test_contract(hyperparameters):
    check_optimizer(CompositeMirrorDescent, **hyperparameters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_schedule_with_a_scheduler_equals_sgd_to_the_bit(dtype):
    ours, theirs = weights(dtype), weights(dtype)
    optimizer, sgd = CompositeMirrorDescent(ours, lr=0.7, schedule="constant"), torch.optim.SGD(theirs, lr=0.7)
    factor = last_iterate_lambda(12)
    train(optimizer, ours, 12, scheduler=LambdaLR(optimizer, factor))
    train(sgd, theirs, 12, scheduler=LambdaLR(sgd, factor))
    assert_all_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_decay_equals_sgd_with_the_lambda_and_with_the_scheduler_to_the_bit(dtype):
    runs = [weights(dtype) for _ in range(3)]
    train(CompositeMirrorDescent(runs[0], lr=0.7, total_steps=12), runs[0], 12)
    sgd = torch.optim.SGD(runs[1], lr=0.7)
    train(sgd, runs[1], 12, scheduler=LambdaLR(sgd, last_iterate_lambda(12)))
    sgd = torch.optim.SGD(runs[2], lr=0.7)
    train(sgd, runs[2], 12, scheduler=LastIterateLR(sgd, total_steps=12))
    assert_all_equal(runs[0], runs[1])
    assert_all_equal(runs[0], runs[2])


def test_power_map_with_p_2_equals_sgd_to_the_bit_wherever_the_center_is():
    runs = []
    for options in ({}, {"mirror": "power"}, {"mirror": "power", "center": 3.0}):
        parameters = weights()
        train(CompositeMirrorDescent(parameters, lr=0.3, **options), parameters, 5)
        runs.append(parameters)
    assert_all_equal(runs[0], runs[1])
    assert_all_equal(runs[0], runs[2])


@pytest.mark.parametrize("center", [None, 0.5])
def test_power_map_takes_one_norm_over_all_tensors_of_a_group(center):
    ours, whole = weights(), nn.Parameter(torch.cat([p.detach().reshape(-1) for p in weights()]))
    optimizer = CompositeMirrorDescent(ours, lr=0.3, schedule="heavy_tail", mirror="power", p=1.5, center=center)
    mirror = PowerMap(1.5, center=whole.detach().clone() if center is None else center)
    for step in range(4):
        set_gradients(ours, step)
        gradient = torch.cat([p.grad.reshape(-1) for p in ours])
        optimizer.step()
        eta = 0.3 * (step + 1) ** (-1 / 1.5)
        with torch.no_grad():
            whole.copy_(mirror.inverse(mirror.grad(whole) - eta * gradient))
        torch.testing.assert_close(torch.cat([p.reshape(-1) for p in ours]), whole, rtol=1e-12, atol=1e-12)


def test_first_power_step_from_the_center_has_the_length_of_the_docstring():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = CompositeMirrorDescent([weight], lr=0.01, schedule="constant", mirror="power", p=1.5)
    weight.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step()
    assert float(weight.detach().norm()) == pytest.approx((0.01 * 5 / 2) ** 0.5)  # q = 3


def test_zero_gradient_at_the_center_stays_there():
    weight = nn.Parameter(torch.ones(2))
    optimizer = CompositeMirrorDescent([weight], mirror="power", p=1.5)
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2))


def test_entropy_equals_exponentiated_gradient_and_keeps_the_simplex():
    weight = simplex_rows()
    expected = weight.detach().clone()
    optimizer = CompositeMirrorDescent([weight], lr=2.0, mirror="entropy")
    for step in range(50):
        set_gradients([weight], step)
        expected = expected * torch.exp(-2.0 / math.sqrt(step + 1) * weight.grad)
        expected = expected / expected.sum(-1, keepdim=True)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-14)
        assert float((weight.detach().sum(-1) - 1).abs().max()) < 1e-12
        assert bool((weight > 0).all())


def test_entropy_ignores_a_constant_added_to_the_gradient():
    runs = []
    for constant in (0.0, 7.0):
        weight = simplex_rows()
        optimizer = CompositeMirrorDescent([weight], lr=1.0, mirror="entropy")
        for step in range(5):
            set_gradients([weight], step)
            weight.grad += constant
            optimizer.step()
        runs.append(weight.detach())
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


def test_entropy_in_float32_comes_back_from_underflow():
    weight = nn.Parameter(torch.tensor([0.5, 0.5]))
    optimizer = CompositeMirrorDescent([weight], lr=1.0, schedule="constant", mirror="entropy")
    for sign in (1.0, -1.0):
        for _ in range(200):
            weight.grad = sign * torch.tensor([1.0, 0.0])
            optimizer.step()
        if sign > 0:
            assert float(weight.detach()[0]) == 0  # exp(-200) is no float32
    torch.testing.assert_close(weight.detach(), torch.tensor([0.5, 0.5]), rtol=1e-4, atol=0)


def test_unnormalised_entropy_multiplies():
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = CompositeMirrorDescent([weight], lr=0.5, schedule="constant", mirror="unnormalised_entropy")
    weight.grad = torch.tensor([2.0, -4.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([math.exp(-1), 2 * math.exp(2)], dtype=torch.float64))


@pytest.mark.parametrize("mirror", ["entropy", "unnormalised_entropy"])
def test_entropies_resume_exactly_also_in_bfloat16_and_after_a_safe_load(mirror):
    for dtype in (torch.float32, torch.bfloat16):
        start = torch.full((4, 4), 0.25, dtype=dtype)
        weight, copied = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        optimizer = CompositeMirrorDescent([weight], lr=0.1, mirror=mirror, total_steps=8)
        train(optimizer, [weight], 4)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = CompositeMirrorDescent([copied], lr=0.1, mirror=mirror, total_steps=8)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        copied.data.copy_(weight.data)
        assert loaded.state[copied]["dual"].dtype == torch.float32
        train(optimizer, [weight], 4, start=4)
        train(loaded, [copied], 4, start=4)
        assert torch.equal(weight, copied)


@pytest.mark.parametrize(
    ("mirror", "start", "message"),
    [
        ("entropy", [0.5, 0.6], "sum to 1"),
        ("entropy", [1.0, 0.0], "positive"),
        ("unnormalised_entropy", [1.0, -1.0], "positive"),
    ],
)
def test_entropies_refuse_a_start_outside_their_domain(mirror, start, message):
    with pytest.raises(ValueError, match=message):
        CompositeMirrorDescent([nn.Parameter(torch.tensor(start))], mirror=mirror)


def test_l1_gives_the_closed_form_exact_zeros_and_all_zeros_above_the_threshold():
    ours, plain = weights(), weights()
    optimizer = CompositeMirrorDescent(ours, lr=0.1, schedule="constant", prox="l1", reg=5.0)
    train(optimizer, ours, 1)
    train(CompositeMirrorDescent(plain, lr=0.1, schedule="constant"), plain, 1)
    for p, v in zip(ours, plain, strict=True):
        assert torch.equal(p.detach(), (v.sign() * (v.abs() - 0.5).clamp_min(0)).detach())
    assert 0 < sum(int((p == 0).sum()) for p in ours) < sum(p.numel() for p in ours)
    everything = weights()
    train(CompositeMirrorDescent(everything, lr=0.1, schedule="constant", prox="l1", reg=100.0), everything, 1)
    assert all(bool((p == 0).all()) for p in everything)


def test_l2_is_the_implicit_step():
    ours, plain = weights(), weights()
    train(CompositeMirrorDescent(ours, lr=0.1, schedule="constant", prox="l2", reg=3.0), ours, 1)
    train(CompositeMirrorDescent(plain, lr=0.1, schedule="constant"), plain, 1)
    for p, v in zip(ours, plain, strict=True):
        torch.testing.assert_close(p.detach(), v.detach() / 1.3)


def test_ball_is_one_for_the_group_around_the_start_or_the_center():
    for center in (None, 0.0):
        parameters = weights()
        start = torch.cat([p.detach().reshape(-1) for p in parameters])
        options = {"prox": "ball", "radius": 0.5, "center": center}
        train(CompositeMirrorDescent(parameters, lr=5.0, **options), parameters, 6)
        distance = (torch.cat([p.detach().reshape(-1) for p in parameters]) - (start if center is None else 0)).norm()
        assert float(distance) == pytest.approx(0.5, abs=1e-12)


def test_a_function_as_prox_gets_the_mirror_step_and_its_eta_for_the_entropies_too():
    seen = []

    def prox(v, eta):
        seen.append(eta)
        return v.clamp_max(0.6)

    for mirror in ("euclidean", "unnormalised_entropy"):
        weight = nn.Parameter(torch.tensor([0.5, 0.5], dtype=torch.float64))
        optimizer = CompositeMirrorDescent([weight], lr=1.0, prox=prox, mirror=mirror)
        for _ in range(2):
            weight.grad = torch.tensor([-1.0, 1.0], dtype=torch.float64)
            optimizer.step()
        eta = [1.0, 1 / math.sqrt(2)]
        assert seen[-2:] == eta
        assert float(weight.detach()[0]) == pytest.approx(0.6)
        other = 0.5 * math.exp(-sum(eta)) if mirror != "euclidean" else 0.5 - sum(eta)
        assert float(weight.detach()[1]) == pytest.approx(other)


def test_a_map_of_the_users_is_used_and_its_absence_at_loading_is_refused():
    ours, plain = weights(), weights()
    optimizer = CompositeMirrorDescent(ours, lr=0.3, mirror=Euclidean())
    train(optimizer, ours, 3)
    train(CompositeMirrorDescent(plain, lr=0.3), plain, 3)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["mirror"] == "callable"
    assert isinstance(optimizer.param_groups[0]["mirror"], Euclidean)
    with pytest.raises(ValueError, match="mirror must be the object"):
        CompositeMirrorDescent(weights(), lr=0.3).load_state_dict(state)
    fresh = CompositeMirrorDescent(weights(), lr=0.3, mirror=Euclidean())
    fresh.load_state_dict(state)
    assert isinstance(fresh.param_groups[0]["mirror"], Euclidean)


def test_entropy_as_an_object_is_entropy_by_name():
    runs = []
    for mirror in ("entropy", Entropy()):
        weight = simplex_rows()
        train(CompositeMirrorDescent([weight], lr=1.0, mirror=mirror), [weight], 5)
        runs.append(weight)
    assert torch.equal(*runs)


def all_schedules(T, L):
    yield StepSize.convex(eta=3.0, L=L, T=T)
    yield StepSize.convex(eta=3.0, L=L, T=T, log_free=False)
    yield StepSize.convex(eta=3.0, L=L)
    for known in (None, T):
        yield StepSize.strongly_convex_f(mu=0.3, L=L, T=known, e=0.0 if L else 1.0)
        yield StepSize.strongly_convex_h(mu=0.3, L=L, T=known, e=0.0 if L else 1.0)
        yield StepSize.heavy_tail(eta=3.0, p=1.5, T=known)
    yield StepSize.heavy_tail(eta=3.0, p=1.5, T=T, log_free=False)
    yield StepSize.constant(eta=3.0, L=L)


@pytest.mark.parametrize("T", [1, 2, 7, 100])
@pytest.mark.parametrize("L", [0.0, 2.0])
def test_every_schedule_is_positive_and_within_the_cap(T, L):
    for schedule in all_schedules(T, L):
        steps = [schedule(t) for t in range(1, T + 1)]
        assert all(step > 0 for step in steps)
        if L and schedule.kind != "heavy_tail":
            assert all(step <= 1 / (2 * L) for step in steps)


def test_strongly_convex_schedules_meet_the_cap_by_themselves():
    for schedule in all_schedules(50, 2.0):
        if schedule.kind.startswith("strongly"):
            assert all(schedule._shape(t) <= 1 / (2 * schedule.L) + 1e-15 for t in range(1, 51))


def test_linear_decay_sums_to_its_closed_form():
    for T in (1, 10, 333):
        total = sum(StepSize.convex(eta=2.0, T=T)(t) for t in range(1, T + 1))
        assert total == pytest.approx(2.0 * (T + 1) / (2 * math.sqrt(T)))


def test_last_step_of_linear_decay_has_factor_one_over_t_to_three_halves_and_not_zero():
    assert StepSize.convex(eta=2.0, T=16)(16) == pytest.approx(2.0 / 64)
    assert last_iterate_lambda(16)(15) == pytest.approx(1 / 64)


def test_heavy_tail_schedules_at_p_2_are_the_convex_ones():
    for T, log_free in ((None, True), (9, True), (9, False)):
        heavy, convex = StepSize.heavy_tail(1.5, 2.0, T, log_free), StepSize.convex(1.5, 0.0, T, log_free)
        for t in range(1, 10):
            assert heavy(t) == pytest.approx(convex(t))


def test_schedule_values_of_the_table():
    # L = 2, mu = 1, so k = 2; T = 5, tau = 3
    f, h = StepSize.strongly_convex_f(1.0, 2.0), StepSize.strongly_convex_h(1.0, 2.0)
    assert [f(t) for t in (1, 2)] == [2 / 10, 2 / 11]
    assert [h(t) for t in (1, 2)] == [2 / 9, 2 / 10]
    f, h = StepSize.strongly_convex_f(1.0, 2.0, T=5, e=3.0), StepSize.strongly_convex_h(1.0, 2.0, T=5, e=3.0)
    assert [f(t) for t in range(1, 6)] == [1 / 5, 1 / 7, 1 / 7, 2 / 11, 2 / 12]
    assert [h(t) for t in range(1, 6)] == [1 / 7, 1 / 7, 1 / 7, 2 / 9, 2 / 10]


def test_linear_objective_moves_by_the_sum_of_the_steps():
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    gradient = torch.tensor([0.5, 3.0], dtype=torch.float64)
    schedule = StepSize.convex(eta=0.7, T=20)
    optimizer = CompositeMirrorDescent([weight], schedule=schedule)
    for _ in range(20):
        weight.grad = gradient
        optimizer.step()
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64) - gradient * sum(schedule(t) for t in range(1, 21))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("T", [None, 20])
def test_error_on_a_strongly_convex_quadratic_is_the_product_of_the_contractions(T):
    mu = 0.5
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    schedule = StepSize.strongly_convex_f(mu=mu, L=mu, T=T)
    optimizer = CompositeMirrorDescent([weight], schedule=schedule)
    for _ in range(20):
        weight.grad = mu * weight.detach()
        optimizer.step()
    factor = math.prod(1 - schedule(t) * mu for t in range(1, 21))
    assert float(weight.detach()[0]) == pytest.approx(factor, rel=1e-12)


def test_a_string_with_numbers_is_the_same_schedule_as_the_object():
    runs = []
    for options in (
        {"schedule": StepSize.strongly_convex_f(mu=0.5, L=1.0, T=10, e=2.0)},
        {"schedule": "strongly_convex_f", "mu": 0.5, "L": 1.0, "total_steps": 10, "e": 2.0},
    ):
        parameters = weights()
        train(CompositeMirrorDescent(parameters, **options), parameters, 10)
        runs.append(parameters)
    assert_all_equal(*runs)


def test_steps_after_the_last_raise_and_change_nothing():
    parameters = weights()
    optimizer = CompositeMirrorDescent(parameters, total_steps=3)
    train(optimizer, parameters, 3)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match="steps that were planned"):
        train(optimizer, parameters, 1)
    assert_all_equal(before, parameters)
    schedule = LastIterateLR(torch.optim.SGD(weights(), lr=1.0), total_steps=1)
    schedule.optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.0]
    with pytest.raises(ValueError, match="steps that were planned"):
        schedule.step()


def test_scheduler_resumes_from_its_state():
    def start():
        return LastIterateLR(torch.optim.SGD(weights(), lr=2.0), total_steps=6)

    first, second = start(), start()
    for _ in range(3):
        first.optimizer.step()
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    for schedule in (first, second):
        schedule.optimizer.step()
        schedule.step()
    assert first.get_last_lr() == second.get_last_lr() == [pytest.approx(2.0 * 2 / 6**1.5)]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: StepSize.convex(eta=0.0), "eta"),
        (lambda: StepSize.convex(eta=1.0, T=0), "T"),
        (lambda: StepSize.heavy_tail(eta=1.0, p=1.0), "p"),
        (lambda: StepSize.strongly_convex_f(mu=0.0), "mu"),
        (lambda: StepSize("strongly_convex_f"), "mu"),
        (lambda: StepSize("convex", mu=1.0), "mu"),
        (lambda: StepSize.strongly_convex_h(mu=1.0, T=4), "e"),
        (lambda: last_iterate_lambda(0), "T"),
        (lambda: LastIterateLR(torch.optim.SGD(weights(), lr=1.0), total_steps=0), "total_steps"),
        (lambda: suggest_eta(1.0, 0.0, 0.0), "sigma"),
        (lambda: suggest_eta(1.0, 1.0, 1.0, delta=0.1, p=1.5), "delta"),
        (lambda: suggest_eta(0.0, 1.0, 1.0), "D1"),
        (lambda: CompositeMirrorDescent(weights(), lr=1.0, schedule=StepSize.convex(eta=1.0)), "lr"),
        (lambda: CompositeMirrorDescent(weights(), total_steps=4, schedule=StepSize.convex(eta=1.0)), "total_steps"),
        (lambda: CompositeMirrorDescent(weights(), p=1.2, schedule=StepSize.heavy_tail(eta=1.0, p=1.5)), "p"),
        (lambda: CompositeMirrorDescent(weights(), mirror="power", p=1.5, prox="l1", reg=1.0), "prox"),
        (lambda: CompositeMirrorDescent(weights(), mirror="power", p=1.5, prox=lambda v, eta: v), "prox"),
        (lambda: CompositeMirrorDescent([simplex_rows()], mirror="entropy", prox="l1"), "prox"),
        (lambda: CompositeMirrorDescent(weights(), reg=1.0), "reg"),
        (lambda: CompositeMirrorDescent(weights(), prox="ball"), "radius"),
        (lambda: CompositeMirrorDescent(weights(), prox="box", bounds=(1.0, 0.0)), "bounds"),
        (lambda: CompositeMirrorDescent(weights(), center=1.0), "center"),
        (lambda: CompositeMirrorDescent([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "params"),
    ],
)
def test_arguments_that_make_no_sense_raise_and_name_themselves(make, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        make()


def test_best_eta_minimises_the_bound_that_it_belongs_to():
    D1, M, sigma = 3.0, 1.0, 0.5
    eta = suggest_eta(D1, M, sigma)
    bound = {scale: D1 / (scale * eta) + scale * eta * (M**2 + sigma**2) for scale in (0.9, 1.0, 1.1)}
    assert min(bound, key=bound.get) == 1.0
    assert suggest_eta(D1, M, sigma, p=2.0) == pytest.approx((D1 / (M**2 + sigma**2)) ** 0.5)
    assert suggest_eta(D1, 0.0, sigma, delta=math.exp(-4)) == pytest.approx(D1**0.5 / (2 * sigma))
    assert suggest_eta(D1, M, sigma, p=1.5) == pytest.approx((D1 / (M**1.5 + sigma**1.5)) ** (1 / 1.5))


def test_euclidean_steps_hold_no_state():
    parameters = weights()
    optimizer = CompositeMirrorDescent(parameters, prox="l1", reg=0.1)
    train(optimizer, parameters, 3)
    assert not any(optimizer.state.values())


def sharded_run(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for name, options in SHARDED.items():
        parameters = [
            nn.Parameter(distribute_tensor(p.detach().abs() + 0.1, mesh, [Shard(0) if p.ndim else Replicate()]))
            for p in weights(shapes=[(5, 2), (3,), ()])
        ]
        optimizer = CompositeMirrorDescent(parameters, lr=0.3, **options)
        for step in range(3):
            plain = weights(shapes=[(5, 2), (3,), ()])
            set_gradients(plain, step)
            for p, q in zip(parameters, plain, strict=True):
                p.grad = distribute_tensor(q.grad, mesh, p.placements)
            optimizer.step()
        whole = [p.detach().full_tensor() for p in parameters]
        torch.save(whole, f"{folder}/{name}-{rank}.pt")
    for options in ({"mirror": "entropy"}, {"prox": "simplex"}, {"prox": lambda v, eta: v}):
        with pytest.raises(ValueError, match="sharded"):
            CompositeMirrorDescent(parameters, **options)


SHARDED = {
    "plain": {},
    "l1": {"prox": "l1", "reg": 0.5},
    "positive": {"mirror": "unnormalised_entropy"},
    "power": {"mirror": "power", "p": 1.5},
    "ball": {"prox": "ball", "radius": 0.2},
}


def test_sharded_parameters_take_the_steps_of_whole_ones(tmp_path):
    run_ranks(sharded_run, tmp_path)
    for name, options in SHARDED.items():
        parameters = [nn.Parameter(p.detach().abs() + 0.1) for p in weights(shapes=[(5, 2), (3,), ()])]
        train(CompositeMirrorDescent(parameters, lr=0.3, **options), parameters, 3)
        for rank in range(2):
            for p, whole in zip(parameters, torch.load(tmp_path / f"{name}-{rank}.pt"), strict=True):
                torch.testing.assert_close(whole, p.detach(), rtol=1e-6, atol=1e-9)
