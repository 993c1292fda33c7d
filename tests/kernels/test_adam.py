from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.conftest import needs_library

from headway.kernels import library
from headway.kernels.adam import adam_, adam_reference_
from headway.kernels.project import Projection

RULE = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
OPTIONS = {
    "bare": {},
    "decay": {"decay_before": 0.99, "decay_after": 0.98},
    "l2": {"l2": 0.1},
    "maximize": {"maximize": True},
    "clip": {"clip": 0.7},
    "spike": {"spike": 2.0},
    "lerp from the other end": {"beta1": 0.2},
    "no momentum": {"beta1": 0.0, "beta2": 0.0},
    "all": {"decay_before": 0.99, "decay_after": 0.98, "l2": 0.1, "maximize": True, "clip": 0.7, "spike": 2.0},
}
SHAPES = [(), (1,), (7,), (3, 5), (33, 65), (100_003,), (0,), (2, 3, 5, 7)]


def lists(shapes=SHAPES, dtype=torch.float32, friction=False, sign=1.0, layout=lambda x: x):
    """params, grads, moments and previous gradients: without cancellation in the rule's sums (`sign` is that of the
    gradients), so that rounding stays rounding; one second moment of five is exactly zero."""
    generator = torch.Generator().manual_seed(0)

    def draw(dtype, low=0.5, high=2.0):
        uniform = [torch.rand(shape, generator=generator) * (high - low) + low for shape in shapes]
        return [layout(x.to(dtype)) for x in uniform]

    params, grads, exp_avgs = draw(dtype), [sign * g for g in draw(dtype)], draw(torch.float32)
    exp_avg_sqs = [torch.where(v < 0.8, 0.0, v) for v in draw(torch.float32)]
    previous = draw(torch.float32, -4, 4) if friction else None
    return params, grads, exp_avgs, exp_avg_sqs, previous


def step(function, tensors, **options):
    count = len(tensors[0])
    step_sizes = [0.01 * (1 + index) for index in range(count)]
    root_scales = [1 + 0.1 * index for index in range(count)]
    settings = {**RULE, "step_sizes": step_sizes, "root_scales": root_scales, **options}
    function(*tensors[:4], previous_grads=tensors[4], **settings)
    return tensors


def assert_close(actual, expected, rtol=1e-6, atol=5e-7):
    for own, other in zip(actual, expected, strict=True):
        if own is not None:
            for a, b in zip(own, other, strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("friction", [False, True], ids=["without friction", "friction"])
@pytest.mark.parametrize("name", OPTIONS)
def test_native_equals_the_reference(instruction_set, name, friction):
    sign = -1.0 if "maximize" in OPTIONS[name] else 1.0
    native = step(adam_, lists(friction=friction, sign=sign), native=True, **OPTIONS[name])
    reference = step(adam_reference_, lists(friction=friction, sign=sign), **OPTIONS[name])
    assert_close(native, reference)


@pytest.mark.parametrize("friction", [False, True], ids=["without friction", "friction"])
@pytest.mark.parametrize("name", ["bare", "all"])
def test_bfloat16_parameters_keep_float32_moments(instruction_set, name, friction):
    arguments = {"dtype": torch.bfloat16, "friction": friction, "sign": -1.0 if name == "all" else 1.0}
    native = step(adam_, lists(**arguments), native=True, **OPTIONS[name])
    reference = step(adam_reference_, lists(**arguments), **OPTIONS[name])
    assert_close(native[2:], reference[2:])
    for own, other in zip(native[0], reference[0], strict=True):
        # A last bit of float32 may decide which way a parameter is rounded.
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own, other, rtol=2**-7, atol=0)
        assert (own != other).float().mean() < 1e-3 or own.numel() == 0


@needs_library
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    threads = torch.get_num_threads()
    results = []
    try:
        for most, count in itertools.product(("plain C", "AVX2", "AVX-512"), (1, 2, 5)):
            library.instruction_set(most)
            torch.set_num_threads(count)
            results.append(step(adam_, lists(friction=True), native=True, **OPTIONS["all"]))
            results.append(step(adam_, lists(friction=True, dtype=torch.bfloat16), native=True))
    finally:
        library.instruction_set()
        torch.set_num_threads(threads)
    for index, result in enumerate(results):
        for own, first in zip(result, results[index % 2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, first, strict=True))


@needs_library
def test_an_element_does_not_depend_on_its_place():
    whole = step(adam_, lists([(1001,)], friction=True), native=True, **OPTIONS["all"])
    parts = [
        [x[0][start : start + 13].clone() for start in range(0, 1001, 13)] for x in lists([(1001,)], friction=True)
    ]
    count = len(parts[0])
    step(adam_, parts, native=True, **OPTIONS["all"], step_sizes=[0.01] * count, root_scales=[1.0] * count)
    for own, other in zip(parts, whole, strict=True):
        assert torch.equal(torch.cat(own), other[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_only_read(dtype):
    tensors = lists(dtype=dtype, friction=True)
    grads = [g.clone() for g in tensors[1]]
    step(adam_, tensors, **OPTIONS["all"])
    assert all(torch.equal(a, b) for a, b in zip(tensors[1], grads, strict=True))


@needs_library
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2),
    ],
    ids=["channels last", "permuted"],
)
def test_tensors_without_gaps_are_native_in_any_order_of_dimensions(layout):
    shapes = [(2, 3, 5, 7), (4, 1, 3, 3)]
    native = step(adam_, lists(shapes, friction=True, layout=layout), native=True)
    reference = step(adam_reference_, lists(shapes, friction=True, layout=layout))
    assert_close(native, reference)


def test_other_tensors_go_to_the_reference_next_to_native_ones():
    def layout(x):
        return x.repeat_interleave(2, -1)[..., ::2] if x.ndim == 2 else x

    mixed = step(adam_, lists(friction=True, sign=-1.0, layout=layout), **OPTIONS["all"])
    reference = step(adam_reference_, lists(friction=True, sign=-1.0, layout=layout), **OPTIONS["all"])
    assert not mixed[0][3].is_contiguous()
    assert_close(mixed, reference)


def test_gradient_in_another_order_of_dimensions_than_the_parameter():
    shapes = [(2, 3, 5, 7)]
    mixed, reference = lists(shapes), lists(shapes)
    for tensors in (mixed, reference):
        tensors[1][0] = tensors[1][0].to(memory_format=torch.channels_last)
    assert_close(step(adam_, mixed), step(adam_reference_, reference))


def test_float64_equals_the_reference_to_the_bit():
    def layout(x):
        return x.double()

    own = step(adam_, lists(friction=True, layout=layout), **OPTIONS["all"])
    reference = step(adam_reference_, lists(friction=True, layout=layout), **OPTIONS["all"])
    for a, b in zip(own, reference, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_library
@pytest.mark.parametrize(
    "layout", [lambda x: x.double(), lambda x: torch.cat([x, x], -1)[..., ::2], lambda x: x.to("meta")]
)
def test_native_true_says_which_tensor_it_cannot_take(layout):
    tensors = [[torch.ones(3), layout(torch.ones(3))] for _ in range(4)]
    with pytest.raises(RuntimeError, match="the native Adam kernel cannot run: tensor 1"):
        adam_(*tensors, step_sizes=[1, 1], root_scales=[1, 1], **RULE, native=True)
    assert torch.equal(tensors[0][0], torch.ones(3))


def test_native_false_is_the_reference_to_the_bit():
    own = step(adam_, lists(friction=True), native=False, **OPTIONS["all"])
    reference = step(adam_reference_, lists(friction=True), **OPTIONS["all"])
    for a, b in zip(own, reference, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def projections(count, close):
    return [Projection(0.25 - 0.05 * index, 1.5, int(close)) for index in range(count - 1)] + [Projection(0, 1, 0)]


@pytest.mark.parametrize("name", ["bare", "all"])
@pytest.mark.parametrize("close", [False, True])
def test_projected_and_bounded_gradients_are_left_behind(instruction_set, name, close):
    changes = {"bounds": [0.9] * len(SHAPES), **OPTIONS[name]}
    sign = -1.0 if name == "all" else 1.0
    native, reference, by_hand = lists(sign=sign), lists(sign=sign), lists(sign=sign)
    changes["projections"] = projections(len(SHAPES), close)
    step(adam_, native, native=True, **changes)
    step(adam_reference_, reference, **changes)
    assert_close(native, reference)
    for g, p, own in zip(by_hand[1], by_hand[0], changes.pop("projections"), strict=True):
        g.copy_(((g - own.along * p) * own.scale).clamp(-0.9, 0.9))
    step(adam_, by_hand, native=True, **OPTIONS[name])
    assert_close(native, by_hand)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_changed_gradients_of_other_dtypes_go_to_the_reference(dtype):
    own = lists(layout=torch.Tensor.double) if dtype == torch.float64 else lists(dtype=dtype)
    expected = [g.clone().clamp(-0.9, 0.9) for g in own[1]]
    step(adam_, own, bounds=[0.9] * len(SHAPES))
    assert all(torch.equal(a, b) for a, b in zip(own[1], expected, strict=True))


def test_the_reference_does_not_depend_on_how_tensors_are_cut(monkeypatch):
    whole = step(adam_reference_, lists(friction=True), **OPTIONS["all"])
    monkeypatch.setattr("headway.kernels.adam._PIECE", 1024)
    cut = step(adam_reference_, lists(friction=True), **OPTIONS["all"])
    assert_close(cut, whole, rtol=1e-7, atol=1e-7)


def test_empty_lists():
    step(adam_, ([], [], [], [], None))
    step(adam_, ([], [], [], [], []))


def test_lists_of_unequal_length_are_refused():
    one, two = [torch.ones(2)], [torch.ones(2), torch.ones(2)]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        adam_(one, two, one, one, step_sizes=[1], root_scales=[1], **RULE)


@needs_library
def test_not_a_number_stays_one(instruction_set):
    nan = float("nan")
    p, g, m, v, h = (torch.ones(20) for _ in range(5))
    g[3] = nan
    adam_([p], [g], [m], [v], previous_grads=[h], step_sizes=[1], root_scales=[1], **RULE, clip=1.0, native=True)
    assert p.isnan().nonzero().tolist() == [[3]]
    assert m.isnan().nonzero().tolist() == [[3]]
    half = torch.full((20,), nan, dtype=torch.bfloat16)
    adam_([half], [half], [m], [v], step_sizes=[1], root_scales=[1], **RULE, native=True)
    assert half.isnan().all()


@needs_library
def test_friction_from_no_change_to_any_change():
    change = torch.cat([torch.tensor([0.0, 1e-30, 31.9, 32.0, 1e3, 1e30]), torch.linspace(0, 40, 4001)])
    change = torch.cat([change, torch.linspace(0, 0.04, 4001)])
    p, m, v = torch.zeros_like(change), torch.ones_like(change), torch.ones_like(change)
    expected = -0.5 * change.double().sigmoid().float()
    adam_(
        [p], [torch.zeros_like(change)], [m], [v], previous_grads=[change], step_sizes=[1.0], root_scales=[1.0],
        beta1=0.5, beta2=0.0, eps=1.0, native=True,
    )  # fmt: skip
    torch.testing.assert_close(p, expected, rtol=2e-7, atol=0)


@needs_library
def test_autograd_sees_that_a_saved_parameter_changed():
    p = torch.nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    adam_([p], *[[torch.ones(3)] for _ in range(3)], step_sizes=[1], root_scales=[1], **RULE, native=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
