from __future__ import annotations

import pytest
import torch

from headway.kernels.finite import first_nonfinite, first_nonfinite_reference

VALUES = [float("nan"), float("inf"), -float("inf")]


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5,), (0,), (), (3, 100), (70_001,), (2, 3, 5, 7)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("function", [first_nonfinite, first_nonfinite_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", VALUES)
def test_every_place_is_looked_at(function, dtype, value):
    for index, position in [(0, 0), (0, 4), (2, 0), (3, 299), (4, 0), (4, 32_768), (4, 70_000), (5, 101)]:
        own = tensors(dtype)
        own[index].view(-1)[position] = value
        assert function(own) == index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", VALUES)
def test_native_on_every_instruction_set(instruction_set, dtype, value):
    own = tensors(dtype)
    assert first_nonfinite(own) is None
    for length in range(1, 70):
        x = torch.zeros(length, dtype=dtype)
        x[length // 2] = value
        assert first_nonfinite([torch.ones(3, dtype=dtype), x]) == 1


@pytest.mark.parametrize("function", [first_nonfinite, first_nonfinite_reference])
def test_the_largest_and_smallest_numbers_are_finite(function):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        limits = torch.finfo(dtype)
        own = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -0.0, 0.0], dtype=dtype)
        assert function([own]) is None


@pytest.mark.parametrize("function", [first_nonfinite, first_nonfinite_reference])
def test_the_first_of_several_is_named(function):
    own = tensors()
    own[5][0, 0, 0, 0] = float("nan")
    own[4][69_000] = float("inf")
    own[3][2, 2] = float("nan")
    assert function(own) == 3


def test_the_first_is_named_whatever_its_kind():
    nan = float("nan")
    strided = torch.full((3, 4), nan)[:, ::2]
    kinds = [torch.full((2,), nan), torch.full((2,), nan, dtype=torch.float64), strided, strided.t()]
    for first in range(len(kinds)):
        own = [torch.ones_like(x) if index < first else x for index, x in enumerate(kinds)]
        assert first_nonfinite(own) == first


def test_gaps_in_a_tensor_are_not_looked_at():
    x = torch.full((3, 4), float("nan"))
    x[:, ::2] = 1
    assert first_nonfinite([x[:, ::2]]) is None
    assert first_nonfinite([torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)]) is None


@pytest.mark.parametrize("function", [first_nonfinite, first_nonfinite_reference])
def test_nothing_is_finite(function):
    assert function([]) is None
    assert function([torch.zeros(0)]) is None
