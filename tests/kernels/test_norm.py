from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.conftest import needs_library

from headway.kernels import library
from headway.kernels.norm import squared_norms, squared_norms_reference

SHAPES = [(), (1,), (7,), (0,), (33, 65), (100_003,)]


def draw(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e25])
def test_native_is_exact_at_every_scale(instruction_set, scale):
    expected = torch.stack([x.double().square().sum() for x in draw(scale)])
    torch.testing.assert_close(squared_norms(draw(scale)), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("layout", [lambda x: x, torch.Tensor.double, lambda x: torch.cat([x, x], -1)[..., ::2]])
def test_equals_the_reference(layout):
    tensors = [layout(x) for x in draw() if x.ndim]
    torch.testing.assert_close(squared_norms(tensors), squared_norms_reference(tensors), rtol=3e-6, atol=0)


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite_exactly_where_the_tensor_is(value):
    for place in (0, 50_001, 100_002):
        tensors = [torch.full((5,), 3e38), torch.full((100_003,), 3e38)]
        assert squared_norms(tensors).isfinite().all()
        tensors[1][place] = value
        assert squared_norms(tensors).isfinite().tolist() == [True, False]


@needs_library
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    threads, results = torch.get_num_threads(), []
    try:
        for most, count in itertools.product(("plain C", "AVX2", "AVX-512"), (1, 2, 5)):
            library.instruction_set(most)
            torch.set_num_threads(count)
            results.append(squared_norms(draw()))
    finally:
        library.instruction_set()
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
