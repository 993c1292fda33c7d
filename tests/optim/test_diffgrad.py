import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ranks import run_ranks
from torch import nn

from headway.optim.blockwise_8bit import Adam8bit
from headway.optim.diffgrad import DiffGrad
from headway.optim.quantized_state import create
from headway.testing import check_optimizer

OFFICIAL = json.loads((Path(__file__).parent / "data" / "diffgrad_official.json").read_text())["weights"]


def single(value, dtype=torch.float64):
    return nn.Parameter(torch.tensor(value, dtype=dtype))


def feed(optimizer, parameter, gradients):
    """The parameter after each step."""
    seen = []
    for gradient in gradients:
        parameter.grad = torch.as_tensor(gradient, dtype=parameter.dtype).clone()
        optimizer.step()
        seen.append(parameter.detach().clone())
    return seen


def moves(make, gradients, size):
    """What each step changed, from zero."""
    parameter = single([0.0] * size)
    points = [torch.zeros(size, dtype=torch.float64), *feed(make([parameter]), parameter, gradients)]
    return torch.stack([after - before for before, after in pairwise(points)])


def noise(steps, size, seed=0):
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"weight_decay": 0.1, "decoupled": True},
        {"weight_decay": 0.1, "betas": (0.95, 0.99), "maximize": True},
        {"fused": False},
    ],
    ids=str,
)
def test_contract(hyperparameters):
    check_optimizer(DiffGrad, **hyperparameters)


@pytest.mark.parametrize("name", OFFICIAL)
def test_fifty_steps_equal_the_authors_second_version(name):
    """The data file names the commit; weights and gradients are the formulas below."""
    shapes = [(4, 3), (5,), (3, 4)]

    def line(shape):
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float32)

    parameters = [nn.Parameter(torch.sin(line(s) * 0.7 + i).reshape(s)) for i, s in enumerate(shapes)]
    optimizer = DiffGrad(parameters, lr=0.01, weight_decay=float(name.split("=")[1]))
    for step in range(1, 51):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.cos(line(shapes[i]) ** 1.3 * 0.9 + i + 0.37 * step).reshape(shapes[i])
        optimizer.step()
        for parameter, expected in zip(parameters, OFFICIAL[name].get(str(step), []), strict=False):
            torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_the_step_lies_between_half_of_adams_and_adams(seed, scale):
    gradients = scale * noise(12, 6, seed)
    ours = moves(lambda p: DiffGrad(p, lr=0.1), gradients, 6)
    adam = moves(lambda p: torch.optim.Adam(p, lr=0.1), gradients, 6)
    xi = ours / adam
    assert (xi >= 0.5 - 1e-9).all()
    assert (xi <= 1 + 1e-9).all()


def test_constant_gradient_gives_half_of_adams_step_from_the_second_on():
    gradient = [0.3, -2.0, 1e-4]
    ours = moves(lambda p: DiffGrad(p, lr=0.1), [gradient] * 50, 3)
    adam = moves(lambda p: torch.optim.Adam(p, lr=0.1), [gradient] * 50, 3)
    torch.testing.assert_close(ours[1:], adam[1:] / 2, rtol=1e-12, atol=1e-15)
    xi = torch.tensor(gradient, dtype=torch.float64).abs().sigmoid()
    torch.testing.assert_close(ours[0], adam[0] * xi, rtol=1e-12, atol=0)


def test_large_alternating_gradient_gives_adam():
    gradients = [[50.0 * (-1) ** step] for step in range(30)]
    ours = moves(lambda p: DiffGrad(p, lr=0.1), gradients, 1)
    adam = moves(lambda p: torch.optim.Adam(p, lr=0.1), gradients, 1)
    torch.testing.assert_close(ours, adam, rtol=1e-6, atol=0)


@pytest.mark.parametrize("decoupled", [False, True])
def test_negated_gradients_and_parameters_negate_the_trajectory(decoupled):
    ends = []
    for sign in (1, -1):
        parameter = single([0.5 * sign, -1.0 * sign, 2.0 * sign])
        optimizer = DiffGrad([parameter], lr=0.05, weight_decay=0.1, decoupled=decoupled)
        ends.append(sign * feed(optimizer, parameter, sign * noise(20, 3))[-1])
    assert torch.equal(*ends)


def test_the_scale_of_the_loss_matters_and_a_vanishing_one_gives_half_of_adam():
    gradients = noise(20, 4)
    adam = moves(lambda p: torch.optim.Adam(p, lr=0.1, eps=0.0), gradients, 4)
    adam_scaled = moves(lambda p: torch.optim.Adam(p, lr=0.1, eps=0.0), 8 * gradients, 4)
    torch.testing.assert_close(adam, adam_scaled)
    one, eight, tiny = (moves(lambda p: DiffGrad(p, lr=0.1, eps=0.0), c * gradients, 4) for c in (1, 8, 1e-9))
    assert (eight.abs() > one.abs() * 1.01).any()
    torch.testing.assert_close(tiny, adam / 2, rtol=1e-8, atol=0)


def test_gradients_overwritten_in_place_give_the_same_as_fresh_ones():
    gradients = noise(10, 3)
    fresh, reused = single([0.0] * 3), single([0.0] * 3)
    expected = feed(DiffGrad([fresh], lr=0.1), fresh, gradients)[-1]
    optimizer = DiffGrad([reused], lr=0.1)
    reused.grad = torch.zeros_like(reused)
    for gradient in gradients:
        optimizer.zero_grad(set_to_none=False)
        reused.grad += gradient
        optimizer.step()
    assert torch.equal(reused, expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_gradient_is_only_read(weight_decay):
    parameter = single([1.0, -2.0])
    feed(DiffGrad([parameter], weight_decay=weight_decay), parameter, [[0.3, 0.4]])
    assert parameter.grad.tolist() == [0.3, 0.4]


def test_without_decay_decoupling_changes_nothing_and_coupled_decay_enters_the_friction():
    gradients = noise(10, 2)
    ends = {}
    for decoupled in (False, True):
        for decay in (0.0, 0.5):
            parameter = single([1.0, -2.0])
            optimizer = DiffGrad([parameter], lr=0.1, weight_decay=decay, decoupled=decoupled)
            ends[decoupled, decay] = feed(optimizer, parameter, gradients)[-1]
            previous = optimizer.state[parameter]["previous_grad"]
            assert torch.equal(previous, gradients[-1]) == (decoupled or decay == 0)
    assert torch.equal(ends[False, 0.0], ends[True, 0.0])
    assert not torch.equal(ends[False, 0.5], ends[True, 0.5])


def test_decoupled_decay_is_that_of_adamw():
    parameter, reference = single([1.0, -2.0]), single([1.0, -2.0])
    gradients = [[50.0 * (-1) ** step, -60.0 * (-1) ** step] for step in range(10)]  # xi is 1
    ours = feed(DiffGrad([parameter], lr=0.1, weight_decay=0.2, decoupled=True), parameter, gradients)[-1]
    theirs = feed(torch.optim.AdamW([reference], lr=0.1, weight_decay=0.2), reference, gradients)[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_a_step_without_gradient_leaves_the_state_alone():
    present, absent = single([1.0]), single([1.0])
    optimizer = DiffGrad([present, absent])
    for parameter in (present, absent):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[absent])
    absent.grad = None
    optimizer.step()
    assert optimizer.state[absent] == before
    assert (optimizer.state[present]["step"], optimizer.state[absent]["step"]) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_three_numbers_per_entry_in_fp32_and_is_restored_exactly(dtype):
    parameter, other = single([1.0, -2.0, 0.5], dtype), single([0.0] * 3, dtype)
    optimizer, fresh = DiffGrad([parameter], lr=0.1), DiffGrad([other], lr=0.1)
    feed(optimizer, parameter, noise(4, 3))
    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq", "previous_grad"}
    assert optimizer.state_bytes() == 3 * 3 * 4
    other.data.copy_(parameter.detach())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {v.dtype for v in fresh.state[other].values() if isinstance(v, torch.Tensor)} == {torch.float32}
    ends = [feed(o, p, noise(4, 3, seed=1))[-1] for o, p in ((optimizer, parameter), (fresh, other))]
    assert torch.equal(*ends)


def test_previous_gradient_of_bfloat16_parameters_is_not_rounded():
    """Rounded, two gradients would differ where they are equal."""
    parameter = single([0.0], torch.bfloat16)
    optimizer = DiffGrad([parameter], weight_decay=1e-3)
    parameter.data.fill_(1.0)
    feed(optimizer, parameter, [[1.0]])
    assert optimizer.state[parameter]["previous_grad"].item() == pytest.approx(1.001, abs=1e-6)


def test_contract_with_8_bit_moments(monkeypatch):
    """The contract's tensors are small, so the smallest size that is quantised is taken down."""
    monkeypatch.setitem(create.__kwdefaults__, "min_size", 0)
    check_optimizer(DiffGrad, state_bits=8, weight_decay=0.1)


def test_8_bit_moments_leave_the_previous_gradient_exact_and_the_first_step_unchanged():
    gradients, points = noise(1, 5000).float(), []
    for bits in (32, 8):
        parameter = nn.Parameter(torch.zeros(5000))
        optimizer = DiffGrad([parameter], lr=0.1, state_bits=bits)
        points += feed(optimizer, parameter, gradients)
    assert torch.equal(*points)
    state = optimizer.state[parameter]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.uint8, torch.uint8)
    assert torch.equal(state["previous_grad"], gradients[0])
    assert optimizer.state_bytes() == 2 * (5000 + 4 * 20) + 4 * 5000


def test_a_constant_gradient_gives_half_of_8_bit_adams_step():
    """With a quantised previous gradient the friction would be above one half.

    The entries lie within a factor 100 of each other: below, both keep v with its own rounding.
    """
    gradient = noise(1, 4096)[0]
    gradient = 10 * gradient.sign() * (0.05 + gradient.abs())
    ours = moves(lambda p: DiffGrad(p, lr=0.1, state_bits=8), [gradient] * 10, 4096)
    adam = moves(lambda p: Adam8bit(p, lr=0.1), [gradient] * 10, 4096)
    torch.testing.assert_close(ours[1:], adam[1:] / 2, rtol=1e-4, atol=1e-7)


def test_bad_values_are_refused_with_their_name():
    parameter = single([1.0])
    with pytest.raises(ValueError, match=r"lr must be >= 0, got -0.1"):
        DiffGrad([parameter], lr=-0.1)
    with pytest.raises(ValueError, match=r"betas must be 2 numbers in \[0, 1\), got \(0.9, 1.0\)"):
        DiffGrad([{"params": [parameter], "betas": (0.9, 1.0)}])
    with pytest.raises(ValueError, match="params must be real"):
        DiffGrad([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def _sharded(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = noise(5, 3).float()
    parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = DiffGrad([parameter], lr=0.1, weight_decay=0.1)
    for step in range(4):
        parameter.grad = distribute_tensor(noise(5, 3, seed=step).float(), mesh, [Shard(0)])
        optimizer.step()
    rows = 3 if rank == 0 else 2
    assert optimizer.state_bytes() == 3 * 4 * rows * 3
    result = parameter.full_tensor()
    if rank == 0:
        torch.save(result.detach(), f"{folder}/weight.pt")


def test_sharded_parameters_take_the_steps_of_whole_ones(tmp_path):
    run_ranks(_sharded, tmp_path)
    parameter = nn.Parameter(noise(5, 3).float())
    optimizer = DiffGrad([parameter], lr=0.1, weight_decay=0.1)
    for step in range(4):
        parameter.grad = noise(5, 3, seed=step).float()
        optimizer.step()
    torch.testing.assert_close(torch.load(tmp_path / "weight.pt"), parameter.detach(), rtol=1e-6, atol=1e-7)
