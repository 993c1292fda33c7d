import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.kernels.blockwise import (
    adam8_,
    adam8_reference_,
    create_dynamic_map,
    dequantize_blockwise,
    quantize_blockwise,
    quantize_blockwise_reference,
)

# From bitsandbytes at 95f9af3, functional.create_dynamic_map: magnitudes next to zero, of the signed and unsigned map.
SIGNED_SMALLEST, UNSIGNED_SMALLEST = 5.5e-7, [3.25e-7, 7.75e-7, 2.125e-6]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_maps_are_256_ascending_values_of_seven_decades():
    for signed in (True, False):
        values = create_dynamic_map(signed)
        assert values.shape == (256,)
        assert (values.diff() > 0).all()
        assert values[-1] == 1
    signed, unsigned = create_dynamic_map(), create_dynamic_map(signed=False)
    assert signed[0].item() == pytest.approx(-0.99296875)
    assert signed[127] == 0
    assert signed[128].item() == pytest.approx(SIGNED_SMALLEST)
    assert signed[126].item() == pytest.approx(-SIGNED_SMALLEST)
    assert unsigned[0] == 0
    assert unsigned[1:4].tolist() == pytest.approx(UNSIGNED_SMALLEST)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values(signed):
    x = normal(999) if signed else normal(999).abs()
    codes, absmax = quantize_blockwise(x, signed, 64)
    z = x / absmax.repeat_interleave(64)[:999]
    distances = (z.unsqueeze(1) - create_dynamic_map(signed)).abs()
    chosen = distances.gather(1, codes.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=0, atol=1e-7)


def test_a_tie_goes_to_the_lower_code():
    values = create_dynamic_map()
    middle = (values[200] + values[201]) / 2
    codes, _ = quantize_blockwise(torch.stack([torch.tensor(1.0), middle]))
    assert codes[1] == 200


def test_the_largest_is_exact_when_positive_and_a_little_low_when_negative():
    for sign, expected in ((1, 3.0), (-1, -3.0 * 0.99296875)):
        codes, absmax = quantize_blockwise(sign * torch.tensor([3.0, 1.0]))
        assert dequantize_blockwise(codes, absmax)[0].item() == pytest.approx(expected)


def test_quantising_again_changes_nothing_where_the_largest_is_positive():
    x = normal(1000)
    x[::100] = 10
    first = dequantize_blockwise(*quantize_blockwise(x, True, 100), True, 100)
    again = dequantize_blockwise(*quantize_blockwise(first, True, 100), True, 100)
    assert torch.equal(first, again)


def test_zeros_are_exact_also_in_a_block_of_zeros():
    x = torch.zeros(600)
    x[300] = 1e-3
    codes, absmax = quantize_blockwise(x)
    assert absmax.tolist() == [0.0, pytest.approx(1e-3), 0.0]
    back = dequantize_blockwise(codes, absmax)
    assert torch.equal(back == 0, x == 0)


@pytest.mark.parametrize("quantize", [quantize_blockwise, quantize_blockwise_reference])
def test_with_the_unsigned_map_zero_alone_gets_the_code_of_zero(quantize):
    """The nearest value is 0 below 1.6e-7 of the largest."""
    x = torch.tensor([1.0, 1e-7, 1.6e-7, 1e-12, 1e-37, 0.0])
    codes, absmax = quantize(x, False)
    assert codes.tolist() == [255, 1, 1, 1, 1, 0]
    assert dequantize_blockwise(codes, absmax, False)[1:5].tolist() == [pytest.approx(3.25e-7)] * 4


@pytest.mark.parametrize("quantize", [quantize_blockwise, quantize_blockwise_reference])
def test_no_sign_is_lost_to_the_other_one(quantize):
    x = normal(4096).pow(9)  # over many decades, so that the smallest become 0
    back = dequantize_blockwise(*quantize(x))
    assert (back == 0).any()
    assert (back * x >= 0).all()


@given(st.integers(0, 10**6), st.sampled_from([True, False]), st.integers(1, 700), st.sampled_from([1, 7, 256]))
def test_the_error_is_at_most_half_the_widest_gap(seed, signed, count, block_size):
    x = normal(count, seed=seed) if signed else normal(count, seed=seed).abs()
    codes, absmax = quantize_blockwise(x, signed, block_size)
    error = (dequantize_blockwise(codes, absmax, signed, block_size) - x).abs()
    bound = absmax.repeat_interleave(block_size)[:count] * (0.00704 if signed else 0.00352)
    assert (error <= bound + 1e-12).all()


def test_blocks_are_independent():
    x = normal(1024)
    changed = x.clone()
    changed[256:512] *= 1000
    first, second = quantize_blockwise(x)[0], quantize_blockwise(changed)[0]
    assert torch.equal(first[:256], second[:256])
    assert torch.equal(first[512:], second[512:])
    whole, one = quantize_blockwise(x, True, 5000), quantize_blockwise(x, True, 1024)
    assert torch.equal(whole[0], one[0])
    assert torch.equal(whole[1], one[1])


def test_shapes_dtypes_and_long_tensors_in_chunks():
    x = normal(3, 5, 7).bfloat16()
    codes, absmax = quantize_blockwise(x, True, 16)
    assert (codes.dtype, codes.shape, absmax.shape) == (torch.uint8, x.shape, (7,))
    assert dequantize_blockwise(codes, absmax, True, 16, torch.bfloat16).dtype == torch.bfloat16
    long = normal(2**20 + 300)
    codes, absmax = quantize_blockwise_reference(long)
    parts = [quantize_blockwise_reference(part) for part in (long[: 2**20], long[2**20 :])]
    assert torch.equal(codes, torch.cat([part[0] for part in parts]))
    assert torch.equal(absmax, torch.cat([part[1] for part in parts]))


def test_wrong_input_is_one_line():
    with pytest.raises(ValueError, match=r"x must be floating-point, got torch\.int64"):
        quantize_blockwise(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="block_size must be a whole number >= 1, got 0"):
        quantize_blockwise(torch.ones(3), True, 0)
    with pytest.raises(TypeError, match=r"codes must be uint8, got torch\.int8"):
        dequantize_blockwise(torch.ones(3, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="absmax must have 1 scales, got 2"):
        dequantize_blockwise(torch.ones(3, dtype=torch.uint8), torch.ones(2))


def test_a_default_device_does_not_move_maps_codes_or_scales():
    """Maps are cached at the first call: one made on another device would reach the native code as a bad address."""
    x = normal(600)
    expected = quantize_blockwise(x)
    create_dynamic_map.cache_clear()
    with torch.device("meta"):
        codes, absmax = quantize_blockwise(x)
        back = dequantize_blockwise(codes, absmax)
        assert create_dynamic_map().device.type == "cpu"
    assert torch.equal(codes, expected[0])
    assert torch.equal(absmax, expected[1])
    assert torch.equal(back, dequantize_blockwise(*expected))


@pytest.mark.parametrize("quantize", [quantize_blockwise, quantize_blockwise_reference])
def test_scales_are_float32_whatever_the_default_dtype(quantize):
    x = normal(600)
    expected = quantize(x)
    torch.set_default_dtype(torch.float64)
    try:
        codes, absmax = quantize(x)
        back = dequantize_blockwise(codes, absmax)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (absmax.dtype, back.dtype) == (torch.float32, torch.float32)
    assert torch.equal(codes, expected[0])
    assert torch.equal(absmax, expected[1])


def adam8_arguments(shapes, block_size, seed=0):
    params = [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    grads = [normal(*shape, seed=seed + 50 + i) for i, shape in enumerate(shapes)]
    first = [
        quantize_blockwise(0.1 * normal(g.numel(), seed=seed + 90 + i), True, block_size) for i, g in enumerate(grads)
    ]
    second = [
        quantize_blockwise(0.01 * normal(g.numel(), seed=seed + 95 + i).square(), False, block_size)
        for i, g in enumerate(grads)
    ]
    return [params, grads, *map(list, zip(*first, strict=True)), *map(list, zip(*second, strict=True))]


@pytest.mark.parametrize("block_size", [64, 256, 2048])
@pytest.mark.parametrize(
    "options", [{}, {"maximize": True, "l2": 0.1}, {"decay_before": 0.9, "decay_after": 0.95}], ids=str
)
def test_the_8_bit_step_is_its_reference(block_size, options):
    shapes = [(33, 70), (1,), (4096,), (7, 3, 5)]
    rule = {"step_sizes": [0.1, 0.2, 0.3, 0.4], "root_scales": [1.0, 2.0, 3.0, 4.0]}
    rule |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "block_size": block_size, **options}
    first, second = adam8_arguments(shapes, block_size), adam8_arguments(shapes, block_size)
    adam8_(*first, **rule)
    adam8_reference_(*second, **rule)
    for name, ours, theirs in zip(("p", "g", "q1", "a1", "q2", "a2"), first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a.dtype == torch.uint8:  # rounding may move an element across a midpoint
                assert ((a.int() - b.int()).abs() <= 1).all()
                assert (a != b).float().mean() <= 1e-3, name
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("native", [None, False])
def test_a_step_with_scales_of_other_blocks_is_refused_before_anything_changes(native):
    lists = adam8_arguments([(4096,)], 256)
    before = [[t.clone() for t in tensors] for tensors in lists]
    rule = {"step_sizes": [0.1], "root_scales": [1.0], "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    with pytest.raises(ValueError, match="absmax must have 512 scales, got 16"):
        adam8_(*lists, **rule, block_size=8, native=native)
    for ours, theirs in zip(lists, before, strict=True):
        assert torch.equal(ours[0], theirs[0])
