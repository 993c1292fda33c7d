from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.conftest import needs_library

from headway.kernels import library
from headway.kernels.select import (
    clamp_magnitude_,
    clamp_magnitude_reference_,
    kth_largest_magnitude,
    kth_largest_magnitude_reference,
    largest_magnitudes,
    largest_magnitudes_reference,
)

SAMPLE = 2**16  # of the native selection: up to so many elements are all looked at

KINDS = {
    "normal": lambda x: x,
    "rounded": lambda x: x.round(),
    "all equal": lambda x: x * 0 - 2.5,
    "all zero": lambda x: x * 0,
    "half zero": lambda x: x.clamp(min=0),
    "many decades": lambda x: x.exp() ** 8,
    "one column large": lambda x: torch.where(torch.arange(x.numel()) % 512 == 0, x * 1e3, x),
    "sorted": lambda x: x.sort().values,
    "subnormal": lambda x: x * 1e-40,
    "up to infinity": lambda x: torch.where(x > 2, torch.inf, x),
}


def draw(kind: str, count: int) -> torch.Tensor:
    return KINDS[kind](torch.randn(count, generator=torch.Generator().manual_seed(0)))


def parts_of(x: torch.Tensor) -> list[torch.Tensor]:
    """The elements of x in tensors of several sizes, one of them empty."""
    count = x.numel()
    return [x[: count // 3], x[:0], x[count // 3 : count // 2], x[count // 2 :]]


def ranks(count: int) -> set[int]:
    return {k for k in (1, 2, count // 1000, count // 10, count // 2, count - 3, count) if 1 <= k <= count}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 17, 5000, SAMPLE, SAMPLE + 1, 300_000])
def test_equals_sorting(kind, count):
    x = draw(kind, count)
    ordered = x.abs().sort(descending=True).values
    for k in ranks(count):
        assert kth_largest_magnitude(parts_of(x), k) == ordered[k - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_sorting(kind):
    x = draw(kind, 5000)
    ordered = x.abs().sort(descending=True).values
    for k in ranks(5000):
        assert kth_largest_magnitude_reference(parts_of(x), k) == ordered[k - 1]
        assert kth_largest_magnitude([x.double()], k) == ordered[k - 1]


def test_native_on_every_instruction_set(instruction_set):
    for count in (SAMPLE + 1, SAMPLE + 100_003):
        x = draw("normal", count)
        ordered = x.abs().sort(descending=True).values
        for k in ranks(count):
            assert kth_largest_magnitude([x], k) == ordered[k - 1]


@pytest.mark.parametrize("value", [7e30, float("inf"), float("nan")])
def test_the_largest_is_seen_wherever_it_is(instruction_set, value):
    for count in (9, SAMPLE + 100_003):
        for place in (0, count // 2, count - 1):
            x = draw("normal", count)
            x[place] = -value
            found = largest_magnitudes(parts_of(x), 5)
            assert found == pytest.approx(largest_magnitudes_reference(parts_of(x), 5), rel=0, abs=0, nan_ok=True)
            assert found[1] == pytest.approx(torch.tensor(value).item(), rel=0, abs=0, nan_ok=True)


def places_of_sample(total: int) -> torch.Tensor:
    """Where native/select.c looks: one place in each of SAMPLE equal parts."""
    bounds = [int(total / SAMPLE * index) for index in range(SAMPLE + 1)]
    return torch.tensor(
        [
            low + ((index * 2654435761 % 2**32) * (high - low) >> 32) if high > low + 1 else low
            for index, (low, high) in enumerate(itertools.pairwise(bounds))
        ]
    )


@needs_library
@pytest.mark.parametrize("misleading", [0.0, 1e3], ids=["too small", "too large"])
def test_exact_where_the_sample_misleads(misleading):
    total = 5 * SAMPLE + 7
    x = draw("normal", total)
    x[places_of_sample(total)] = misleading
    ordered = x.abs().sort(descending=True).values
    for k in (1, total // 100, total // 2, total - SAMPLE - 1, total):
        assert kth_largest_magnitude([x], k) == ordered[k - 1]


@needs_library
def test_number_of_threads_changes_nothing():
    x, threads = draw("normal", 300_000), torch.get_num_threads()
    try:
        found = set()
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.add(kth_largest_magnitude(parts_of(x), 1234))
        assert len(found) == 1
    finally:
        torch.set_num_threads(threads)


def test_gaps_and_other_orders_of_dimensions():
    x = draw("normal", 2400).view(2, 20, 6, 10)
    for view in (x[:, ::2], x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x.mT):
        ordered = view.abs().flatten().sort(descending=True).values
        assert kth_largest_magnitude([view, x[0, 0, 0, :0]], 100) == ordered[99]


def test_parameters_that_require_grad():
    parameter = torch.nn.Parameter(draw("normal", 100))
    assert kth_largest_magnitude([parameter], 1) == parameter.abs().max().item()


@pytest.mark.parametrize("k", [0, -1, 4])
def test_ranks_that_do_not_exist_are_refused(k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\], got {k}"):
        kth_largest_magnitude([torch.ones(3)], k)


def test_nothing_to_select_from_is_refused():
    with pytest.raises(ValueError, match="k must be in"):
        kth_largest_magnitude([], 1)


@pytest.mark.parametrize("function", [clamp_magnitude_, clamp_magnitude_reference_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clamp_keeps_signs_and_small_values(function, dtype):
    x = torch.tensor([3.0, -2.0, 0.5, -0.5, 0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    expected = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 1.0, -1.0, 1.0, -1.0, torch.nan], dtype=dtype)
    function([x], 1.0)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_clamp_native_on_every_instruction_set(instruction_set):
    shapes = [(), (0,), (7,), (33, 65), (100_003,)]
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(shape, generator=generator) for shape in shapes]
    own.append(torch.randn(2, 3, 5, 7, generator=generator).to(memory_format=torch.channels_last))
    own.append(torch.randn(6, 8, generator=generator)[:, ::2])
    reference = [x.clone() for x in own]
    clamp_magnitude_(own, 0.7)
    clamp_magnitude_reference_(reference, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(own, reference, strict=True))


def test_clamp_of_nothing():
    clamp_magnitude_([], 1.0)
    clamp_magnitude_reference_([], 1.0)


@needs_library
def test_autograd_sees_that_a_saved_tensor_was_clamped():
    x = torch.randn(3)
    version = x._version
    clamp_magnitude_([x], 0.1)
    assert library.takes(x)
    assert x._version > version
