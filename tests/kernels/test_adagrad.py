from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.conftest import needs_library

from headway.kernels import library
from headway.kernels.adagrad import adagrad_, adagrad_reference_

SHAPES = [(), (1,), (7,), (0,), (33, 65), (100_003,)]
OPTIONS = {
    "plain": {"point_step": 0.1},
    "averaged": {"x_step": 0.1, "mix": 0.2},
    "mixed from the other end": {"x_step": 0.1, "mix": 0.7},
    "all": {"weight": 4.0, "floor": 1e-19, "decay": 0.1, "point_step": 0.05, "x_step": 0.1, "mix": 0.4},
    "eps": {"eps": 0.1, "point_step": 0.1},
}


def run(function, name, diagonal, two, layout=lambda x: x, shapes=SHAPES):
    """points, xs and sums after a step."""
    generator = torch.Generator().manual_seed(0)
    points, grads, xs, sums = ([layout(torch.rand(s, generator=generator) + 0.5) for s in shapes] for _ in range(4))
    inverses = torch.rand(len(shapes), generator=generator, dtype=torch.float64)
    kept = [g.clone() for g in grads]
    function(
        points, grads, xs if two else None, sums if diagonal else None, None if diagonal else inverses, **OPTIONS[name]
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    return points + xs + sums


@pytest.mark.parametrize("two", [False, True], ids=["one sequence", "two sequences"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["one sum", "a sum per entry"])
@pytest.mark.parametrize("name", OPTIONS)
def test_native_equals_the_reference(instruction_set, name, diagonal, two):
    native = run(adagrad_, name, diagonal, two)
    for own, other in zip(native, run(adagrad_reference_, name, diagonal, two), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=5e-7)


@needs_library
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    threads, results = torch.get_num_threads(), []
    try:
        for most, count in itertools.product(("plain C", "AVX2", "AVX-512"), (1, 2, 5)):
            library.instruction_set(most)
            torch.set_num_threads(count)
            results.append(run(adagrad_, "all", True, True))
    finally:
        library.instruction_set()
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("layout", [torch.Tensor.double, lambda x: torch.cat([x, x], -1)[..., ::2]])
@pytest.mark.parametrize("diagonal", [False, True])
def test_other_tensors_go_to_the_reference(diagonal, layout):
    shapes = [(3, 5), (7,)]
    own = run(adagrad_, "all", diagonal, True, layout, shapes)
    reference = run(adagrad_reference_, "all", diagonal, True, layout, shapes)
    assert all(torch.equal(a, b) for a, b in zip(own, reference, strict=True))


def test_where_nothing_was_summed_nothing_moves():
    p = torch.ones(20)
    adagrad_([p], [torch.zeros(20)], sums=[torch.zeros(20)], floor=1e-19, point_step=1.0)
    assert torch.equal(p, torch.ones(20))


def test_one_number_per_tensor_is_asked_for():
    with pytest.raises(ValueError, match=r"inverses must have shape \(1,\) without sums"):
        adagrad_([torch.ones(2)], [torch.ones(2)], point_step=1.0)


def test_autograd_sees_that_a_saved_point_changed():
    p = torch.nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    with torch.no_grad():
        adagrad_([p], [torch.ones(3)], sums=[torch.ones(3)], point_step=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_lists():
    adagrad_([], [], sums=[])
