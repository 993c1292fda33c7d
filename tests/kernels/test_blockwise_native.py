from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.conftest import needs_library

from headway.kernels import blockwise, library
from headway.kernels.blockwise import (
    adam8_,
    adam8_reference_,
    create_dynamic_map,
    dequantize_blockwise,
    dequantize_blockwise_reference,
    quantize_blockwise,
    quantize_blockwise_reference,
)

RULE = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
OPTIONS = {
    "bare": {},
    "decay": {"decay_before": 0.99, "decay_after": 0.98},
    "l2, maximize": {"l2": 0.1, "maximize": True},
}
SHAPES = [(1,), (7,), (33, 65), (0,), (), (100_003,)]


def edges(signed: bool) -> torch.Tensor:
    """Where codes change: midpoints and map values with their neighbours, zeros, and the smallest numbers; and 1."""
    points = torch.cat([create_dynamic_map(signed), blockwise._midpoints(signed)])
    above, below = torch.tensor(2.0), torch.tensor(-2.0)
    small = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1.4e-45, -1.4e-45])
    around = [points, torch.nextafter(points, above), torch.nextafter(points, below), small]
    return torch.cat([torch.ones(1), torch.cat(around).clamp(-1, 1)])


def numbers(kind: str, signed: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(100_003, generator=generator)
    made = {
        "edges": edges(signed),
        "normal": normal,
        "decades": normal * 10 ** (torch.rand(100_003, generator=generator) * 9 - 9),
        "squares": normal.square(),
        "zeros": torch.zeros(1000),
        "zero blocks": torch.where(torch.arange(100_003) % 1024 < 512, 0.0, normal),
        "subnormal": normal[:1000] * 1e-41,
        "not a number": torch.where(torch.arange(1000) % 300 == 7, torch.nan, normal[:1000]),
        "infinite": torch.where(torch.arange(1000) % 300 == 7, torch.inf, normal[:1000]),
    }
    return made[kind]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["edges", "normal", "decades", "squares", "zeros", "zero blocks", "subnormal", "not a number", "infinite"],
)
def test_codes_are_the_reference_to_the_bit(instruction_set, kind, signed):
    x = numbers(kind, signed)
    for block_size in (256, 1, 7, 2048, 10**6):
        codes, absmax = quantize_blockwise(x, signed, block_size)
        expected_codes, expected_absmax = quantize_blockwise_reference(x, signed, block_size)
        assert torch.equal(codes, expected_codes)
        torch.testing.assert_close(absmax, expected_absmax, rtol=0, atol=0, equal_nan=True)
        numbers_back = dequantize_blockwise(codes, absmax, signed, block_size)
        expected = dequantize_blockwise_reference(codes, absmax, signed, block_size)
        torch.testing.assert_close(numbers_back, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts_are_the_reference_to_the_bit(dtype):
    x = numbers("normal")[:720].view(2, 3, 12, 10).to(dtype)
    for view in (x, x.mT, x.to(memory_format=torch.channels_last), x[..., ::2], x[0, 0, 0, 0], x[:0]):
        own, reference = quantize_blockwise(view, block_size=64), quantize_blockwise_reference(view, block_size=64)
        assert all(torch.equal(a, b) for a, b in zip(own, reference, strict=True))
        back = dequantize_blockwise(*own, block_size=64, dtype=dtype)
        assert back.dtype == dtype
        assert torch.equal(back, dequantize_blockwise_reference(*own, block_size=64, dtype=dtype))


def test_codes_with_gaps_are_dequantised():
    codes, absmax = torch.arange(256, dtype=torch.uint8), torch.rand(8).add(0.5)
    own = dequantize_blockwise(codes[::2], absmax[::2], block_size=32)
    assert torch.equal(own, dequantize_blockwise_reference(codes[::2], absmax[::2], block_size=32))


def lists(shapes=SHAPES, dtype=torch.float32, block_size=256, sign=1.0):
    """params, grads, codes and scales, without cancellation in the rule's sums so that rounding stays rounding."""
    generator = torch.Generator().manual_seed(0)
    made: list[list[torch.Tensor]] = [[] for _ in range(6)]
    for shape in shapes:
        p, g, m, v = (torch.rand(shape, generator=generator) * 1.5 + 0.5 for _ in range(4))
        parts = [p.to(dtype), (sign * g).to(dtype)]
        for x, signed in ((sign * m, True), (torch.where(v < 0.8, 0.0, v), False)):
            codes, absmax = quantize_blockwise_reference(x, signed, block_size)
            parts += [codes.view(-1), absmax]
        for own, part in zip(made, parts, strict=True):
            own.append(part)
    return made


def step(function, tensors, block_size=256, **options):
    count = len(tensors[0])
    scales = {"step_sizes": [0.01 * (1 + i) for i in range(count)], "root_scales": [1 + 0.1 * i for i in range(count)]}
    function(*tensors, block_size=block_size, **{**RULE, **scales, **options})
    return tensors


def assert_same_step(own, reference, rtol=1e-6, atol=5e-7):
    for index in (0, 3, 5):
        for a, b in zip(own[index], reference[index], strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for index in (2, 4):
        for a, b in zip(own[index], reference[index], strict=True):
            # The last bit of a moment may decide between two codes.
            assert (a.int() - b.int()).abs().max() <= 1 if a.numel() else True
            assert (a != b).sum() <= 1 + 1e-4 * a.numel()


@pytest.mark.parametrize("block_size", [256, 7, 64, 4096])
@pytest.mark.parametrize("name", OPTIONS)
def test_native_step_equals_the_reference(instruction_set, name, block_size):
    arguments = {"block_size": block_size, "sign": -1.0 if "maximize" in OPTIONS[name] else 1.0}
    own = step(adam8_, lists(**arguments), block_size, native=True, **OPTIONS[name])
    reference = step(adam8_reference_, lists(**arguments), block_size, **OPTIONS[name])
    assert_same_step(own, reference)


@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16_parameters(instruction_set, name):
    arguments = {"dtype": torch.bfloat16, "sign": -1.0 if "maximize" in OPTIONS[name] else 1.0}
    own = step(adam8_, lists(**arguments), native=True, **OPTIONS[name])
    reference = step(adam8_reference_, lists(**arguments), **OPTIONS[name])
    for a, b in zip(own[0], reference[0], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a != b).sum() <= 1 + 1e-3 * a.numel()
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
    assert_same_step([[], [], *own[2:]], [[], [], *reference[2:]])


@needs_library
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    threads, results = torch.get_num_threads(), []
    try:
        for most, count in itertools.product(("plain C", "AVX2", "AVX-512"), (1, 2, 5)):
            library.instruction_set(most)
            torch.set_num_threads(count)
            results.append(step(adam8_, lists(), native=True, decay_before=0.9))
    finally:
        library.instruction_set()
        torch.set_num_threads(threads)
    for result in results[1:]:
        for own, first in zip(result, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, first, strict=True))


@needs_library
def test_the_stored_moments_are_the_codes_of_the_fresh_ones():
    (p,), (g,), (q1,), (a1,), (q2,), (a2,) = lists([(1000,)])
    m = dequantize_blockwise(q1, a1) * 0.5 + 0.5 * g
    v = dequantize_blockwise(q2, a2, signed=False) * 0.5 + 0.5 * g.square()
    adam8_([p], [g], [q1], [a1], [q2], [a2], step_sizes=[0.1], root_scales=[1.0], beta1=0.5, beta2=0.5, eps=1e-8)
    # Halves are exact, so these are the kernel's own moments to the bit.
    assert all(torch.equal(a, b) for a, b in zip((q1, a1), quantize_blockwise(m), strict=True))
    torch.testing.assert_close(a2, quantize_blockwise(v, signed=False)[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [[x.double() for x in t[0]], [x.double() for x in t[1]], *t[2:]],
        lambda t: [[x.mT if x.ndim == 2 else x for x in t[0]], [x.mT if x.ndim == 2 else x for x in t[1]], *t[2:]],
    ],
    ids=["float64", "transposed"],
)
def test_other_tensors_go_to_the_reference(change):
    own, reference = step(adam8_, change(lists())), step(adam8_reference_, change(lists()))
    assert_same_step(own, reference)
    with pytest.raises(RuntimeError, match="the native 8-bit Adam kernel cannot run"):
        step(adam8_, change(lists()), native=True)


def test_blocks_that_do_not_fit_the_cache_go_to_the_reference():
    own, reference = step(adam8_, lists(block_size=8192), 8192), step(adam8_reference_, lists(block_size=8192), 8192)
    for a, b in zip(own, reference, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(RuntimeError, match="the native 8-bit Adam kernel cannot run"):
        step(adam8_, lists(block_size=8192), 8192, native=True)


def test_native_false_is_the_reference_to_the_bit():
    own, reference = step(adam8_, lists(), native=False), step(adam8_reference_, lists())
    for a, b in zip(own, reference, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_empty_lists():
    step(adam8_, [[] for _ in range(6)])
