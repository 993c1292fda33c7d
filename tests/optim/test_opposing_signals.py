import copy
import math

import pytest
import torch
from tests.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from headway.optim.opposing_signals import SplitSGD
from headway.testing import check_optimizer

HUGE = torch.finfo(torch.float32).max


def weights(shapes=((6, 4), (5,), ()), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(parameters, step)
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantile": None, "threshold": 1.0, "momentum": 0.5, "dampening": 0.0},
        {"quantile": 0.5, "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
def test_contract(options):
    check_optimizer(SplitSGD, **options)


def test_with_no_entry_above_the_threshold_and_no_momentum_it_is_plain_sgd_to_the_bit():
    ours, theirs = weights(), weights()
    optimizer = SplitSGD(ours, lr=0.1, momentum=0.0, dampening=0.0, threshold=HUGE, quantile=None, weight_decay=0.01)
    train(optimizer, ours, 5)
    train(torch.optim.SGD(theirs, lr=0.1, weight_decay=0.01), theirs, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("momentum", "dampening"), [(0.9, 0.9), (0.8, 0.5), (0.9, 0.0)])
def test_with_no_entry_above_the_threshold_it_is_torch_sgd_from_a_zero_buffer_up_to_the_debias_factor(
    momentum, dampening
):
    ours, theirs = weights(), weights()
    optimizer = SplitSGD(ours, lr=0.1, momentum=momentum, dampening=dampening, threshold=HUGE, quantile=None)
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, dampening=dampening)
    for parameter in theirs:  # torch starts from the first gradient itself
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    for step in range(6):
        train(optimizer, ours, 1, step)
        sgd.param_groups[0]["lr"] = 0.1 / (1 - dampening ** (step + 1))
        train(sgd, theirs, 1, step)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_threshold_zero_is_sign_descent_on_the_momentum_and_zero_momentum_does_not_move():
    ours, theirs = weights(), weights()
    optimizer = SplitSGD(ours, sign_lr=0.01, threshold=0.0, quantile=None)
    momenta = [torch.zeros_like(parameter) for parameter in theirs]
    for step in range(6):
        set_gradients(ours, step)
        ours[0].grad[0] = 0
        optimizer.step()
        set_gradients(theirs, step)
        theirs[0].grad[0] = 0
        for parameter, m in zip(theirs, momenta, strict=True):
            m.mul_(0.9).add_(parameter.grad, alpha=1 - 0.9)
            parameter.data -= 0.01 * m.sign()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours[0][0], weights()[0][0])


def test_at_the_threshold_exactly_the_sgd_branch_applies():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = SplitSGD([weight], lr=1.0, sign_lr=0.01, momentum=0.0, dampening=0.0, threshold=0.5, quantile=None)
    weight.grad = torch.tensor([0.5, -0.5, 0.5 + 2**-24])  # the next float32
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.5, 0.5, -0.01]), rtol=0, atol=0)


def test_no_entry_moves_further_than_the_larger_of_both_steps():
    parameters = weights()
    optimizer = SplitSGD(parameters, lr=0.7, sign_lr=0.05, threshold=0.2, quantile=None)
    for step in range(8):
        before = [parameter.detach().clone() for parameter in parameters]
        train(optimizer, parameters, 1, step)
        for a, b in zip(before, parameters, strict=True):
            assert (a - b).abs().max() <= max(0.7 * 0.2, 0.05) + 1e-6


@pytest.mark.parametrize("quantile", [0.01, 0.1, 0.34, 0.9])
def test_at_most_the_fraction_of_all_entries_takes_the_sign_step(quantile):
    parameters = weights()
    optimizer = SplitSGD(parameters, lr=1e-6, sign_lr=1.0, momentum=0.0, dampening=0.0, quantile=quantile)
    before = [parameter.detach().clone() for parameter in parameters]
    train(optimizer, parameters, 1)
    moved = sum(int(((a - b).abs() > 0.5).sum()) for a, b in zip(before, parameters, strict=True))
    assert moved == int(quantile * 30)
    assert optimizer.sign_fraction() == moved / 30


def test_the_quantile_is_over_all_tensors_and_groups():
    small, large = weights([(10,), (10,)])
    optimizer = SplitSGD([{"params": [small]}, {"params": [large]}], lr=1e-6, sign_lr=1.0, quantile=0.5)
    before = small.detach().clone()
    small.grad, large.grad = torch.linspace(0.1, 0.2, 10), torch.linspace(10, 20, 10)
    optimizer.step()
    assert (small - before).abs().max() < 1e-5
    assert optimizer.sign_fraction() == 0.5


def test_ties_at_the_quantile_take_the_sgd_branch():
    weight = nn.Parameter(torch.zeros(10))
    optimizer = SplitSGD([weight], quantile=0.3)
    weight.grad = torch.ones(10)
    optimizer.step()
    assert optimizer.sign_fraction() == 0


def test_a_scheduler_on_lr_scales_both_steps():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SplitSGD([weight], lr=2.0, sign_lr=0.5, momentum=0.0, dampening=0.0, threshold=1.0, quantile=None)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    weight.grad = torch.tensor([1.0, 4.0])
    optimizer.step()
    assert weight.tolist() == [-0.5, -0.125]


def test_with_a_constant_threshold_shrinking_gradients_leave_the_sign_branch():
    weight = nn.Parameter(torch.zeros(100))
    optimizer = SplitSGD([weight], lr=0.0001, threshold=0.5, quantile=None)
    assert math.isnan(optimizer.sign_fraction())
    fractions = []
    for step in range(60):
        set_gradients([weight], step)
        weight.grad *= 0.9**step
        optimizer.step()
        fractions.append(optimizer.sign_fraction())
    assert fractions[0] > 0.5
    assert fractions[-1] == 0


def test_one_of_threshold_and_quantile_must_be_none():
    parameters = weights()
    with pytest.raises(
        ValueError, match=r"one of threshold and quantile must be None, got threshold=0.1 and quantile=0.1"
    ):
        SplitSGD(parameters, threshold=0.1)
    with pytest.raises(ValueError, match="one of threshold and quantile"):
        SplitSGD(parameters, quantile=None)
    optimizer = SplitSGD(parameters)
    with pytest.raises(ValueError, match="one of threshold and quantile"):
        optimizer.add_param_group({"params": weights(), "threshold": 0.5})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="real"):
        SplitSGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])


def test_momentum_of_bfloat16_parameters_stays_fp32_through_a_state_dict():
    parameters = weights(dtype=torch.bfloat16)
    optimizer = SplitSGD(parameters, lr=0.1)
    train(optimizer, parameters, 3)
    others = copy.deepcopy(parameters)
    loaded = SplitSGD(others, lr=0.3)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {state["momentum_buffer"].dtype for state in loaded.state.values()} == {torch.float32}
    train(optimizer, parameters, 3, 3)
    train(loaded, others, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def sharded_steps(rank, folder):
    def network():
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model

    def steps(model, optimizer):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        for _ in range(4):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    results = {}
    for name, rule in {"threshold": {"threshold": 0.1, "quantile": None}, "quantile": {"quantile": 0.3}}.items():
        whole, sharded = network(), network()
        fully_shard(sharded)
        group = torch.distributed.group.WORLD if name == "quantile" else None
        if group is not None:
            with pytest.raises(ValueError, match=r"SplitSGD does not take sharded parameters.*give process_group"):
                SplitSGD(sharded.parameters(), **rule)
        optimizer = SplitSGD(sharded.parameters(), lr=0.1, process_group=group, **rule)
        steps(sharded, optimizer)
        steps(whole, SplitSGD(whole.parameters(), lr=0.1, **rule))
        results[name] = (list(whole.parameters()), [p.full_tensor() for p in sharded.parameters()])
        assert all(hasattr(state["momentum_buffer"], "placements") for state in optimizer.state.values())
    torch.save(results, f"{folder}/{rank}.pt")


def test_shards_take_the_steps_of_whole_tensors(tmp_path):
    run_ranks(sharded_steps, tmp_path)
    for rank in (0, 1):
        for whole, sharded in torch.load(tmp_path / f"{rank}.pt", weights_only=True).values():
            for a, b in zip(whole, sharded, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
