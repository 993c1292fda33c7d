import itertools
import math

import pytest
import torch
from scipy.optimize import minimize
from tests.ranks import run_ranks
from torch import nn

from headway.optim.normalized_logistic_gd import NormalizedLogisticGD, example_weights, separate
from headway.testing import check_optimizer

RULES = ["normalized", "logistic", "batch_perceptron", "normalized_batch_perceptron", "perceptron"]


def data(n=20, d=4, seed=0, margin=0.2):
    """Rows y_i x_i that a random direction separates with at least this margin."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    along = z @ direction
    return z + torch.outer(along.abs() + margin - along, direction)


def iterates(z, rule, gamma, steps):
    return [separate(z, rule, gamma, max_iter=t).theta for t in range(steps + 1)]


def largest_margin(z):
    """mu and the direction that attains it: the hard-margin SVM without intercept."""
    z = z.numpy()
    start = separate(torch.from_numpy(z)).theta.numpy()
    start = start / (z @ start).min()
    solution = minimize(
        lambda w: w @ w / 2, start, jac=lambda w: w,
        constraints={"type": "ineq", "fun": lambda w: z @ w - 1, "jac": lambda w: z},
    )  # fmt: skip
    assert solution.success
    norm = math.sqrt(solution.x @ solution.x)
    return 1 / norm, torch.from_numpy(solution.x / norm)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}], ids=str)
def test_contract(options):
    check_optimizer(NormalizedLogisticGD, **options)


def test_the_first_step_from_zero_is_half_the_mean_and_the_whole_mean():
    z = data()
    torch.testing.assert_close(separate(z, "logistic", 7.0, 1).theta, 7.0 / 2 * z.mean(0))
    torch.testing.assert_close(separate(z, "normalized", 7.0, 1).theta, 7.0 * z.mean(0))
    torch.testing.assert_close(separate(z, "batch_perceptron", 7.0, 1).theta, z.mean(0) / 2)


def test_plain_descent_over_gamma_tends_to_the_batch_perceptron():
    z = data(n=60, d=30, seed=1, margin=0.01)
    ours, limit = iterates(z, "logistic", 1e6, 10), iterates(z, "batch_perceptron", 1.0, 10)
    assert not torch.equal(limit[-1], limit[-2])
    for a, b in zip(ours, limit, strict=True):
        torch.testing.assert_close(a / 1e6, b, rtol=0, atol=1e-6)


def test_normalized_descent_over_gamma_tends_to_the_normalized_batch_perceptron():
    z = data(n=60, d=30, seed=1, margin=0.01)
    ours, limit = iterates(z, "normalized", 1e6, 10), iterates(z, "normalized_batch_perceptron", 1.0, 10)
    torch.testing.assert_close(limit[1], z.mean(0))
    assert not torch.equal(limit[-1], limit[-2])
    for a, b in zip(ours, limit, strict=True):
        torch.testing.assert_close(a / 1e6, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 100.0])
def test_a_step_is_a_convex_combination_of_the_examples(gamma):
    z = data(n=40, d=8, margin=0.01)
    R, (mu, u) = z.norm(dim=1).max(), largest_margin(z)
    path = iterates(z, "normalized", gamma, 12)
    for before, after in itertools.pairwise(path):
        step = after - before
        assert step.norm() <= gamma * R * (1 + 1e-12)
        if step.norm() > 0:
            assert u @ step >= gamma * mu * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gamma", [0.1, 1.0, 100.0])
def test_steps_stay_below_the_bound_of_the_theorem(seed, gamma):
    z = data(n=30, d=5, seed=seed, margin=0.05)
    R, (mu, _) = float(z.norm(dim=1).max()), largest_margin(z)
    found = separate(z, "normalized", gamma)
    assert found.separated
    assert found.iterations <= R**2 / mu**2 + 2 * math.log(2 * len(z) - 1) / (gamma * mu**2)
    for rule in ("perceptron", "normalized_batch_perceptron"):
        assert separate(z, rule).iterations <= R**2 / mu**2
    assert separate(z, "batch_perceptron").iterations <= len(z) * R**2 / mu**2


@pytest.mark.parametrize("rule", ["normalized", "logistic"])
def test_duplicating_every_example_changes_nothing(rule):
    z = data(n=30, margin=0.01)
    for a, b in zip(iterates(z, rule, 3.0, 8), iterates(z.repeat(5, 1), rule, 3.0, 8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_duplicating_one_class_keeps_the_bound():
    few, many = data(n=30, d=5, margin=0.05), None
    many = torch.cat([few, few[:3].repeat(300, 1)])
    (mu, _), R = largest_margin(few), float(few.norm(dim=1).max())
    assert separate(many).iterations <= R**2 / mu**2 + 2 * math.log(2 * len(many) - 1) / (100 * mu**2)


@pytest.mark.parametrize("rule", ["normalized", "logistic"])
def test_rescaling_the_data_rescales_theta(rule):
    z, c = data(n=30, margin=0.01), 8.0
    for a, b in zip(iterates(z, rule, 3.0, 8), iterates(c * z, rule, 3.0 / c**2, 8), strict=True):
        torch.testing.assert_close(a / c, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_start_that_separates_takes_no_step(rule):
    z = data()
    start = separate(z).theta
    found = separate(z, rule, theta=start)
    assert found.separated
    assert found.iterations == 0
    assert torch.equal(found.theta, start)


def test_zero_margins_are_errors_so_that_zero_is_never_a_solution():
    found = separate(torch.tensor([[1.0, 0.0]]), max_iter=0, track=True)
    assert not found.separated
    assert found.history["accuracy"] == [0.0]
    assert found.history["loss"] == pytest.approx([math.log(2)])
    assert found.history["gradient_norm"] == [0.5]


@pytest.mark.parametrize(
    "margins", [[1000.0, 1000.0, 1001.0], [-1000.0, 1000.0, 0.0], [-1000.0, -1000.0], [1e300, -1e300], [3e38]]
)
def test_weights_of_huge_margins_are_finite_and_sum_to_one(margins):
    weights = example_weights(torch.tensor(margins, dtype=torch.float64))
    assert weights.isfinite().all()
    assert float(weights.sum()) == pytest.approx(1.0)


def test_weights_of_equally_large_margins_do_not_underflow():
    weights = example_weights(torch.tensor([1000.0, 1001.0]))
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-1)], dtype=torch.float64) / (1 + math.exp(-1)))


def test_the_loss_may_rise_on_the_way_to_a_separator():
    z = torch.tensor([[1.0, -1.0], [1.0, 4.0]])
    found = separate(z, "logistic", 1000.0, track=True)
    torch.testing.assert_close(separate(z, "logistic", 1000.0, 1).theta / 1000, torch.tensor([0.5, 0.75]).double())
    torch.testing.assert_close(found.theta / 1000, torch.tensor([1.0, 0.25]).double())
    assert found.history["loss"][1] == pytest.approx(1000 / 8, rel=0.01)


def test_pocket_keeps_the_best_iterate_of_data_that_are_not_separable():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 3, generator=generator)
    last, best = separate(z, max_iter=30, track=True), separate(z, max_iter=30, pocket=True)
    assert not last.separated
    assert float((z.double() @ best.theta > 0).double().mean()) == max(last.history["accuracy"])


def test_perceptron_adds_the_first_misclassified_example():
    z = torch.tensor([[1.0, 0.0], [-0.5, 1.0]])
    assert [t.tolist() for t in iterates(z, "perceptron", 1.0, 3)] == [[0.0, 0.0], [1.0, 0.0], [0.5, 1.0], [0.5, 1.0]]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"row of zeros.*row 1"):
        separate(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"finite numbers.*\(1, 2\)"):
        separate(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        separate(data(), gamma=0)
    with pytest.raises(ValueError, match="rule must be one of"):
        separate(data(), "svm")


@pytest.mark.parametrize("gamma", [0.1, 100.0])
def test_the_optimizer_takes_the_steps_of_separate(gamma):
    z = data(n=40, d=8, margin=0.01)
    theta = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = NormalizedLogisticGD([theta], lr=gamma)
    steps = 0
    while not bool((z @ theta > 0).all()):
        margins = optimizer.step(lambda: z @ theta)
        assert not margins.requires_grad
        steps += 1
    found = separate(z, "normalized", gamma)
    assert steps == found.iterations
    torch.testing.assert_close(theta.detach(), found.theta)
    assert theta.grad is None


def test_parameters_without_part_in_the_margins_are_not_touched():
    used, unused = nn.Parameter(torch.zeros(4, dtype=torch.float64)), nn.Parameter(torch.ones(3))
    used.grad = torch.full_like(used, 7.0)
    optimizer = NormalizedLogisticGD([used, unused])
    optimizer.step(lambda: data() @ used)
    assert torch.equal(unused, torch.ones(3))
    assert used.abs().max() > 0
    assert torch.equal(used.grad, torch.full_like(used, 7.0))


def test_margins_that_cannot_be_used_are_refused_with_the_reason():
    theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = NormalizedLogisticGD([theta])
    with pytest.raises(RuntimeError, match="graph"):
        optimizer.step(lambda: data() @ theta.detach())
    with pytest.raises(ValueError, match=r"vector.*shape \(\)"):
        optimizer.step(lambda: (data() @ theta).sum())
    with pytest.raises(FloatingPointError, match="20 margins are not finite"):
        optimizer.step(lambda: math.nan * (data() @ theta))
    with pytest.raises(FloatingPointError, match="gradient of parameter 0 of group 0"):
        optimizer.step(lambda: theta.sum().sqrt().reshape(1))
    assert torch.equal(theta, torch.zeros(4, dtype=torch.float64))


def step_on_parts(rank, folder):
    z = data(n=20, d=4, margin=0.01)
    theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = NormalizedLogisticGD([theta], lr=5.0, process_group=torch.distributed.group.WORLD)
    mine = z[:13] if rank == 0 else z[13:]
    for _ in range(3):
        optimizer.step(lambda: mine @ theta)
    before = theta.detach().clone()
    with pytest.raises(FloatingPointError, match="7 margins"):
        optimizer.step(lambda: (mine @ theta) * (math.nan if rank else 1))
    assert torch.equal(theta, before)
    torch.save(before, f"{folder}/{rank}.pt")


def test_data_spread_over_ranks_take_the_steps_of_all_data_together(tmp_path):
    run_ranks(step_on_parts, tmp_path)
    z = data(n=20, d=4, margin=0.01)
    whole = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = NormalizedLogisticGD([whole], lr=5.0)
    for _ in range(3):
        optimizer.step(lambda: z @ whole)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), whole.detach())
