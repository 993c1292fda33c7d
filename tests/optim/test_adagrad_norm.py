import copy

import pytest
import torch
from tests.ranks import run_ranks
from torch import nn

from headway.optim.adagrad_norm import AdaGradNorm
from headway.testing import check_optimizer


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feed(optimizer, parameters, steps, seed=0):
    """Steps on gradients that depend on the step alone; returns v after each."""
    seen = []
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = noise(*p.shape, seed=100 * (seed + step) + i).to(p.dtype)
        optimizer.step()
        seen.append(float(optimizer.v))
    return seen


def weights(*shapes, dtype=torch.float64):
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


@pytest.mark.parametrize(
    "hyperparameters", [{}, {"lr": 0.1, "weight_decay": 0.1}, {"v_init": 0.0, "eps": 0.0}], ids=str
)
def test_contract(hyperparameters):
    check_optimizer(AdaGradNorm, **hyperparameters)


def test_one_scalar_of_all_squared_norms():
    parameters = weights((2, 3), (4,), ())
    expected = [p.detach().clone() for p in parameters]
    optimizer, v = AdaGradNorm(parameters, lr=0.7, v_init=0.5, eps=0.1), 0.5
    for step in range(5):
        feed(optimizer, parameters, 1, seed=step)
        v += sum(float(p.grad.square().sum()) for p in parameters)
        expected = [x - 0.7 * p.grad / (v**0.5 + 0.1) for x, p in zip(expected, parameters, strict=True)]
        assert float(optimizer.v) == pytest.approx(v, rel=1e-14)
        for p, x in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-13, atol=1e-14)


def test_one_entry_equals_adagrad():
    ours, theirs = weights((1,)), weights((1,))
    feed(AdaGradNorm(ours, lr=0.5, v_init=0.2), ours, 20)
    adagrad = torch.optim.Adagrad(theirs, lr=0.5, initial_accumulator_value=0.2, eps=1e-10)
    for step in range(20):
        theirs[0].grad = noise(1, seed=100 * step)
        adagrad.step()
    torch.testing.assert_close(ours[0].detach(), theirs[0].detach(), rtol=1e-13, atol=0)


def test_several_entries_do_not_equal_adagrad():
    ours, theirs = weights((3,)), weights((3,))
    feed(AdaGradNorm(ours), ours, 3)
    adagrad = torch.optim.Adagrad(theirs, lr=1.0, initial_accumulator_value=0.01)
    for step in range(3):
        theirs[0].grad = noise(3, seed=100 * step)
        adagrad.step()
    assert (ours[0] - theirs[0]).abs().max() > 0.1


def test_v_never_decreases_and_starts_at_v_init():
    parameters = weights((5,))
    optimizer = AdaGradNorm(parameters, v_init=0.3)
    assert optimizer.v == 0.3
    seen = [0.3, *feed(optimizer, parameters, 20)]
    assert seen == sorted(seen)


def test_groups_have_their_own_rates_and_share_v():
    first, second = weights((2,)), weights((3,))
    optimizer = AdaGradNorm(
        [{"params": first, "lr": 0.5}, {"params": second, "weight_decay": 0.0}], v_init=0.0, eps=0.0
    )
    feed(optimizer, [*first, *second], 1)
    root = float(first[0].grad.square().sum() + second[0].grad.square().sum()) ** 0.5
    torch.testing.assert_close(first[0].detach(), 1 - 0.5 * first[0].grad / root)
    torch.testing.assert_close(second[0].detach(), 1 - second[0].grad / root)


def test_weight_decay_pulls_towards_zero():
    (parameter,) = weights((2,))
    parameter.grad = torch.zeros_like(parameter)
    AdaGradNorm([parameter], lr=0.1, weight_decay=0.1).step()
    assert (parameter < 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_restored_state_goes_on_exactly(dtype):
    parameters = weights((2, 2), (3,), dtype=dtype)
    optimizer = AdaGradNorm(parameters)
    feed(optimizer, parameters, 4)
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = AdaGradNorm(copies, lr=3.0, v_init=7.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert feed(resumed, copies, 4, seed=9) == feed(optimizer, parameters, 4, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


@pytest.mark.parametrize("name", ["v_init", "mode", "variant", "initial_accumulator"])
def test_a_group_cannot_set_what_is_one_for_all(name):
    with pytest.raises(ValueError, match=f"a parameter group may set lr, eps, weight_decay, got {name}"):
        AdaGradNorm([{"params": weights((1,)), name: 1}])


def test_bad_values_are_refused_with_their_name():
    with pytest.raises(ValueError, match=r"lr must be > 0, got 0.0"):
        AdaGradNorm(weights((1,)), lr=0.0)
    with pytest.raises(ValueError, match=r"v_init must be >= 0, got -1.0"):
        AdaGradNorm(weights((1,)), v_init=-1.0)


def _sharded(rank, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(noise(5, 3).float(), mesh, [Shard(0)]))
    optimizer = AdaGradNorm([parameter], process_group=dist.group.WORLD)
    for step in range(4):
        parameter.grad = distribute_tensor(noise(5, 3, seed=step).float(), mesh, [Shard(0)])
        optimizer.step()
    whole = parameter.full_tensor()
    if rank == 0:
        torch.save((whole.detach(), float(optimizer.v)), f"{folder}/result.pt")


def test_sharded_parameters_take_the_steps_of_whole_ones(tmp_path):
    run_ranks(_sharded, tmp_path)
    parameter = nn.Parameter(noise(5, 3).float())
    optimizer = AdaGradNorm([parameter])
    for step in range(4):
        parameter.grad = noise(5, 3, seed=step).float()
        optimizer.step()
    weight, v = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-6, atol=1e-7)
    assert v == pytest.approx(float(optimizer.v), rel=1e-6)
