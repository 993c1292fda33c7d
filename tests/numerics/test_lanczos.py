import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.numerics.lanczos import lanczos, slq


def symmetric(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (A + A.T) / 2


def start(n: int, seed: int = 1) -> torch.Tensor:
    v = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 12), seed=st.integers(0, 1000))
def test_weights_are_not_negative_and_sum_to_one_and_extremes_lie_inside(n, m, seed):
    A = symmetric(n, seed)
    spectrum = slq(A.mv, n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(A)
    assert bool((spectrum.weights >= 0).all())
    assert float(spectrum.weights.sum()) == pytest.approx(1, abs=1e-12)
    slack = 1e-10 * float(eigenvalues.abs().max())
    assert eigenvalues[0] - slack <= spectrum.lam_min <= spectrum.lam_max <= eigenvalues[-1] + slack
    assert bool((spectrum.ritz.diff() >= 0).all())


@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_first_2m_minus_1_moments_are_exact_and_the_next_is_not(m):
    A, v = symmetric(40) / 5, start(40)
    spectrum = slq(A.mv, 40, m, v0=v)
    for k in range(2 * m):
        assert spectrum.moments(k) == pytest.approx(float(v @ torch.linalg.matrix_power(A, k) @ v), abs=1e-10)
    assert abs(spectrum.moments(2 * m) - float(v @ torch.linalg.matrix_power(A, 2 * m) @ v)) > 1e-6


def test_the_spectrum_is_exact_when_m_is_n():
    A = symmetric(25)
    torch.testing.assert_close(slq(A.mv, 25, 25, v0=start(25)).ritz, torch.linalg.eigvalsh(A), rtol=1e-10, atol=1e-10)


def test_more_steps_than_dimensions_end_at_n():
    assert len(lanczos(symmetric(6).mv, 6, 50, v0=start(6)).alpha) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_distinct_eigenvalues_end_it_after_k_steps(k, dtype):
    diagonal = torch.arange(1, k + 1, dtype=dtype).repeat(20)
    alpha, beta, V = lanczos(lambda v: diagonal * v, len(diagonal), 15, dtype=dtype)
    assert (len(alpha), len(beta), len(V)) == (k, k - 1, k)
    spectrum = slq(lambda v: diagonal * v, len(diagonal), 15, dtype=dtype)
    torch.testing.assert_close(spectrum.ritz, torch.arange(1.0, k + 1, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_zero_operator_has_one_ritz_value():
    spectrum = slq(torch.zeros_like, 8)
    assert spectrum.ritz.tolist() == [0.0]
    assert spectrum.weights.tolist() == pytest.approx([1.0])


def test_an_operator_with_a_zero_diagonal_does_not_end_early():
    A = torch.tensor([[0.0, 1e-3], [1e-3, 0.0]], dtype=torch.float64)
    spectrum = slq(A.mv, 2, v0=torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert spectrum.ritz.tolist() == pytest.approx([-1e-3, 1e-3])


def test_the_basis_is_orthonormal_and_makes_the_operator_tridiagonal():
    A = symmetric(50)
    alpha, beta, V = lanczos(A.mv, 50, 30, v0=start(50))
    torch.testing.assert_close(V @ V.T, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-13)
    T = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
    torch.testing.assert_close(V @ A @ V.T, T, rtol=0, atol=1e-12)


def test_without_re_orthogonalisation_ghosts_appear_and_with_it_none_do():
    # One eigenvalue far from the rest converges at once and comes back.
    diagonal = torch.linspace(0, 1, 200)
    diagonal[-1] = 100
    found = {}
    for reorth in (True, False):
        alpha, beta, _ = lanczos(lambda v: diagonal * v, 200, 60, reorth=reorth)
        theta = torch.linalg.eigvalsh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
        found[reorth] = int((theta > 99).sum())
    assert found[True] == 1
    assert found[False] > 1


def test_the_recurrence_equals_full_re_orthogonalisation_for_few_steps():
    A = symmetric(50)
    full, short = (lanczos(A.mv, 50, 6, v0=start(50), reorth=reorth) for reorth in (True, False))
    torch.testing.assert_close(full[:2], short[:2], rtol=0, atol=1e-12)
    assert short.V is None


def test_float32_finds_the_extremes_to_single_precision():
    A = symmetric(100)
    A[0, 0] += 40
    spectrum = slq(A.float().mv, 100, 30)
    assert spectrum.lam_max == pytest.approx(float(torch.linalg.eigvalsh(A)[-1]), rel=1e-5)
    assert spectrum.ritz.dtype == torch.float64


def test_the_mean_over_probes_estimates_the_trace():
    A = symmetric(200) + 2 * torch.eye(200, dtype=torch.float64)
    spectrum = slq(A.mv, 200, 10, probes=40, dtype=torch.float64)
    assert spectrum.weights.sum() == pytest.approx(1)
    assert spectrum.moments(1) == pytest.approx(float(A.trace()) / 200, rel=0.1)
    assert len(spectrum.ritz) == 400


def test_equal_generators_give_equal_spectra_and_the_global_one_is_not_used():
    A, before = symmetric(20, dtype=torch.float32), torch.get_rng_state()
    first, again, other = (slq(A.mv, 20, 5, generator=torch.Generator().manual_seed(s)).ritz for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(slq(A.mv, 20, 5).ritz, slq(A.mv, 20, 5).ritz)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_16_bit_start_vector_is_widened():
    seen = []
    lanczos(lambda v: seen.append(v.dtype) or v, 4, 1, v0=torch.ones(4, dtype=torch.bfloat16))
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be a whole number >= 1, got 0"),
        ({"m": 0}, "m must be a whole number >= 1, got 0"),
        ({"probes": 0}, "probes must be a whole number >= 1, got 0"),
        ({"probes": 2, "v0": torch.ones(4)}, "probes must be 1 when v0 is given, got 2"),
        ({"v0": torch.ones(3)}, r"v0 must have the shape \(4,\), got \(3,\)"),
        ({"v0": torch.zeros(4)}, "v0 must have a finite length > 0, got 0"),
        ({"dtype": torch.bfloat16}, r"dtype must be torch.float32 or torch.float64, got torch.bfloat16"),
    ],
    ids=["n", "m", "probes", "probes-with-v0", "shape", "zero", "16-bit"],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        slq(**{"matvec": torch.clone, "n": 4, "m": 2, **arguments})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_product_that_is_not_finite_is_refused(value):
    with pytest.raises(FloatingPointError, match="product 1 is not finite"):
        lanczos(lambda v: torch.full_like(v, value), 4, 2)
