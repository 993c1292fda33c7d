import math

import pytest
import torch
from tests.ranks import run_ranks
from torch import nn
from torch.func import functional_call

from headway.optim.consensus import consensus_weights
from headway.optim.consensus_based_optimization import ConsensusBasedOptimizer, ModuleCBO
from headway.testing import check_optimizer


def parameters(dtype=torch.float64):
    return [nn.Parameter(torch.zeros(2, 2, dtype=dtype)), nn.Parameter(torch.ones((), dtype=dtype))]


def loss(params):
    matrix, scalar = params
    return (matrix - 1).abs().sum() + (scalar + 1).square()


def evaluate(optimizer, params, f=loss):
    """The losses of all particles, from the optimizer's state."""
    stacked = [optimizer.state[p]["particles"] for p in params]
    return torch.stack([f([x[i] for x in stacked]) for i in range(len(stacked[0]))])


@pytest.mark.parametrize(
    "options", [{"n_particles": 30, "alpha": 10.0}, {"n_particles": 20, "noise": "isotropic", "sigma": 0.3}], ids=str
)
def test_contract(options):
    check_optimizer(ConsensusBasedOptimizer, **options)


@pytest.mark.parametrize("noise", ["anisotropic", "isotropic"])
def test_a_step_is_the_rule_over_all_parameters_together(noise):
    params = parameters()
    optimizer = ConsensusBasedOptimizer(
        params, n_particles=8, lr=0.05, lam=2.0, sigma=0.0, alpha=3.0, noise=noise, init_std=1.0
    )
    optimizer.step(lambda: loss(params))
    particles = [optimizer.state[p]["particles"].clone() for p in params]
    energies = evaluate(optimizer, params)
    weights = consensus_weights(energies, 3.0)
    lowest = optimizer.step(lambda: loss(params))
    assert float(lowest) == float(energies.min())
    for p, x in zip(params, particles, strict=True):
        v = torch.tensordot(weights, x, dims=1)
        torch.testing.assert_close(p.detach(), v)
        torch.testing.assert_close(optimizer.state[p]["particles"], x - 2.0 * 0.05 * (x - v))


def test_isotropic_noise_has_the_width_of_the_distance_over_all_parameters():
    params = [nn.Parameter(torch.zeros(5000)), nn.Parameter(torch.zeros(3000))]
    optimizer = ConsensusBasedOptimizer(
        params, n_particles=3, lr=0.25, lam=0.0, sigma=2.0, noise="isotropic", init_std=1.0
    )
    optimizer.step(lambda: params[0].abs().max())  # particle 0, at zero, is the consensus
    start = ConsensusBasedOptimizer(params, n_particles=3, lr=1e-12, sigma=0.0, init_std=1.0)
    assert torch.equal(params[0], torch.zeros(5000))
    start.step(lambda: params[0].abs().max())
    before = torch.cat([start.state[p]["particles"] for p in params], dim=1)
    after = torch.cat([optimizer.state[p]["particles"] for p in params], dim=1)
    width = 2.0 * 0.5 * before.norm(dim=1)
    assert (after - before).std(1)[1:].tolist() == pytest.approx(width[1:].tolist(), rel=0.05)
    assert torch.equal(after[0], torch.zeros(8000))


def test_the_parameters_themselves_are_among_the_first_particles_so_that_a_start_at_the_minimum_stays():
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.tensor(-1.0))]
    optimizer = ConsensusBasedOptimizer(params, n_particles=20, init_std=1.0)
    for _ in range(5):
        assert float(optimizer.step(lambda: loss(params))) == 0
    assert torch.equal(params[0], torch.ones(2, 2))


def test_it_minimises_without_gradients():
    params = parameters()
    optimizer = ConsensusBasedOptimizer(params, n_particles=60, lr=0.02, init_std=1.0)

    def closure():
        assert not torch.is_grad_enabled()
        return loss(params)

    for _ in range(300):
        optimizer.step(closure)
    assert float(loss(params).detach()) < 1e-2
    assert all(p.grad is None for p in params)


def test_lost_evaluations_have_no_weight_and_all_lost_change_nothing():
    params = parameters()
    optimizer = ConsensusBasedOptimizer(params, n_particles=10, init_std=1.0)
    calls = []

    def flaky():
        calls.append(1)
        return loss(params) * (math.nan if len(calls) % 2 else 1)

    optimizer.step(flaky)
    assert all(p.isfinite().all() for p in params)
    before = [p.detach().clone() for p in params]
    state = {p: optimizer.state[p]["particles"].clone() for p in params}
    with pytest.raises(FloatingPointError, match="none of 10 energies is finite; nothing was changed"):
        optimizer.step(lambda: loss(params) * math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert all(torch.equal(state[p], optimizer.state[p]["particles"]) for p in params)
    assert optimizer.param_groups[0]["step"] == 1


def test_a_closure_that_fails_leaves_the_parameters_as_they_were():
    params = parameters()
    optimizer = ConsensusBasedOptimizer(params, n_particles=10)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 5:
            raise KeyError("worker")
        return loss(params)

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))
    assert not optimizer.state


def test_lam_lr_above_one_is_refused_also_when_a_scheduler_gets_there():
    params = parameters()
    with pytest.raises(ValueError, match=r"lam \* lr must be <= 1.*got 2.0"):
        ConsensusBasedOptimizer(params, lam=4.0, lr=0.5)
    optimizer = ConsensusBasedOptimizer(params, n_particles=4, lr=0.5)
    optimizer.param_groups[0]["lr"] = 1.5
    with pytest.raises(ValueError, match=r"lam \* lr"):
        optimizer.step(lambda: loss(params))


@pytest.mark.parametrize(("name", "value"), [("n_particles", 9), ("alpha", 1.0), ("noise", "isotropic")])
def test_what_all_particles_share_must_be_the_same_in_all_groups(name, value):
    matrix, scalar = parameters()
    with pytest.raises(ValueError, match=f"{name} must be the same in all groups, got {value!r}"):
        ConsensusBasedOptimizer([{"params": matrix}, {"params": scalar, name: value}])


def test_bfloat16_parameters_have_fp32_particles_that_survive_a_state_dict():
    params = parameters(torch.bfloat16)
    optimizer = ConsensusBasedOptimizer(params, n_particles=10)
    optimizer.step(lambda: loss(params))
    loaded = ConsensusBasedOptimizer(params, n_particles=10)
    loaded.load_state_dict(optimizer.state_dict())
    for p in params:
        assert loaded.state[p]["particles"].dtype == torch.float32
        assert torch.equal(loaded.state[p]["particles"], optimizer.state[p]["particles"])


def test_generator_gives_the_seed_and_the_default_is_fixed():
    def first(generator=None):
        params = parameters()
        optimizer = ConsensusBasedOptimizer(params, n_particles=10, generator=generator)
        optimizer.step(lambda: loss(params))
        return optimizer.state[params[0]]["particles"].tolist()

    assert first() == first()
    assert first(torch.Generator().manual_seed(5)) == first(torch.Generator().manual_seed(5)) != first()


def step_on_parts(rank, folder):
    params = parameters()
    optimizer = ConsensusBasedOptimizer(
        params, n_particles=10, init_std=1.0, process_group=torch.distributed.group.WORLD
    )
    torch.manual_seed(rank)  # the ranks' own random streams differ
    for _ in range(4):
        optimizer.step(lambda: (1.5 if rank else 0.5) * loss(params))
    torch.save([list(params), optimizer.state_dict()["state"]], f"{folder}/{rank}.pt")


def test_losses_are_averaged_over_ranks_and_all_ranks_draw_the_same(tmp_path):
    run_ranks(step_on_parts, tmp_path)
    whole = parameters()
    optimizer = ConsensusBasedOptimizer(whole, n_particles=10, init_std=1.0)
    for _ in range(4):
        optimizer.step(lambda: loss(whole))
    for rank in (0, 1):
        params, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for index, (a, b) in enumerate(zip(params, whole, strict=True)):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(state[index]["particles"], optimizer.state[b]["particles"])


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def batch(dtype=torch.float32):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, x[:, :1].sign()


def error_rate(model, x, y):
    """Piecewise constant: no gradient anywhere."""
    return (model(x).sign() != y).float().mean() + 0.01 * (model(x) - y).abs().mean()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_vectorised_losses_are_those_of_the_particles_one_by_one(chunk_size):
    module, (x, y) = network(), batch()
    module[0].bias.requires_grad_(False)
    trainer = ModuleCBO(module, error_rate, n_particles=7, chunk_size=chunk_size)
    losses = trainer.losses(x, y)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert "0.bias" not in names
    for particle, measured in zip(trainer.cbo.x, losses, strict=True):
        values, at = {}, 0
        for name in names:
            p = module.get_parameter(name)
            values[name] = particle[at : at + p.numel()].view_as(p)
            at += p.numel()
        expected = error_rate(lambda inputs, values=values: functional_call(module, values, (inputs,)), x, y)
        torch.testing.assert_close(measured, expected.detach())
    assert trainer.cbo.x.shape == (7, at)


def test_the_first_particle_is_the_module_and_a_step_leaves_the_consensus_in_it():
    module, (x, y) = network(), batch()
    trainer = ModuleCBO(module, error_rate, n_particles=20)
    torch.testing.assert_close(trainer.losses(x, y)[0], error_rate(module, x, y).detach())
    lowest = trainer.step(x, y)
    flat = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    torch.testing.assert_close(flat, trainer.cbo.consensus)
    assert lowest == trainer.cbo.best_f


def test_a_small_network_learns_a_loss_without_gradient():
    module, (x, y) = network(), batch()
    trainer = ModuleCBO(module, error_rate, n_particles=100, init_std=1.0, dt=0.05, sigma=2.0)
    for _ in range(100):
        trainer.step(x, y)
    assert (module(x).sign() == y).all()


def test_frozen_parameters_buffers_and_random_state_are_not_touched():
    module, (x, y) = network(), batch()
    module[2].requires_grad_(False)
    before, state = module[2].weight.clone(), torch.get_rng_state()
    trainer = ModuleCBO(module, error_rate, n_particles=10)
    for _ in range(3):
        trainer.step(x, y)
    assert torch.equal(before, module[2].weight)
    assert torch.equal(state, torch.get_rng_state())


def test_bfloat16_modules_have_fp32_particles():
    module, (x, y) = network(torch.bfloat16), batch(torch.bfloat16)
    trainer = ModuleCBO(module, error_rate, n_particles=10)
    trainer.step(x, y)
    assert trainer.cbo.x.dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_wrong_arguments_of_the_module_trainer_are_named():
    with pytest.raises(ValueError, match="n_particles must be a whole number >= 2, got 1"):
        ModuleCBO(network(), error_rate, n_particles=1)
    with pytest.raises(ValueError, match=r"lam \* dt"):
        ModuleCBO(network(), error_rate, dt=2.0)
    with pytest.raises(ValueError, match="parameter that requires a gradient"):
        ModuleCBO(network().requires_grad_(False), error_rate)
    trainer = ModuleCBO(network(), error_rate, n_particles=4)
    with pytest.raises(FloatingPointError, match="none of 4"):
        trainer.step(batch()[0] * math.nan, batch()[1] * math.nan)
