import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.optim.damped_solve import DampedSystem, LinearOperator, LowRank, Metric, conjugate_gradients

D = 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(seed=1):
    M = normal(D, D, seed=seed)
    return M @ M.mT + 0.1 * torch.eye(D, dtype=M.dtype)


@given(rank=st.integers(1, 8), exponent=st.integers(-6, 3), seed=st.integers(0, 10), metric=st.booleans())
@settings(max_examples=40, deadline=None)
def test_woodbury_equals_cholesky_equals_cg(rank, exponent, seed, metric):
    weights = normal(rank, seed=seed + 1).abs()
    H, g, damping = LowRank(normal(D, rank, seed=seed), weights), normal(D, seed=2), 10.0**exponent
    B = Metric(spd() if metric else None)
    expected = torch.linalg.solve(H.dense() + damping * (torch.eye(D, dtype=g.dtype) if B.B is None else B.B), g)
    scale = float(expected.norm())
    for solver in ("woodbury", "cholesky", "cg"):
        solution = DampedSystem(H, B, D, solver, cg_tol=1e-14).solve(g, damping)
        assert torch.allclose(solution, expected, rtol=0, atol=1e-8 * scale), solver


@pytest.mark.parametrize("C", [None, normal(2).abs(), spd()[:2, :2]])
def test_forms_of_the_core_agree(C):
    H = LowRank(normal(D, 2), C)
    v = normal(D, seed=3)
    assert torch.allclose(H.dense(), H.U @ H.core() @ H.U.mT)
    assert torch.allclose(H.matvec(v), H.dense() @ v)
    dense = DampedSystem(H.dense(), Metric(), D).solve(v, 0.3)
    assert torch.allclose(DampedSystem(H, Metric(), D).solve(v, 0.3), dense, rtol=0, atol=1e-10)
    operator = LinearOperator(H.matvec)
    assert torch.allclose(DampedSystem(operator, Metric(), D, cg_tol=1e-13).solve(v, 0.3), dense, rtol=0, atol=1e-10)


def test_rank_one_equals_cholesky_to_ten_digits():
    H, g = LowRank(normal(D, 1), torch.tensor([5.0], dtype=torch.float64)), normal(D, seed=4)
    for damping in (1e-3, 1.0, 1e3):
        woodbury, cholesky = (DampedSystem(H, Metric(spd()), D, s).solve(g, damping) for s in ("woodbury", "cholesky"))
        assert float((woodbury - cholesky).norm() / cholesky.norm()) < 1e-10


@pytest.mark.parametrize("solver", ["cholesky", "woodbury", "cg"])
def test_a_matrix_that_is_not_positive_definite_has_no_solution(solver):
    H = LowRank(normal(D, 1), torch.tensor([-1.0], dtype=torch.float64))
    below, above = 0.5 * float(H.U.norm() ** 2), 2 * float(H.U.norm() ** 2)
    g = H.U[:, 0]
    assert DampedSystem(H, Metric(), D, solver).solve(g, below) is None
    assert DampedSystem(H, Metric(), D, solver).solve(g, above) is not None


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_nan_has_no_solution(solver):
    H = torch.full((D, D), float("nan"), dtype=torch.float64)
    assert DampedSystem(H, Metric(), D, solver).solve(normal(D), 1.0) is None


def test_without_curvature_the_metric_alone_is_solved():
    B, g = spd(), normal(D)
    assert torch.allclose(DampedSystem(None, Metric(B), D).solve(g, 0.5), torch.linalg.solve(B, g) / 0.5)
    assert torch.equal(DampedSystem(None, Metric(), D).solve(g, 0.5), g / 0.5)


def test_metric_measures_by_the_definition():
    B, g = spd(), normal(D)
    metric = Metric(B)
    assert float(metric.norm(g)) == pytest.approx(float((g @ B @ g).sqrt()))
    assert float(metric.dual_norm(g)) == pytest.approx(float((g @ torch.linalg.inv(B) @ g).sqrt()))
    assert torch.allclose(metric.inverse(metric.times(g)), g)


def test_cg_stops_at_its_tolerance_and_at_its_limit():
    A, b = torch.diag(torch.linspace(1, 4, 40, dtype=torch.float64)), normal(40)
    x = conjugate_gradients(lambda v: A @ v, b, rtol=1e-3)
    assert 1e-12 < float((A @ x - b).norm() / b.norm()) <= 1e-3
    assert torch.equal(conjugate_gradients(lambda v: A @ v, b, max_iter=0), torch.zeros_like(b))
    exact = conjugate_gradients(lambda v: A @ v, b, rtol=1e-12, max_iter=1, precondition=torch.linalg.inv(A).mv)
    assert torch.allclose(A @ exact, b)
    assert torch.equal(conjugate_gradients(lambda v: A @ v, torch.zeros_like(b)), torch.zeros_like(b))


@pytest.mark.parametrize(
    ("H", "arguments", "message"),
    [
        (torch.ones(2, 3), {}, "H must be a square matrix, got shape (2, 3)"),
        ("exact", {}, "H must be a square matrix, got 'exact'"),
        (torch.eye(3), {}, "H must be of shape (2, 2), got (3, 3)"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), {"symmetric_to": 0.0}, "H must be symmetric"),
        (LowRank(torch.ones(3, 1)), {}, "U must be of shape (2, r), got (3, 1)"),
        (LowRank(torch.ones(2, 1), torch.ones(2)), {}, "C must be of shape (1,), got (2,)"),
        (LowRank(torch.ones(2, 1), torch.ones(2, 2)), {}, "C must be of shape (1, 1), got (2, 2)"),
        (torch.eye(2), {"solver": "woodbury"}, "solver must be 'cholesky' or 'cg' for a dense H, got 'woodbury'"),
        (
            LinearOperator(lambda v: v),
            {"solver": "cholesky"},
            "solver must be 'cg' for a LinearOperator, got 'cholesky'",
        ),
        (None, {"solver": "lu"}, "solver must be one of 'cholesky', 'woodbury', 'cg' or None, got 'lu'"),
    ],
)
def test_refuses(H, arguments, message):
    with pytest.raises(ValueError) as caught:
        DampedSystem(H, Metric(), 2, **arguments)
    assert str(caught.value) == message


def test_rounding_is_not_asymmetry():
    noise = 1e-17 * normal(D, D)
    with pytest.raises(ValueError, match="H must be symmetric"):
        DampedSystem(noise, Metric(), D, symmetric_to=0.0)
    DampedSystem(noise, Metric(), D, symmetric_to=1.0)
    DampedSystem(noise, Metric(), D)


@pytest.mark.parametrize(
    ("B", "message"),
    [
        (torch.diag(torch.tensor([1.0, -1.0])), "B must be positive definite"),
        (torch.tensor([[2.0, 1.0], [0.0, 2.0]]), "B must be symmetric"),
        (torch.ones(2), "B must be a square matrix, got shape (2,)"),
    ],
)
def test_metric_refuses(B, message):
    with pytest.raises(ValueError) as caught:
        Metric(B)
    assert str(caught.value) == message
