import itertools

import pytest
import torch

from headway.numerics.curvature import gradients_with_graph, hessian, hessian_diagonal, hvp, rademacher


def quadratic(seed=0, dtype=torch.float64):
    """A symmetric H, parameters of 3 and 2 x 2 entries, and the loss x^T H x / 2."""
    generator = torch.Generator().manual_seed(seed)
    H = torch.randn(7, 7, generator=generator, dtype=dtype)
    H = H + H.T
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((3,), (2, 2))]

    def closure():
        x = torch.cat([p.reshape(-1) for p in params])
        return x @ H @ x / 2

    return H, params, closure


def all_signs():
    for signs in itertools.product((-1.0, 1.0), repeat=7):
        z = torch.tensor(signs, dtype=torch.float64)
        yield [z[:3], z[3:].view(2, 2)]


def test_the_product_with_each_unit_vector_is_a_column_of_the_hessian():
    H, params, closure = quadratic()
    _, grads = gradients_with_graph(closure, params)
    for column, unit in zip(H.T, torch.eye(7, dtype=torch.float64), strict=True):
        products = hvp(grads, params, [unit[:3], unit[3:].view(2, 2)])
        torch.testing.assert_close(torch.cat([p.reshape(-1) for p in products]), column)


def test_the_dense_hessian_is_exact_and_symmetric_also_under_no_grad():
    H, params, closure = quadratic()
    with torch.no_grad():
        found = hessian(closure, params)
    torch.testing.assert_close(found, H)
    assert torch.equal(found, found.T)


def test_the_dense_hessian_has_zeros_for_linear_and_unused_parameters():
    x, linear, unused = (torch.nn.Parameter(torch.tensor([2.0])) for _ in range(3))
    found = hessian(lambda: (x.pow(3) + 5 * linear).sum(), [x, linear, unused])
    assert torch.equal(found, torch.diag(torch.tensor([12.0, 0.0, 0.0])))


def test_the_mean_over_all_sign_vectors_is_exactly_the_diagonal():
    H, params, closure = quadratic()
    _, grads = gradients_with_graph(closure, params)
    mean = hessian_diagonal(grads, params, list(all_signs()))
    torch.testing.assert_close(torch.cat([D.reshape(-1) for D in mean]), H.diagonal(), rtol=1e-12, atol=1e-12)


def test_the_variance_over_all_sign_vectors_is_the_squared_rest_of_the_row():
    H, params, closure = quadratic()
    _, grads = gradients_with_graph(closure, params)
    samples = []
    for z in all_signs():
        products = hvp(grads, params, z)
        samples.append(torch.cat([(a * b).reshape(-1) for a, b in zip(z, products, strict=True)]))
    expected = H.square().sum(1) - H.diagonal().square()
    torch.testing.assert_close(torch.stack(samples).var(0, correction=0), expected, rtol=1e-12, atol=1e-12)


def test_probes_are_fair_signs_of_the_generator_in_any_shape_and_dtype():
    z = rademacher(torch.zeros(100_000), torch.Generator().manual_seed(0))
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(z.mean())) < 0.01
    again = rademacher(torch.zeros(400, 250, dtype=torch.bfloat16), torch.Generator().manual_seed(0))
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.float().reshape(-1), z)
    other = rademacher(torch.zeros(100_000), torch.Generator().manual_seed(1))
    assert abs(float((z * other).mean())) < 0.01
    assert rademacher(torch.zeros(()), torch.Generator()).shape == ()
    assert rademacher(torch.zeros(0, 3), torch.Generator()).shape == (0, 3)


def test_gradients_without_graph_are_refused_with_the_remedy():
    x = torch.nn.Parameter(torch.ones(2))
    x.square().sum().backward()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        hvp([x.grad], [x], [torch.ones(2)])
    with pytest.raises(RuntimeError, match="without backward"):
        gradients_with_graph(lambda: torch.tensor(1.0), [x])
    with pytest.raises(RuntimeError, match="scalar"):
        hessian(lambda: x.square(), [x])


def test_constant_gradients_contribute_nothing():
    x, linear = torch.nn.Parameter(torch.tensor([2.0])), torch.nn.Parameter(torch.tensor([1.0]))
    _, grads = gradients_with_graph(lambda: (x.pow(3) + 5 * linear).sum(), [x, linear])
    assert [p.item() for p in hvp(grads, [x, linear], [torch.ones(1), torch.ones(1)])] == [12.0, 0.0]


def test_the_estimate_of_16_bit_parameters_is_float32():
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    _, grads = gradients_with_graph(lambda: x.pow(3).sum(), [x])
    (D,) = hessian_diagonal(grads, [x], [[rademacher(x, torch.Generator())]])
    assert D.dtype == torch.float32
    assert D.tolist() == [6.0, 12.0]
