import io
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from headway.kernels import library
from headway.optim import SPAM, DiffGrad, Frugal, SplitSGD, diffgrad, frugal, opposing_signals, quantized_state, spam
from headway.optim.quantized_state import batches, create, is_quantized, read, write
from headway.optim.state import state_bytes
from headway.testing import check_optimizer

MODULES = {DiffGrad: diffgrad, Frugal: frugal, SPAM: spam, SplitSGD: opposing_signals}

# Every rule with 8-bit state, at settings under which 200 steps go through several subspaces and resets.
CASES = {
    "frugal, blocks": (Frugal, {"lr": 0.01, "density": 1.0}),
    "frugal, reproject": (
        Frugal,
        {"lr": 0.01, "projection": "columns", "density": 0.5, "update_gap": 20, "on_change": "reproject"},
    ),
    "frugal, svd": (
        Frugal,
        {"lr": 0.01, "projection": "svd", "density": 0.5, "update_gap": 50, "on_change": "keep"},
    ),
    "frugal, sgdm": (
        Frugal,
        {"lr": 0.05, "projection": "columns", "density": 0.5, "inner": "sgdm", "free_lr_scale": 0.02},
    ),
    "frugal, lion": (Frugal, {"lr": 0.003, "projection": "columns", "density": 0.5, "inner": "lion"}),
    "diffgrad": (DiffGrad, {"lr": 0.02}),
    "spam": (SPAM, {"lr": 0.004, "reset_interval": 80, "warmup_steps": 10}),
    "spam, sparse": (SPAM, {"lr": 0.004, "density": 0.5, "reset_interval": 50, "warmup_steps": 5}),
    "opposing signals, quantile": (SplitSGD, {"lr": 0.1, "sign_lr": 0.005}),
    "opposing signals, threshold": (SplitSGD, {"lr": 0.1, "sign_lr": 0.005, "threshold": 0.5, "quantile": None}),
}
SHAPES = [(96, 96), (64, 144)]
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def zeros(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def train(optimizer, parameters, steps, start=0, kept=lambda gradient: gradient):
    """Steps on quadratics with curvatures from 0.01 to 1 and minima of size 1, with gradient noise of 0.1."""
    targets = torch.Generator().manual_seed(0)
    goals = [torch.randn(p.shape, generator=targets) for p in parameters]
    for step in range(start, start + steps):
        noise = torch.Generator().manual_seed(1000 + step)
        for p, goal in zip(parameters, goals, strict=True):
            curvature = torch.logspace(-2, 0, p.shape[-1])
            gradient = curvature * (p.detach() - goal) + 0.1 * torch.randn(p.shape, generator=noise)
            p.grad = kept(gradient).to(p.dtype)
        optimizer.step()
    return sum(
        (torch.logspace(-2, 0, p.shape[-1]) * (p.detach() - goal).square()).sum().item()
        for p, goal in zip(parameters, goals, strict=True)
    )


def run(name, bits, steps, shapes=SHAPES):
    cls, options = CASES[name]
    parameters = zeros(shapes)
    optimizer = cls(parameters, **options, state_bits=bits)
    return parameters, train(optimizer, parameters, steps), optimizer


def moment_bytes(optimizer):
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.removesuffix("_absmax") in MOMENTS
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("frugal, sgdm", "frugal, svd", "opposing signals, threshold")]
)
def test_contract_with_every_tensor_in_8_bits(name, monkeypatch):
    cls, options = CASES[name]
    monkeypatch.setattr(MODULES[cls], "create", partial(create, min_size=1))
    monkeypatch.setattr(spam, "_check_sparse", lambda *_: None)  # the contract's tensors of all shapes share groups
    often = {"update_gap": 2} if "update_gap" in options else {}
    check_optimizer(cls, **{**options, **often, "lr": 0.01}, state_bits=8)


@pytest.mark.parametrize("name", CASES)
def test_two_hundred_steps_end_near_those_of_32_bit_state(name):
    """Within a tenth of the way that the 32-bit run went, at a loss that differs by less than a tenth."""
    whole, loss, _ = run(name, 32, 200)
    codes, loss8, _ = run(name, 8, 200)
    start = train(SplitSGD(zeros(), lr=1e-9, sign_lr=0.0), zeros(), 0)
    assert loss < 0.65 * start
    assert loss8 == pytest.approx(loss, rel=0.1)
    way = torch.cat([p.detach().flatten() for p in whole]).norm()
    apart = torch.cat([(a - b).detach().flatten() for a, b in zip(whole, codes, strict=True)]).norm()
    assert 0 < apart < 0.1 * way


@pytest.mark.parametrize("name", CASES)
def test_moments_take_at_most_27_percent_of_the_bytes(name):
    whole, codes = (run(name, bits, 1, [(128, 128)])[2] for bits in (32, 8))
    assert 0.25 < moment_bytes(codes) / moment_bytes(whole) <= 0.27
    if CASES[name][0] is not DiffGrad and "sparse" not in name and "svd" not in name and "reproject" not in name:
        assert state_bytes(codes) / state_bytes(whole) <= 0.27
    assert state_bytes(whole) - state_bytes(codes) == moment_bytes(whole) - moment_bytes(codes)


def test_diffgrads_previous_gradient_stays_in_float32():
    (parameter,), _, optimizer = run("diffgrad", 8, 3, [(64, 64)])
    assert torch.equal(optimizer.state[parameter]["previous_grad"], parameter.grad)
    assert state_bytes(optimizer) == 4096 * (1 + 1 + 4) + 2 * 16 * 4


@pytest.mark.parametrize("name", CASES)
def test_below_the_threshold_nothing_differs_from_32_bits(name):
    shapes = [(63, 64), (64, 65)] if "density" in CASES[name][1] and "blocks" not in name else [(63, 65)]
    (whole, _, _), (codes, _, optimizer) = (run(name, bits, 5, shapes) for bits in (32, 8))
    assert same(whole, codes)
    assert not any(key.endswith("_absmax") for state in optimizer.state.values() for key in state)


def test_the_threshold_counts_the_entries_of_the_state_not_of_the_parameter():
    for columns, quantized in ((126, False), (128, True)):
        (parameter,) = zeros([(64, columns)])
        optimizer = Frugal([parameter], projection="columns", density=0.5, state_bits=8)
        train(optimizer, [parameter], 1)
        assert is_quantized(optimizer.state[parameter], "exp_avg") == quantized


@pytest.mark.parametrize("name", [name for name in CASES if "opposing" not in name])
def test_the_first_step_is_that_of_32_bits_as_parameters_move_by_fresh_moments(name):
    (whole, _, _), (codes, _, _) = (run(name, bits, 1) for bits in (32, 8))
    assert same(whole, codes)


@pytest.mark.parametrize("name", CASES)
def test_entries_whose_gradient_is_always_zero_never_move(name):
    cls, options = CASES[name]
    parameters = zeros()
    train(cls(parameters, **options, state_bits=8), parameters, 30, kept=lambda gradient: gradient.triu())
    for p in parameters:
        if "svd" not in name:  # whose directions mix entries
            assert not p.detach().tril(-1).any()
        assert p.detach().triu().any()


@pytest.mark.parametrize("name", CASES)
def test_a_saved_run_continues_to_the_bit(name):
    cls, options = CASES[name]
    parameters = zeros(dtype=torch.bfloat16)
    optimizer = cls(parameters, **options, state_bits=8)
    train(optimizer, parameters, 12)
    buffer = io.BytesIO()
    torch.save({"weights": [p.detach().clone() for p in parameters], "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    resumed = [nn.Parameter(weight) for weight in saved["weights"]]
    fresh = cls(resumed, **options)
    fresh.load_state_dict(saved["optimizer"])
    codes = [v for state in fresh.state.values() for k, v in state.items() if k + "_absmax" in state]
    assert codes
    assert {value.dtype for value in codes} == {torch.uint8}
    train(optimizer, parameters, 12, start=12)
    train(fresh, resumed, 12, start=12)
    assert same(parameters, resumed)


@pytest.mark.parametrize("name", CASES)
def test_small_batches_give_the_same_steps_and_hold_no_copy_of_all_the_state(name, monkeypatch):
    """Of eight tensors of 8192 entries in batches of two, at most three moments of two tensors are there at once."""
    cls, _ = CASES[name]
    shapes = [(64, 128)] * 8
    expected, _, _ = run(name, 8, 3, shapes)
    alive = []
    most = 0

    def watched(*args, **kwargs):
        nonlocal most
        value = read(*args, **kwargs)
        alive.append(weakref.ref(value))
        most = max(most, sum(t.numel() for t in (ref() for ref in alive) if t is not None))
        return value

    monkeypatch.setattr(quantized_state, "BATCH_ELEMENTS", 2 * 8192)
    monkeypatch.setattr(MODULES[cls], "read", watched)
    parameters, _, _ = run(name, 8, 3, shapes)
    assert same(parameters, expected)
    assert 0 < most <= 3 * 2 * 8192


@pytest.mark.parametrize("cls", MODULES)
def test_bad_bits_and_sharded_parameters_are_refused(cls):
    parameter = nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(ValueError, match="state_bits must be one of 32, 8, got 16"):
        cls([parameter], state_bits=16)
    with pytest.raises(ValueError, match="state_bits must be one of 32, 8, got 4"):
        cls([{"params": [parameter], "state_bits": 4}])
    parameter.placements = [SimpleNamespace(is_shard=lambda: True)]
    with pytest.raises(ValueError, match="8-bit"):
        cls([parameter], state_bits=8, **({"threshold": 1.0, "quantile": None} if cls is SplitSGD else {}))


def test_groups_choose_their_own_bits():
    first, second = zeros([(64, 64), (64, 64)])
    optimizer = SplitSGD([{"params": [first], "state_bits": 8}, {"params": [second]}], lr=0.1)
    train(optimizer, [first, second], 3)
    assert is_quantized(optimizer.state[first], "momentum_buffer")
    assert optimizer.state[second]["momentum_buffer"].dtype == torch.float32
    assert optimizer.sign_fraction() <= 0.1


def test_the_sign_step_takes_at_most_the_fraction_of_all_entries_of_8_bit_momenta():
    parameters, _, optimizer = run("opposing signals, quantile", 8, 5)
    m_hats = torch.cat([read(optimizer.state[p], "momentum_buffer").flatten() / (1 - 0.9**5) for p in parameters]).abs()
    bound = m_hats.sort(descending=True).values[int(0.1 * m_hats.numel())]
    assert optimizer.sign_fraction() == int((m_hats > bound).sum()) / m_hats.numel()
    assert 0.05 < optimizer.sign_fraction() <= 0.1


def test_spam_clips_against_the_second_moment_that_was_kept():
    parameter = zeros([(64, 64)])[0]
    optimizer = SPAM([parameter], state_bits=8, threshold=4.0, clip_delay=1)
    train(optimizer, [parameter], 3)
    state = optimizer.state[parameter]
    m, v = read(state, "exp_avg"), read(state, "exp_avg_sq", signed=False)
    parameter.grad = torch.full((64, 64), 1e6)
    optimizer.step()
    clipped = (4 * v).sqrt()
    kept = {}
    create(kept, "m", parameter, 8)
    write(kept, "m", 0.9 * m + 0.1 * clipped)
    torch.testing.assert_close(read(state, "exp_avg"), read(kept, "m"), rtol=0.02, atol=1e-4)
    assert read(state, "exp_avg_sq", signed=False).max() < 4.1 * v.max()


@pytest.mark.parametrize("density", [1.0, 0.75])
def test_spams_reset_starts_from_zero_moments(density):
    parameter = zeros([(96, 96)])[0]
    optimizer = SPAM([parameter], state_bits=8, reset_interval=5, density=density, clip_delay=9)
    train(optimizer, [parameter], 5)
    state = optimizer.state[parameter]
    assert is_quantized(state, "exp_avg")
    gradient = parameter.grad.flatten()[state["indices"].long()] if density < 1 else parameter.grad
    kept = {}
    create(kept, "m", gradient, 8)
    write(kept, "m", gradient - 0.9 * gradient)
    torch.testing.assert_close(read(state, "exp_avg"), read(kept, "m"), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("inner", ["adamw", "lion", "sgdm"])
def test_frugal_takes_8_bit_moments_along_where_subspaces_overlap(inner):
    (parameter,) = zeros([(128, 128)])
    optimizer = Frugal(
        [parameter], projection="columns", density=0.5, update_gap=4, on_change="reproject", inner=inner, state_bits=8
    )
    name = "momentum_buffer" if inner == "sgdm" else "exp_avg"
    train(optimizer, [parameter], 4)
    state = optimizer.state[parameter]
    old, before = state["projector"].tolist(), read(state, name)
    parameter.grad = torch.zeros(128, 128)
    optimizer.step()
    new, after = state["projector"].tolist(), read(state, name)
    assert is_quantized(state, name)
    assert old != new
    decay = 0.999 if inner == "lion" else 0.9
    shared = sorted(set(old) & set(new))
    assert shared
    for column in new:
        if column not in shared:
            assert not after[:, new.index(column)].any()
    largest = before.abs().max().item()
    for column in shared:
        expected = decay * before[:, old.index(column)]
        torch.testing.assert_close(after[:, new.index(column)], expected, rtol=0, atol=0.02 * largest)


def test_a_second_moment_that_is_not_zero_is_not_rounded_to_zero():
    state = {}
    create(state, "v", torch.zeros(4096), 8, signed=False)
    v = torch.cat([torch.tensor([1.0, 1e-9, 1e-30, 0.0]), torch.full((4092,), 0.5)])
    write(state, "v", v, signed=False)
    assert read(state, "v", signed=False)[:4].tolist() == [1.0, pytest.approx(3.25e-7), pytest.approx(3.25e-7), 0.0]
    create(state, "m", torch.zeros(4096), 8)
    write(state, "m", torch.cat([torch.tensor([1.0, 1e-9, -1e-9]), torch.zeros(4093)]))
    assert read(state, "m")[:3].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("cls", [DiffGrad, Frugal, SPAM])
def test_a_small_gradient_that_stops_gives_no_step_of_m_over_eps(cls):
    """As the rows of an embedding do: m outlives the quantisation; v, the square, lies eight decades below."""
    (parameter,) = zeros([(64, 64)])
    options = {"projected": False} if cls is Frugal else {}
    optimizer = cls([{"params": [parameter], **options}], lr=0.01, state_bits=8)
    parameter.grad = torch.ones(64, 64)
    parameter.grad[0, 1] = 1e-4
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad[0, 1] = 0
    optimizer.step()
    assert (parameter - before).abs().max() < 0.1


@pytest.mark.parametrize("fused", [None, pytest.param(True, marks=pytest.mark.skipif(
    library.library() is None, reason="needs the native kernels"))])  # fmt: skip
def test_channels_last_parameters_take_the_steps_of_contiguous_ones(fused):
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(torch.zeros(32, 16, 3, 3).to(memory_format=memory_format))
        optimizer = DiffGrad([parameter], lr=0.01, state_bits=8, fused=fused)
        train(optimizer, [parameter], 4, kept=lambda g, f=memory_format: g.to(memory_format=f))
        ends.append(parameter)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


def test_float64_parameters_keep_their_precision():
    parameter = nn.Parameter(torch.full((64, 64), 1 + 2.0**-40, dtype=torch.float64))
    optimizer = DiffGrad([parameter], lr=0.01, state_bits=8)
    for _ in range(2):
        parameter.grad = torch.zeros(64, 64, dtype=torch.float64)
        optimizer.step()
    assert (parameter == 1 + 2.0**-40).all()


def test_32_bits_are_one_batch_and_8_bits_batches_of_bounded_size(monkeypatch):
    monkeypatch.setattr(quantized_state, "BATCH_ELEMENTS", 10)
    tensors = [torch.zeros(n) for n in (4, 6, 1, 30, 2, 3)]
    assert [[t.numel() for t in batch] for batch in batches(tensors)] == [[4, 6], [1], [30], [2, 3]]
    assert [len(batch) for batch in batches(tensors, 32)] == [6]
    assert list(batches([])) == []
