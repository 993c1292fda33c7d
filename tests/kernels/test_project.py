from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.conftest import needs_library

from headway.kernels import library
from headway.kernels.project import (
    orthogonal_projections,
    orthogonal_projections_reference,
    project_orthogonal_,
    project_orthogonal_reference_,
)

SHAPES = [(2,), (7,), (33,), (3, 5), (33, 65), (100_003,), (2, 3, 5, 7)]
FUNCTIONS = [project_orthogonal_, project_orthogonal_reference_]


def lists(shapes=SHAPES, along=0.5, seed=0, layout=lambda x: x):
    """Gradients with a part `along` their weights (as a multiple) next to a random one."""
    generator = torch.Generator().manual_seed(seed)
    weights = [layout(torch.randn(shape, generator=generator)) for shape in shapes]
    grads = [layout(torch.randn(shape, generator=generator)) for shape in shapes]
    return [g + along * w for g, w in zip(grads, weights, strict=True)], weights


def cosine(g, w):
    g, w = g.double(), w.double()
    return (g * w).sum() / (g.norm() * w.norm())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("along", [0.0, 0.5, 3.0, 1e3, 1e5])
def test_native_equals_the_reference(instruction_set, renormalize, along):
    own, weights = lists(along=along)
    reference, _ = lists(along=along)
    project_orthogonal_(own, weights, renormalize=renormalize)
    project_orthogonal_reference_(reference, weights, renormalize=renormalize)
    for a, b in zip(own, reference, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("along", [0.0, 0.5, 3.0, 30.0, 1e3])
def test_the_result_is_orthogonal_to_the_weight(function, renormalize, along):
    grads, weights = lists(SHAPES[1:], along=along)
    function(grads, weights, renormalize=renormalize)
    for g, w in zip(grads, weights, strict=True):
        assert abs(cosine(g, w)) < 1e-6


@pytest.mark.parametrize("function", FUNCTIONS)
def test_equal_entries_leave_no_systematic_remainder(function):
    weight = torch.full((10_000,), 0.1)
    grad = torch.full((10_000,), 0.3)
    grad[::2] *= -1.7
    function([grad], [weight], renormalize=True)
    assert abs(cosine(grad, weight)) < 1e-6


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("along", [0.0, 0.5, 3.0, 1e3, 1e5])
def test_renormalize_keeps_the_norm(function, along):
    grads, weights = lists(along=along)
    norms = [g.double().norm() for g in grads]
    function(grads, weights, renormalize=True)
    for g, norm in zip(grads, norms, strict=True):
        torch.testing.assert_close(g.double().norm(), norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_parallel_gradient_becomes_zero(function, renormalize):
    _, weights = lists()
    grads = [1.7 * w for w in weights]
    function(grads, weights, renormalize=renormalize)
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1e15, 1e25])
def test_any_scale_of_weights_and_gradients(function, scale):
    shape = (1000,)
    grads, weights = lists([shape, shape])
    expected = [g.clone() for g in grads]
    project_orthogonal_reference_(expected, weights, renormalize=True)
    weights[0] *= max(scale, 1e-12)  # 1e-30 is added to w.w
    grads[1] *= scale
    function(grads, weights, renormalize=True)
    torch.testing.assert_close(grads[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1] / scale, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("renormalize", [False, True])
def test_zero_weights_and_zero_gradients_stay_as_they_are(function, renormalize):
    grads, weights = (
        [torch.randn(50), torch.zeros(50), torch.zeros(0)],
        [torch.zeros(50), torch.randn(50), torch.zeros(0)],
    )
    expected = [g.clone() for g in grads]
    function(grads, weights, renormalize=renormalize)
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=0)


@needs_library
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    threads, results = torch.get_num_threads(), []
    try:
        for most, count in itertools.product(("plain C", "AVX2", "AVX-512"), (1, 2, 5)):
            library.instruction_set(most)
            torch.set_num_threads(count)
            (grads, weights), (close, close_weights) = lists(), lists(along=100.0, seed=1)
            grads += close
            project_orthogonal_(grads, weights + close_weights, renormalize=True)
            results.append(grads)
    finally:
        library.instruction_set()
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_library
def test_a_tensor_does_not_depend_on_the_others():
    grads, weights = lists()
    alone, _ = lists()
    project_orthogonal_(grads, weights, renormalize=True)
    for g, w in zip(alone, weights, strict=True):
        project_orthogonal_([g], [w], renormalize=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, alone, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.double(),
    ],
    ids=["channels last", "permuted", "gaps", "float64"],
)
def test_other_layouts_and_dtypes(layout):
    shapes = [(2, 3, 5, 7), (4, 6, 3, 3)]
    own, weights = lists(shapes, layout=layout)
    plain, plain_weights = lists(shapes)
    project_orthogonal_(own, weights, renormalize=True)
    project_orthogonal_([layout(g) for g in plain], [layout(w) for w in plain_weights], renormalize=True)
    for g, w, p, q in zip(own, weights, plain, plain_weights, strict=True):
        assert abs(cosine(g, w)) < 1e-6
        project_orthogonal_([p], [q], renormalize=True)
        torch.testing.assert_close(g, layout(p), rtol=1e-5, atol=1e-6)


def test_gradient_in_another_order_of_dimensions_than_the_weight():
    (grad,), (weight,) = lists([(2, 3, 5, 7)])
    grad = grad.to(memory_format=torch.channels_last)
    project_orthogonal_([grad], [weight], renormalize=False)
    assert abs(cosine(grad, weight)) < 1e-6


def test_empty_lists():
    project_orthogonal_([], [], renormalize=True)


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        project_orthogonal_([torch.ones(2)], [], renormalize=True)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("along", [0.0, 0.5, 1e3, 1e5])
def test_projections_are_what_the_projection_does(instruction_set, renormalize, along):
    own, weights = lists(along=along)
    reference = orthogonal_projections_reference(own, weights, renormalize=renormalize)
    native = orthogonal_projections(own, weights, renormalize=renormalize)
    projected = [g.clone() for g in own]
    project_orthogonal_(projected, weights, renormalize=renormalize)
    for g, w, a, b, expected in zip(own, weights, native, reference, projected, strict=True):
        assert a.along == pytest.approx(b.along, rel=1e-6, abs=1e-6)
        assert a.scale == pytest.approx(b.scale, rel=1e-5)
        by_hand = (g.double() - a.along * w.double()) * a.scale
        assert (by_hand - expected.double()).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("function", [orthogonal_projections, orthogonal_projections_reference])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_its_projection(function, value):
    for shape in ((2,), (100_003,)):
        for weight in (torch.ones(shape), torch.zeros(shape), torch.full(shape, torch.inf)):
            grad = torch.ones(shape)
            grad[1] = value
            (bad,) = function([grad], [weight], renormalize=True)
            assert not torch.tensor(bad.along).isfinite()
    (large,) = function([torch.full((9,), 3e38)], [torch.ones(9)], renormalize=True)
    assert torch.tensor(large.along).isfinite()
