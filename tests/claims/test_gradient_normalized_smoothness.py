import pytest
import torch

from headway.claims.gradient_normalized_smoothness import Problem, claim, gradient_descent, minimise


@pytest.fixture(scope="module")
def outcome():
    return claim(problems=1)


def test_claim_holds_on_one_problem(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []
    assert outcome.holds


def test_the_minimum_is_at_zero():
    for mu in (1.0, 0.1):
        _, g = Problem.draw(4, mu)(torch.zeros(60, dtype=torch.float64))
        assert float(g.abs().max()) < 1e-14


def test_exact_curvature_is_the_second_derivative():
    problem = Problem.draw(1, 0.5, rows=12, columns=4)
    x = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=torch.float64)
    f = lambda x: problem.mu * torch.logsumexp((problem.A @ x - problem.b) / problem.mu, 0)  # noqa: E731
    assert torch.allclose(problem.exact(x), torch.autograd.functional.hessian(f, x), rtol=0, atol=1e-12)
    assert float(torch.linalg.eigvalsh(problem.gauss_newton(x) - problem.exact(x)).min()) > -1e-12


def test_claim_fails_without_curvature():
    outcome = claim(problems=1, use_curvature=False)
    assert [check.holds for check in outcome.checks[:4]] == [False] * 4
    assert not outcome.checks[-1].holds


def test_gradient_descent_is_slower_than_linear():
    errors, done = gradient_descent(Problem.draw(0, 0.1), max_iter=1000)
    assert not done
    assert errors[1000] / errors[500] > errors[500] / errors[0]


def test_claim_is_a_function_of_its_seed_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    first, second, other = (minimise(Problem.draw(seed, 1.0), None, max_iter=5)[0] for seed in (3, 3, 4))
    assert first == second != other
    claim(problems=1)
    assert torch.get_num_threads() == threads


def test_panels_show_the_three_curves(outcome):
    for panel in outcome.panels:
        assert list(panel.curves) == ["exact Hessian", "weighted Gauss-Newton", "gradient descent"]
        assert all(len(x) == len(y) for x, y in panel.curves.values())
