import copy
import io
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from headway.optim import spam
from headway.optim.quantized_state import create
from headway.optim.spam import SPAM, spam_param_groups, warmup_factor
from headway.testing import check_optimizer

OFFICIAL = json.loads((Path(__file__).parent / "data" / "spam_official.json").read_text())


def weights(shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def set_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = scale * gradient.to(parameter.dtype)


def train(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(parameters, step)
        optimizer.step()


def state_indices(optimizer, parameter):
    return optimizer.state[parameter]["indices"]


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"reset_interval": 3, "warmup_steps": 1, "clip_delay": 1, "threshold": 2.0, "weight_decay": 0.1},
        {"reset_interval": 0, "clip_delay": 0, "threshold": 1.0, "fused": False},
    ],
    ids=str,
)
def test_contract(hyperparameters):
    check_optimizer(SPAM, **hyperparameters)


def test_contract_with_sparse_moments(monkeypatch):
    """The contract's tensors of all shapes share groups, so the check for matrices is taken out."""
    monkeypatch.setattr(spam, "_check_sparse", lambda *_: None)
    check_optimizer(SPAM, density=0.5, reset_interval=3, warmup_steps=1, weight_decay=0.1, reset_step=True)


@pytest.mark.parametrize("name", OFFICIAL["weights"])
def test_fifty_steps_equal_the_authors_code(name, monkeypatch):
    """The data file names the commit; weights and gradients are the formulas below, the masks are the authors'."""
    shapes = [(4, 3), (5,), (3, 4)]

    def line(shape):
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float32)

    parameters = [nn.Parameter(torch.sin(line(s) * 0.7 + i).reshape(s)) for i, s in enumerate(shapes)]
    groups = [{"params": parameters}]
    options = {"dense": {"weight_decay": 0.1}}.get(name, {"threshold": 4})
    if name == "sparse":
        groups = [{"params": [parameters[0], parameters[2]], "density": 0.5}, {"params": [parameters[1]]}]
        masks = iter([torch.tensor(mask, dtype=torch.int32) for draw in OFFICIAL["masks"] for mask in draw])
        monkeypatch.setattr(spam, "_draw_mask", lambda *_, **__: next(masks))
    optimizer = SPAM(groups, lr=0.01, reset_interval=12, warmup_steps=5, clip_delay=3, **options)
    for step in range(1, 51):
        for i, parameter in enumerate(parameters):
            gradient = torch.cos(line(shapes[i]) ** 1.3 * 0.9 + i + 0.37 * step).reshape(shapes[i])
            parameter.grad = gradient * (1000 if step in (10, 30, 43) else 1)
        optimizer.step()
        for parameter, expected in zip(parameters, OFFICIAL["weights"][name].get(str(step), []), strict=False):
            torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_without_reset_and_clipping_it_is_adamw_with_eps_inside_and_decay_after():
    (ours,), (theirs,) = weights([(6, 4)]), weights([(6, 4)])
    lr, (beta1, beta2), eps, decay = 0.01, (0.9, 0.99), 1e-3, 0.1
    train(SPAM([ours], lr, (beta1, beta2), eps, decay, reset_interval=0, threshold=0.0), [ours], 30)
    m = v = torch.zeros(6, 4, dtype=torch.float64)
    for t in range(1, 31):
        set_gradients([theirs], t - 1)
        m = beta1 * m + (1 - beta1) * theirs.grad
        v = beta2 * v + (1 - beta2) * theirs.grad**2
        step = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        theirs.data -= step * m / (v.sqrt() + eps)
        theirs.data *= 1 - lr * decay
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(1.0, 100.0), st.floats(1.0, 1e4))
def test_clipped_gradients_keep_their_sign_and_reach_the_bound_and_others_pass(seed, threshold, size):
    (parameter,) = weights([(20,)])
    optimizer = SPAM([parameter], betas=(0.0, 0.9), threshold=threshold, clip_delay=3, reset_interval=0)
    train(optimizer, [parameter], 5)
    v = optimizer.state[parameter]["exp_avg_sq"].clone()
    set_gradients([parameter], seed % 1000, size)
    optimizer.step()
    entered, g = optimizer.state[parameter]["exp_avg"], parameter.grad  # beta1 = 0: the gradient after clipping
    bound, over = (threshold * v).sqrt(), parameter.grad.square() > threshold * v
    torch.testing.assert_close(entered[over], (g.sign() * bound)[over])
    torch.testing.assert_close(entered[~over], g[~over])
    assert (optimizer.state[parameter]["exp_avg_sq"] <= (0.9 + 0.1 * threshold) * v * (1 + 1e-9)).all()


@pytest.mark.parametrize(("interval", "clipped"), [(0, range(20, 61)), (30, [*range(20, 30), *range(50, 60)])])
def test_clipping_waits_after_the_start_and_after_each_reset(interval, clipped):
    """Gradients grow so fast that every clipping shows in the first moment."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SPAM([parameter], betas=(0.0, 0.999), threshold=100.0, reset_interval=interval)
    seen = []
    for t in range(1, 61):
        parameter.grad = torch.full_like(parameter, 10.0**t)
        optimizer.step()
        if optimizer.state[parameter]["exp_avg"].item() < 0.99 * 10.0**t:
            seen.append(t)
    assert seen == list(clipped)


def test_entries_whose_second_moment_is_zero_are_not_clipped():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SPAM([parameter], betas=(0.0, 0.999), threshold=100.0, clip_delay=0)
    for gradient in ([1.0, 0.0], [1.0, 0.0], [1e6, 1e6]):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    entered = optimizer.state[parameter]["exp_avg"]
    assert entered[0] < 1
    assert entered[1] == 1e6


def test_warm_up_after_a_reset_scales_the_step_and_starts_at_the_reset():
    """With beta1 = beta2 = 0 a constant gradient moves a parameter by lr * phi."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SPAM([parameter], 1.0, (0.0, 0.0), 1e-15, reset_interval=10, warmup_steps=5)
    moves = []
    for _ in range(25):
        before = parameter.item()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moves.append(before - parameter.item())
    phi = [0.01, 0.076317, 0.2575, 0.505, 0.7525, 1, 1, 1, 1, 1]
    assert moves == pytest.approx([1.0] * 9 + phi + phi[:6], abs=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 150])
def test_warm_up_factor_rises_from_a_hundredth_to_one(warmup_steps):
    factors = [warmup_factor(step, warmup_steps) for step in range(warmup_steps + 2)]
    assert factors == sorted(factors)
    assert factors[-1] == factors[warmup_steps] == 1
    assert factors[0] == pytest.approx(0.01 if warmup_steps else 1)


def test_moments_are_zero_before_the_update_of_the_first_reset_step_and_not_one_later():
    (parameter,) = weights([(3, 2)])
    optimizer = SPAM([parameter], reset_interval=5)
    for t in range(1, 12):
        before = copy.deepcopy(optimizer.state[parameter].get("exp_avg"))
        train(optimizer, [parameter], 1, start=t)
        fresh = torch.allclose(optimizer.state[parameter]["exp_avg"], 0.1 * parameter.grad, rtol=1e-12, atol=0)
        assert fresh == (t in (1, 5, 10))
        assert fresh or before is not None
    assert optimizer.state[parameter]["step"] == 11


@pytest.mark.parametrize(("reset_step", "expected"), [(False, [3.16228, 4.24958]), (True, [1.0, 1.0])])
def test_steps_after_a_reset_are_too_large_unless_the_count_restarts(reset_step, expected):
    """lr (1 - beta1^j) / sqrt(1 - beta2^j) for j = 1, 2, once k is large."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SPAM([parameter], 1.0, eps=1e-15, reset_interval=20000, warmup_steps=0, reset_step=reset_step)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[parameter]["step"] = optimizer.param_groups[0]["t"] = 19999
    moves = []
    for _ in range(2):
        before = parameter.item()
        optimizer.step()
        moves.append(before - parameter.item())
    assert moves == pytest.approx(expected, rel=1e-4)


def test_a_parameter_that_joins_late_has_its_own_count_and_the_common_clock():
    first, late, own = weights([(3, 2), (3, 2), (3, 2)])
    optimizer = SPAM([first, late], reset_interval=4)
    train(optimizer, [first], 6)
    train(optimizer, [first, late], 1)
    optimizer.add_param_group({"params": [own]})
    train(optimizer, [first, late, own], 1)
    assert [optimizer.state[p]["step"] for p in (first, late, own)] == [8, 2, 1]
    assert [optimizer.state[p]["resets"] for p in (first, late, own)] == [2, 2, 2]
    assert [group["t"] for group in optimizer.param_groups] == [8, 8]


def test_a_parameter_without_gradient_at_the_reset_is_reset_at_its_next():
    present, absent = weights([(3, 2), (3, 2)])
    optimizer = SPAM([present, absent], reset_interval=4)
    train(optimizer, [present, absent], 3)
    absent.grad = None
    train(optimizer, [present], 2)
    assert [optimizer.state[p]["resets"] for p in (present, absent)] == [1, 0]
    train(optimizer, [present, absent], 1)
    torch.testing.assert_close(optimizer.state[absent]["exp_avg"], 0.1 * absent.grad)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.6])
def test_sparse_moments_cover_the_first_mask_and_only_its_entries_move(density):
    (parameter,) = weights([(13, 7)])
    before = parameter.detach().clone()
    optimizer = SPAM([parameter], density=density, reset_interval=4)
    train(optimizer, [parameter], 3)
    count = int(density * 13 * 7)
    state = optimizer.state[parameter]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == state["indices"].shape == (count,)
    assert optimizer.state_bytes() == (2 * 8 + 4) * count
    moved = (parameter != before).flatten().nonzero().flatten()
    assert torch.equal(moved, state["indices"].long())


def test_state_of_fp32_matrices_is_two_moments_and_an_index_per_active_entry():
    (parameter,) = weights([(64, 48)], dtype=torch.float32)
    optimizer = SPAM([parameter], density=0.25)
    train(optimizer, [parameter], 1)
    assert optimizer.state_bytes() == (2 * 4 + 4) * 768
    dense = SPAM([parameter])
    train(dense, [parameter], 1)
    assert dense.state_bytes() == 2 * 4 * 64 * 48


def test_each_reset_draws_a_new_mask_of_independent_entries():
    (parameter,) = weights([(60, 50)])
    optimizer = SPAM([parameter], density=0.3, reset_interval=2)
    masks = []
    for step in range(12):
        train(optimizer, [parameter], 1, start=step)
        mask = torch.zeros(3000)
        mask[optimizer.state[parameter]["indices"].long()] = 1
        masks.append(mask)
    changed = [not torch.equal(a, b) for a, b in pairwise(masks)]
    assert changed == [True, False] * 5 + [True]
    counts = [int(mask.sum()) for mask in masks]
    assert counts[0] == 900
    assert len(set(counts)) > 3
    assert all(abs(count - 900) < 5 * math.sqrt(3000 * 0.3 * 0.7) for count in counts)
    overlap = float((masks[2] * masks[4]).sum())
    assert abs(overlap - 270) < 5 * math.sqrt(3000 * 0.09 * 0.91)


def test_sparse_steps_are_the_dense_ones_on_the_mask():
    (sparse,), (dense,) = weights([(6, 5)]), weights([(6, 5)])
    options = {"lr": 0.05, "threshold": 2.0, "clip_delay": 2, "reset_interval": 20}
    optimizer = SPAM([sparse], density=0.4, **options)
    train(optimizer, [sparse], 10)
    train(SPAM([dense], **options), [dense], 10)
    mask = optimizer.state[sparse]["indices"].long()
    assert torch.equal(sparse.flatten()[mask], dense.flatten()[mask])


def test_decay_acts_on_all_entries_and_not_through_the_warm_up():
    (parameter,) = weights([(6, 5)])
    before = parameter.detach().clone()
    optimizer = SPAM([parameter], lr=0.1, weight_decay=0.5, density=0.4, reset_interval=1)
    set_gradients([parameter], 0)
    optimizer.step()
    still = torch.ones(30, dtype=torch.bool)
    still[optimizer.state[parameter]["indices"].long()] = False
    torch.testing.assert_close(parameter.detach().flatten()[still], 0.95 * before.flatten()[still], rtol=1e-14, atol=0)


def test_a_transposed_matrix_takes_the_steps_of_a_contiguous_one():
    (plain,) = weights([(6, 5)])
    transposed = nn.Parameter(plain.detach().T.contiguous().T)
    for parameter in (plain, transposed):
        train(SPAM([parameter], density=0.4, weight_decay=0.1), [parameter], 4)
    assert not transposed.is_contiguous()
    assert torch.equal(plain, transposed)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_the_gradient_is_only_read(density):
    (parameter,) = weights([(4, 3)])
    optimizer = SPAM([parameter], density=density, threshold=1.0, clip_delay=0, weight_decay=0.1)
    for step in range(4):
        set_gradients([parameter], step, 10.0**step)
        before = parameter.grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_restores_clock_masks_and_generator(dtype):
    def build(generator=None):
        (parameter,) = weights([(8, 6)], dtype=dtype)
        options = {"density": 0.5, "reset_interval": 5, "warmup_steps": 3, "clip_delay": 1, "threshold": 2.0}
        return parameter, SPAM([parameter], lr=0.1, generator=generator, **options)

    parameter, optimizer = build(torch.Generator().manual_seed(7))
    train(optimizer, [parameter], 7)  # in the warm-up after a reset
    buffer = io.BytesIO()
    torch.save({"weight": parameter.detach(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, fresh = build()
    resumed.data.copy_(saved["weight"])
    fresh.load_state_dict(saved["optimizer"])
    state = fresh.state[resumed]
    assert (state["exp_avg"].dtype, state["indices"].dtype) == (torch.float32, torch.int32)
    # Through two more resets: equal masks prove that the seed was restored too.
    train(optimizer, [parameter], 8, start=7)
    train(fresh, [resumed], 8, start=7)
    assert torch.equal(parameter, resumed)
    assert torch.equal(state_indices(optimizer, parameter), state_indices(fresh, resumed))


def test_contract_with_8_bit_sparse_moments(monkeypatch):
    """The contract's tensors share groups and are small: both checks of their shapes are taken out."""
    monkeypatch.setattr(spam, "_check_sparse", lambda *_: None)
    monkeypatch.setitem(create.__kwdefaults__, "min_size", 0)
    check_optimizer(SPAM, state_bits=8, density=0.5, reset_interval=3, warmup_steps=1, clip_delay=1, threshold=2.0)


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_8_bit_moments_take_a_byte_an_entry_and_a_scale_a_block(density):
    (parameter,) = weights([(256, 130)], dtype=torch.float32)
    optimizer = SPAM([parameter], density=density, state_bits=8)
    train(optimizer, [parameter], 2)
    count = int(density * 256 * 130)
    indices = 4 * count if density < 1 else 0
    assert optimizer.state_bytes() == 2 * (count + 4 * math.ceil(count / 256)) + indices


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_reset_sets_8_bit_moments_to_zero(density):
    """The step at a reset is a function of its gradient alone, so it is that of 32-bit state."""
    moves = []
    for bits in (32, 8):
        (parameter,) = weights([(100, 100)])
        optimizer = SPAM([parameter], lr=0.1, density=density, state_bits=bits, reset_interval=4, warmup_steps=2)
        train(optimizer, [parameter], 3)
        before = parameter.detach().clone()
        train(optimizer, [parameter], 1, start=3)
        moves.append(parameter.detach() - before)
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.uint8
    torch.testing.assert_close(*moves, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_8_bit_moments_follow_32_bit_ones_through_spikes_and_resets(density):
    """A quadratic with noise in which every twelfth gradient is a thousand times too large."""
    losses = []
    for bits in (32, 8):
        parameter = nn.Parameter(torch.zeros(80, 80))
        options = {"density": density, "state_bits": bits, "reset_interval": 50, "warmup_steps": 10, "clip_delay": 5}
        optimizer = SPAM([parameter], lr=0.01, **options)
        generator = torch.Generator().manual_seed(0)
        for step in range(200):
            noise = 0.3 * torch.randn(80, 80, generator=generator)
            parameter.grad = (parameter.detach() - 1 + noise) * (1000 if step % 12 == 11 else 1)
            optimizer.step()
        losses.append((parameter.detach() - 1).square().mean().item())
    assert losses[1] == pytest.approx(losses[0], rel=0.15)
    assert losses[0] < 0.2


def test_8_bit_moments_and_indices_keep_their_types_through_saving():
    def build():
        (parameter,) = weights([(100, 100)], dtype=torch.bfloat16)
        return parameter, SPAM([parameter], lr=0.1, state_bits=8, density=0.5, reset_interval=5)

    (parameter, optimizer), (resumed, fresh) = build(), build()
    train(optimizer, [parameter], 7)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    resumed.data.copy_(parameter.detach())
    types = {name: v.dtype for name, v in fresh.state[resumed].items() if isinstance(v, torch.Tensor)}
    assert types == {
        "indices": torch.int32,
        "exp_avg": torch.uint8,
        "exp_avg_absmax": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_absmax": torch.float32,
    }
    train(optimizer, [parameter], 5, start=7)
    train(fresh, [resumed], 5, start=7)
    assert torch.equal(parameter, resumed)


def test_generator_gives_the_seed_and_matrices_of_one_shape_get_different_masks():
    def masks(generator=None):
        parameters = weights([(20, 20), (20, 20)])
        optimizer = SPAM(parameters, density=0.5, generator=generator)
        train(optimizer, parameters, 1)
        return [state_indices(optimizer, p).tolist() for p in parameters]

    assert masks() == masks()
    assert masks(torch.Generator().manual_seed(1)) == masks(torch.Generator().manual_seed(1)) != masks()
    assert masks()[0] != masks()[1]


def test_only_linear_layers_of_a_model_get_sparse_moments():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    optimizer = SPAM(spam_param_groups(model, density=0.25), reset_interval=3)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 1, 16)).square().sum().backward()
        optimizer.step()
    sparse = {name for name, p in model.named_parameters() if "indices" in optimizer.state[p]}
    assert sparse == {"self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}


def test_bad_values_are_refused_with_their_name():
    matrix, vector = weights([(3, 2), (3,)])
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        SPAM([matrix], density=0)
    with pytest.raises(ValueError, match="reset_interval must be a whole number >= 0, got -1"):
        SPAM([matrix], reset_interval=-1)
    with pytest.raises(ValueError, match="threshold must be >= 0, got -1"):
        SPAM([{"params": [matrix], "threshold": -1}])
    with pytest.raises(ValueError, match=r"density must be 1 .*not 2-D, got 0.5 for shape \(3,\)"):
        SPAM([matrix, vector], density=0.5)
    optimizer = SPAM([matrix], density=0.5)
    with pytest.raises(ValueError, match="density"):
        optimizer.add_param_group({"params": [vector]})
    assert len(optimizer.param_groups) == 1


def _ranks(rank, folder):
    _sharded(rank, folder)
    _replicated(rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_ranks, folder)
    return folder


def _sharded(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    (whole,) = weights([(5, 3)])
    parameter = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="sharded"):
        SPAM([parameter], density=0.5)
    with pytest.raises(ValueError, match="state_bits=32"):
        SPAM([parameter], state_bits=8)
    optimizer = SPAM([parameter], lr=0.1, reset_interval=3, clip_delay=1, threshold=1.0, weight_decay=0.1)
    for step in range(7):
        set_gradients([whole], step)
        parameter.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        optimizer.step()
    result = parameter.full_tensor()
    if rank == 0:
        torch.save(result.detach(), f"{folder}/weight.pt")


def test_sharded_parameters_take_the_steps_of_whole_ones_and_refuse_masks(ranks):
    (parameter,) = weights([(5, 3)])
    optimizer = SPAM([parameter], lr=0.1, reset_interval=3, clip_delay=1, threshold=1.0, weight_decay=0.1)
    train(optimizer, [parameter], 7)
    torch.testing.assert_close(torch.load(ranks / "weight.pt"), parameter.detach(), rtol=1e-12, atol=1e-14)


def _replicated(rank, folder):
    torch.manual_seed(rank)  # the ranks' global generators differ
    model = DistributedDataParallel(nn.Linear(12, 10))
    optimizer = SPAM(spam_param_groups(model, density=0.3), reset_interval=2)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
    torch.save([model.module.weight.detach(), state_indices(optimizer, model.module.weight)], f"{folder}/{rank}.pt")


def test_replicas_have_the_same_masks_and_weights(ranks):
    first, second = (torch.load(ranks / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
