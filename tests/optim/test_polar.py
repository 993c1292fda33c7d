import pytest
import torch

from headway.optim.polar import polar_factor


def matrix(m, n, smallest=1e-2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=dtype)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=dtype)).Q
    return (U * torch.logspace(0, torch.tensor(smallest).log10().item(), k, dtype=dtype)) @ V.T, U @ V.T


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize(("method", "steps"), [("svd", 1), ("ns", 30)])
def test_it_is_the_product_of_the_singular_vectors(shape, method, steps):
    A, expected = matrix(*shape)
    torch.testing.assert_close(polar_factor(A, method, steps), expected, rtol=0, atol=1e-6)


def test_many_steps_agree_with_the_svd_at_condition_number_1000():
    A, expected = matrix(8, 12, smallest=2e-3)
    torch.testing.assert_close(polar_factor(A, steps=30), expected, rtol=0, atol=1e-6)


def test_a_small_singular_value_grows_by_half_a_step():
    A = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    values = [torch.linalg.svdvals(polar_factor(A, steps=steps))[1].item() for steps in (9, 10)]
    assert values[1] / values[0] == pytest.approx(1.5, rel=1e-6)
    assert values[1] == pytest.approx(1.5**10 * 1e-6, rel=1e-6)


@pytest.mark.parametrize("beta", [0.4, 0.6])
def test_other_coefficients_only_scale_the_factor(beta):
    A, expected = matrix(5, 7)
    P = polar_factor(A, steps=200, beta=beta)
    torch.testing.assert_close(P, (3 - 1 / beta) ** 0.5 * expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [1 / 3, 2 / 3, 0.8])
def test_a_coefficient_that_does_not_converge_is_refused(beta):
    with pytest.raises(ValueError, match=r"beta must be in \(0.333333, 0.666667\)"):
        polar_factor(torch.eye(2), beta=beta)


@pytest.mark.parametrize("method", ["svd", "ns"])
def test_missing_rank_gives_the_partial_isometry(method):
    A = torch.tensor([[1.0, 2.0, 2.0], [2.0, 4.0, 4.0]], dtype=torch.float64)
    P = polar_factor(A, method, 40)
    torch.testing.assert_close(P, A / A.norm(), rtol=0, atol=1e-6)
    assert torch.equal(polar_factor(torch.zeros(2, 3), method), torch.zeros(2, 3))


@pytest.mark.parametrize("n", [8, 11, 13, 20])  # on both sides of 3/2 k, where the iteration changes its form
@pytest.mark.parametrize("beta", [0.5, 0.4])
def test_few_steps_are_the_scalar_iteration_on_singular_values(n, beta):
    A, _ = matrix(8, n)
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = beta * (3 - s**2) * s
    torch.testing.assert_close(polar_factor(A, steps=5, beta=beta), (U * s) @ Vh, rtol=0, atol=1e-12)


def test_a_batch_is_its_matrices():
    A = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in ("svd", "ns"):
        together = polar_factor(A, method)
        for i in range(3):
            torch.testing.assert_close(together[i], polar_factor(A[i], method))


def test_the_factor_of_the_transpose_is_the_transpose():
    A, _ = matrix(5, 8)
    for method in ("svd", "ns"):
        torch.testing.assert_close(polar_factor(A.T, method), polar_factor(A, method).T)
