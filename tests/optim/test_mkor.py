import copy
import gc
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RANKS, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from headway.optim.mkor import MKOR, HybridSwitch, update_inverse
from headway.testing import check_optimizer


class Net(nn.Module):
    """A padded convolution and two linear layers, one without bias, with weights from a formula."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, padding=1)
        self.first = nn.Linear(48, 6, bias=False)
        self.second = nn.Linear(6, 2)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_((torch.sin(torch.arange(p.numel()) * 0.7 + i) / 2).view(p.shape))
        self.to(dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.conv(x)).flatten(1))))


def batch(step, dtype=torch.float32):
    x = 1 + torch.cos(torch.arange(180) ** 1.3 * 0.9 + 1.7 * step).view(10, 2, 3, 3)
    return x.to(dtype), torch.sin(torch.arange(20.0) + step).view(10, 2).to(dtype)


def loss_of(model, step):
    x, y = batch(step, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps=6, first=0, scale=1.0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        (scale * loss_of(model, step)).backward()
        optimizer.step()


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def adam(model, lr=0.01):
    return torch.optim.Adam(model.parameters(), lr=lr)


def assert_same(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **({"rtol": 0, "atol": 0} | tolerance))


def factors(optimizer):
    return [P for layer in optimizer.state_dict()["mkor"]["layers"].values() for P in (layer["A_inv"], layer["G_inv"])]


def vectors(count, d, seed=0, size=1.0):
    return size * torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inv_freq": 1},
        {"inv_freq": 2, "variant": "exact", "reset": "blend", "inner": "adamw", "factor_dtype": torch.bfloat16},
        {"warmup_steps": 3, "rescale": False, "skip_modules": ["0"], "inner": torch.optim.RMSprop},
    ],
    ids=["defaults", "always", "exact", "warm-up"],
)
def test_contract(options):
    check_optimizer(MKOR, **options)


GOLDEN = json.loads((Path(__file__).parent / "data" / "mkor_official.json").read_text())["final_weights"]


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("sgd-2", sgd, {"inv_freq": 2}),
        ("sgd-5-warmup", sgd, {"inv_freq": 5, "warmup_steps": 3}),
        ("clip", sgd, {"inv_freq": 1, "clip": 0.3}),
        ("adam", adam, {"inv_freq": 1}),
    ],
)
def test_fourteen_steps_equal_the_authors_code(name, make, options):
    """The data file names the commit."""
    model = Net()
    train(model, MKOR(model, make(model), **options), 14)
    for p, expected in zip(model.parameters(), GOLDEN[name], strict=True):
        torch.testing.assert_close(p.detach().flatten(), torch.tensor(expected), rtol=2e-6, atol=2e-6)


# the factors


def test_the_exact_variant_is_the_inverse_of_the_running_second_moment():
    C = P = torch.eye(12, dtype=torch.float64)
    for v in vectors(50, 12):
        C = 0.95 * C + 0.05 * torch.outer(v, v)
        P = update_inverse(P, v, decay=0.95, variant="exact")
    torch.testing.assert_close(P, torch.linalg.inv(C), rtol=1e-8, atol=1e-10)


def test_the_official_variant_is_the_inverse_of_its_definition():
    P = torch.eye(12, dtype=torch.float64)
    for v in vectors(20, 12):
        expected = torch.linalg.inv(torch.linalg.inv(0.9 * P + 0.1 * torch.eye(12, dtype=P.dtype)) + torch.outer(v, v))
        P = update_inverse(P, v, decay=0.9)
        torch.testing.assert_close(P, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["official", "exact"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_factors_stay_symmetric_and_positive_definite(variant, size):
    P = torch.eye(8, dtype=torch.float64)
    for v in vectors(100, 8, size=size):
        P = update_inverse(P, v, decay=0.95, variant=variant)
        assert torch.equal(P, P.T)
        eigenvalues = torch.linalg.eigvalsh(P)
        assert eigenvalues[0] > 0
        if variant == "official":
            assert eigenvalues[-1] <= 1 + 1e-12


def test_a_zero_vector_only_decays():
    P = update_inverse(torch.eye(5), vectors(1, 5)[0].float(), decay=0.95)
    zero = torch.zeros(5)
    torch.testing.assert_close(update_inverse(P, zero, decay=0.75), 0.75 * P + 0.25 * torch.eye(5))
    torch.testing.assert_close(update_inverse(P, zero, decay=0.75, variant="exact"), P / 0.75)


@pytest.mark.parametrize("variant", ["official", "exact"])
def test_an_update_is_two_products_with_vectors_and_one_rank_one_update(variant):
    with FlopCounterMode(display=False) as counter:
        update_inverse(torch.eye(100), torch.ones(100), decay=0.95, variant=variant)
    assert counter.get_total_flops() == 2 * 100**2 + 2 * 100 + 2 * 100**2


def test_the_input_of_an_update_is_left_as_it_is():
    P = torch.eye(4)
    for variant in ("official", "exact"):
        update_inverse(P, torch.ones(4), decay=0.95, variant=variant)
    assert torch.equal(P, torch.eye(4))


# the statistics


def test_statistics_of_a_linear_layer_are_means_over_batch_and_positions():
    layer = nn.Linear(3, 2)
    optimizer = MKOR(layer, sgd(layer), clip=0.8)
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    target = torch.ones(4, 5, 2)
    output = layer(x)
    (output - target).square().mean().backward()
    a, g = optimizer.statistics()[""]
    torch.testing.assert_close(a, torch.cat([x.clamp(-0.8, 0.8).mean((0, 1)), torch.tensor([0.8])]))
    single = 20 * 2 * (output.detach() - target) / target.numel()
    torch.testing.assert_close(g, single.clamp(-0.8, 0.8).mean((0, 1)))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)},
        {"kernel_size": 3, "padding": "same", "bias": False},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_statistics_of_a_convolution_are_means_of_unfolded_patches(options):
    layer = nn.Conv2d(2, 4, **options)
    optimizer = MKOR(layer, sgd(layer), clip=0.3)
    x = torch.randn(6, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    output = layer(x)
    output.square().mean().backward()
    a, g = optimizer.statistics()[""]

    mode = "circular" if layer.padding_mode == "circular" else "constant"
    padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches = nn.functional.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    assert patches.shape[2] == output[0, 0].numel()
    expected = patches.mean(2).clamp(-0.3, 0.3).mean(0)
    torch.testing.assert_close(a, expected if layer.bias is None else torch.cat([expected, torch.tensor([0.3])]))
    single = 6 * 2 * output.detach() / output.numel()
    torch.testing.assert_close(g, single.mean((2, 3)).clamp(-0.3, 0.3).mean(0))


def test_accumulated_micro_batches_give_the_statistics_of_the_whole_batch():
    whole, parts = Net(torch.float64), Net(torch.float64)
    one, other = MKOR(whole, sgd(whole)), MKOR(parts, sgd(parts))
    x, y = batch(0, torch.float64)
    (whole(x) - y).square().mean().backward()
    for part in range(5):
        rows = slice(2 * part, 2 * part + 2)
        ((parts(x[rows]) - y[rows]).square().mean() / 5).backward()
    for name, statistics in one.statistics().items():
        for a, b in zip(statistics, other.statistics()[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_training_with_micro_batches_equals_training_with_whole_ones():
    whole, parts = Net(torch.float64), Net(torch.float64)
    train(whole, MKOR(whole, sgd(whole), inv_freq=2))
    optimizer = MKOR(parts, sgd(parts), inv_freq=2)
    for step in range(6):
        x, y = batch(step, torch.float64)
        optimizer.zero_grad()
        for rows in (slice(0, 5), slice(5, 10)):
            ((parts(x[rows]) - y[rows]).square().mean() / 2).backward()
        optimizer.step()
    assert_same(whole.parameters(), parts.parameters(), atol=1e-5)


def test_forwards_in_evaluation_mode_or_without_gradients_leave_no_trace():
    model, reference = Net(), Net()
    optimizer = MKOR(model, sgd(model), inv_freq=1)
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        with torch.no_grad():
            model(torch.full((3, 2, 3, 3), 50.0))
        model.eval()
        model(torch.full((3, 2, 3, 3), 50.0)).sum()  # with gradients enabled
        model.train()
        model(torch.full((3, 2, 3, 3), 50.0)).sum()  # never differentiated
        loss.backward()
        optimizer.step()
    train(reference, MKOR(reference, sgd(reference), inv_freq=1), 4)
    assert_same(model.parameters(), reference.parameters())


def test_nothing_is_collected_between_refreshes():
    model = Net()
    optimizer = MKOR(model, sgd(model), inv_freq=3)
    seen = []
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        seen.append(len(optimizer.statistics()))
        optimizer.step()
        assert not optimizer.statistics()
    assert seen == [3, 0, 0, 3, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    reference = copy.deepcopy(model)
    optimizer, plain = MKOR(model, sgd(model), inv_freq=1), MKOR(reference, sgd(reference), inv_freq=1)
    for step in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)) + 1
        for each, by in ((optimizer, lambda x: checkpoint(model, x, use_reentrant=reentrant)), (plain, reference)):
            each.zero_grad()
            by(x.clone().requires_grad_()).square().mean().backward()
            each.step()
    assert_same(model.parameters(), reference.parameters())


def test_layers_followed_by_an_operation_in_place_are_taken():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    reference = copy.deepcopy(model)
    reference[1].inplace = False
    for each in (model, reference):
        optimizer = MKOR(each, sgd(each), inv_freq=1)
        for _ in range(3):
            optimizer.zero_grad()
            each(torch.ones(5, 4)).square().mean().backward()
            optimizer.step()
    assert_same(model.parameters(), reference.parameters())


def test_statistics_under_autocast_are_fp32():
    model = Net()
    optimizer = MKOR(model, sgd(model), inv_freq=1)
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        assert all(v.dtype == torch.float32 for pair in optimizer.statistics().values() for v in pair)
        optimizer.step()
    assert all(P.dtype == torch.float32 for P in factors(optimizer))


def test_a_gradient_scale_that_is_known_changes_nothing():
    model, reference = Net(), Net()
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.05, fused=True), inv_freq=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=2)
    for step in range(6):
        optimizer.zero_grad()
        optimizer.grad_scale = scaler.get_scale()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(reference, MKOR(reference, torch.optim.SGD(reference.parameters(), lr=0.05), inv_freq=1))
    assert_same(model.parameters(), reference.parameters(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("through_optimizer", [True, False])
def test_a_step_that_the_scaler_leaves_out_leaves_no_statistics(through_optimizer):
    model, reference = Net(), Net()
    optimizer = MKOR(model, sgd(model), inv_freq=1)
    (float("inf") * loss_of(model, 9)).backward()
    (optimizer if through_optimizer else model).zero_grad()
    train(model, optimizer, 3)
    train(reference, MKOR(reference, sgd(reference), inv_freq=1), 3)
    assert_same(model.parameters(), reference.parameters())


# the step


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("skip", [True, False])
def test_with_all_layers_skipped_or_identity_factors_it_is_the_inner_optimizer(make, skip):
    model, reference = Net(), Net()
    train(model, MKOR(model, make(model), skip_modules=[model] if skip else [], inv_freq=1 if skip else 100))
    train(reference, make(reference))
    assert_same(model.parameters(), reference.parameters())


def test_the_first_refresh_never_uses_data_in_the_official_variant():
    for variant, same in (("official", True), ("exact", False)):
        model, reference = Net(), Net()
        train(model, MKOR(model, sgd(model), variant=variant), 1)
        train(reference, sgd(reference), 1)
        assert torch.equal(model.first.weight, reference.first.weight) == same


def gradients_after(optimizer, model, step=9, scale=1.0):
    """Before and after preconditioning, by layer: (weight, bias)."""
    optimizer.zero_grad()
    (scale * loss_of(model, step)).backward()
    layers = [model.conv, model.first, model.second]
    seen = []
    for _ in range(2):
        seen.append([[p.grad.clone() for p in layer.parameters()] for layer in layers])
        optimizer.before_step()
    return seen


def trained(**options):
    model = Net()
    optimizer = MKOR(model, sgd(model, lr=1e-3), **options)
    train(model, optimizer, 5)
    return model, optimizer


def test_the_update_is_the_product_with_both_factors():
    model, optimizer = trained(inv_freq=4, rescale=False)
    before, after = gradients_after(optimizer, model)
    layers = optimizer.state_dict()["mkor"]["layers"]
    for name, old, new in zip(("conv", "first", "second"), before, after, strict=True):
        Gm = torch.cat([g.reshape(len(g), -1) for g in old], dim=1)
        U = layers[name]["G_inv"] @ Gm @ layers[name]["A_inv"]
        torch.testing.assert_close(torch.cat([g.reshape(len(g), -1) for g in new], dim=1), U)


def test_rescaling_keeps_the_sum_of_the_norms_of_each_layer():
    model, optimizer = trained(inv_freq=4)
    before, after = gradients_after(optimizer, model)
    for old, new in zip(before, after, strict=True):
        assert not torch.allclose(old[0], new[0], rtol=1e-2)
        torch.testing.assert_close(sum(g.norm() for g in old), sum(g.norm() for g in new))


def test_scaling_the_loss_scales_the_update_while_factors_are_frozen():
    model, optimizer = trained(inv_freq=100, warmup_steps=4)
    _, once = gradients_after(optimizer, model)
    _, scaled = gradients_after(optimizer, model, scale=1000.0)
    for a, b in zip(once, scaled, strict=True):
        for u, v in zip(a, b, strict=True):
            torch.testing.assert_close(1000 * u, v, rtol=1e-4, atol=1e-3)


def test_a_zero_gradient_of_one_layer_stays_zero():
    model, optimizer = trained(inv_freq=4)
    optimizer.zero_grad()
    loss_of(model, 9).backward()
    for p in model.first.parameters():
        p.grad.zero_()
    optimizer.before_step()
    assert not model.first.weight.grad.any()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_bias_without_gradient_counts_as_zero_and_stays_without():
    model = Net()
    optimizer = MKOR(model, sgd(model), inv_freq=1)
    model.second.bias.requires_grad_(False)
    before = model.second.bias.clone()
    train(model, optimizer, 4)
    assert model.second.bias.grad is None
    assert torch.equal(before, model.second.bias)
    assert torch.isfinite(model.second.weight).all()


def test_warm_up_refreshes_at_each_step():
    changes = []
    model = Net()
    optimizer = MKOR(model, sgd(model), inv_freq=5, warmup_steps=3)
    last = None
    for step in range(11):
        train(model, optimizer, 1, first=step)
        A_inv = optimizer.state_dict()["mkor"]["layers"]["second"]["A_inv"]
        changes.append(A_inv is not last)
        last = A_inv
    # Step 0 refreshes too, with the identity.
    assert [step for step, changed in enumerate(changes) if changed] == [1, 2, 5, 10]


@pytest.mark.parametrize("reset", ["identity", "blend"])
def test_an_official_factor_that_trips_resets_its_layer_at_the_next_refresh(reset):
    model = Net()
    optimizer = MKOR(model, sgd(model), inv_freq=1, reset=reset, reset_threshold=0.5, blend=0.25)
    train(model, optimizer, 2)  # identity, then an update; its entries near 1 are over the threshold
    before = [P.clone() for P in factors(optimizer)]
    train(model, optimizer, 1, first=2)
    for old, new in zip(before, factors(optimizer), strict=True):
        if reset == "identity":
            assert new is None
        else:
            torch.testing.assert_close(new, 0.75 * old + 0.25 * torch.eye(len(old)))
    train(model, optimizer, 1, first=3)
    assert all(P is not None for P in factors(optimizer))


@pytest.mark.parametrize("reset", ["identity", "blend"])
def test_an_exact_factor_that_trips_is_reset_before_the_update(reset):
    layer = nn.Linear(3, 3, bias=False)
    optimizer = MKOR(layer, sgd(layer, lr=1e-6), inv_freq=1, variant="exact", reset=reset, decay=0.5, blend=0.25)
    expected = torch.eye(3)
    trips = 0
    for step in range(6):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        a, _ = optimizer.statistics()[""]
        if expected.abs().max() > 2:
            trips += 1
            expected = torch.eye(3) if reset == "identity" else 0.75 * expected + 0.25 * torch.eye(3)
        expected = update_inverse(expected, a, decay=0.5, variant="exact")
        optimizer.step()
        torch.testing.assert_close(factors(optimizer)[0], expected)
    assert trips > 0


def test_factors_stored_in_16_bits_are_updated_in_fp32_and_stay_close():
    model, reference = Net(), Net()
    optimizer = MKOR(model, sgd(model), inv_freq=1, factor_dtype=torch.float16)
    train(model, optimizer, 4)
    train(reference, MKOR(reference, sgd(reference), inv_freq=1), 4)
    assert all(P.dtype == torch.float16 for P in factors(optimizer))
    assert_same(model.parameters(), reference.parameters(), atol=5e-3)


# errors


def test_a_layer_with_a_gradient_that_saw_no_backward_is_named():
    model = Net()
    optimizer = MKOR(model, sgd(model))
    loss_of(model, 0).backward()
    fresh = MKOR(model, sgd(model))
    with pytest.raises(RuntimeError, match="the layer 'conv' has a gradient, but no backward"):
        fresh.step()
    optimizer.step()


def test_a_layer_that_is_called_twice_is_named():
    layer = nn.Linear(3, 3)
    optimizer = MKOR(nn.Sequential(layer), sgd(layer))
    with pytest.raises(RuntimeError, match="the layer '0' was called more than once"):
        layer(layer(torch.ones(2, 3))).sum().backward()
    assert optimizer.active


def test_infinite_statistics_are_refused_before_anything_changes():
    layer = nn.Linear(2, 2)
    optimizer = MKOR(layer, sgd(layer), inv_freq=1)
    x = torch.tensor([[1.0, float("nan")]])
    layer(x).nan_to_num().sum().backward()
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match="statistics of the layer ''"):
        optimizer.step()
    assert str(before) == str(optimizer.state_dict())


def test_weights_that_modules_share_are_not_tracked():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    assert list(MKOR(model, sgd(model)).state_dict()["mkor"]["layers"]) == ["1"]


def test_the_projection_of_attention_which_is_never_called_is_not_tracked():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    optimizer = MKOR(model, sgd(model), inv_freq=1)
    assert list(optimizer.state_dict()["mkor"]["layers"]) == ["linear1", "linear2"]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3, 8)).square().mean().backward()
        optimizer.step()


def test_grouped_convolutions_are_not_tracked():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    assert list(MKOR(model, sgd(model)).state_dict()["mkor"]["layers"]) == ["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \(0, 1\), got 1.0"),
        ({"inv_freq": 0}, "inv_freq must be a whole number >= 1, got 0"),
        ({"variant": "plus"}, "variant must be one of 'official', 'exact', got 'plus'"),
        ({"skip_modules": ["third"]}, "skip_modules must name modules of the model, got 'third'"),
        ({"factor_dtype": torch.int8}, "factor_dtype must be a floating type, got torch.int8"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        MKOR(model, sgd(model), **options)


def test_an_inner_optimizer_of_something_else_is_refused():
    with pytest.raises(TypeError, match="none of them"):
        MKOR(Net(), sgd(Net()))
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        MKOR(Net(), "sgd")


# copies, checkpoints, construction


def test_the_state_holds_factors_flags_and_counter_and_continues_to_the_bit():
    model, fresh = Net(), Net()
    optimizer = MKOR(model, adam(model), inv_freq=2)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    assert state["mkor"]["steps"] == 5
    assert state["mkor"]["layers"]["first"]["A_inv"].shape == (48, 48)
    fresh.load_state_dict(weights)
    resumed = MKOR(fresh, adam(fresh), inv_freq=2)
    resumed.load_state_dict(state)
    train(model, optimizer, 4, first=5)
    train(fresh, resumed, 4, first=5)
    assert_same(model.parameters(), fresh.parameters())


def test_a_state_of_the_inner_optimizer_alone_begins_with_new_factors():
    model = Net()
    inner = adam(model)
    train(model, inner, 2)
    state = copy.deepcopy(inner.state_dict())
    optimizer = MKOR(model, adam(model), inv_freq=1)
    train(model, optimizer, 3)
    optimizer.load_state_dict(state)
    assert factors(optimizer) == [None] * 6
    assert optimizer.steps == 0
    assert float(optimizer.state[model.second.weight]["step"]) == 2


def test_a_state_of_other_layers_is_refused():
    model = Net()
    state = MKOR(model, sgd(model), skip_modules=["first"]).state_dict()
    with pytest.raises(ValueError, match=r"of the layers \['conv', 'first', 'second'\], got one of"):
        MKOR(model, sgd(model)).load_state_dict(state)


def test_a_scheduler_steers_the_inner_optimizer_also_after_loading():
    model = Net()
    optimizer = MKOR(model, sgd(model))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 1)
    schedule.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_of_model_and_optimizer_collects_for_itself(way):
    model = Net()
    optimizer = MKOR(model, sgd(model), inv_freq=2)
    train(model, optimizer, 3)
    other_model, other = way((model, optimizer))
    assert [len(layer._forward_hooks) for layer in (other_model.conv, other_model.first)] == [1, 1]
    loss_of(other_model, 0).backward()
    assert not optimizer.statistics()
    other.zero_grad()
    train(model, optimizer, 4, first=3)
    train(other_model, other, 4, first=3)
    assert_same(model.parameters(), other_model.parameters())


def test_a_copy_of_the_model_alone_does_not_take_the_optimizer_along():
    model = Net()
    optimizer = MKOR(model, sgd(model))
    average = copy.deepcopy(model)
    loss_of(average, 0).backward()
    assert not optimizer.statistics()
    assert b"MKOR" not in pickle.dumps(average)


def test_hooks_do_nothing_once_the_optimizer_is_gone_and_the_next_one_clears_them():
    model = Net()
    optimizer = MKOR(model, sgd(model))
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    second = MKOR(model, sgd(model))
    assert len(model.conv._forward_hooks) == 1
    second.remove_hooks()
    assert len(model.conv._forward_hooks) == 0


def test_without_hooks_it_is_the_inner_optimizer():
    model = Net()
    optimizer = MKOR(model, sgd(model), inv_freq=1)
    train(model, optimizer, 3)
    other, inner = copy.deepcopy((model, optimizer.optimizer))
    optimizer.remove_hooks()
    train(model, optimizer, 3, first=3)
    train(other, inner, 3, first=3)
    assert_same(model.parameters(), other.parameters())


def test_for_model_skips_very_wide_layers_and_builds_the_inner_optimizer():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 40), nn.Linear(40, 3))
    optimizer = MKOR.for_model(model, inner="adamw", lr=0.01, weight_decay=0.1, max_width=30, skip_modules=["0"])
    assert isinstance(optimizer.optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert not optimizer.state_dict()["mkor"]["layers"]
    assert list(MKOR.for_model(model, lr=0.01).state_dict()["mkor"]["layers"]) == ["0", "1", "2"]


def test_compiled_models_train_alike():
    model, reference = Net(), Net()
    optimizer = MKOR(model, sgd(model), inv_freq=2)
    compiled = torch.compile(model, backend="eager")
    train(compiled, optimizer, 5)
    train(reference, MKOR(reference, sgd(reference), inv_freq=2), 5)
    assert_same(model.parameters(), reference.parameters(), atol=1e-6)


# MKOR-H


def switched(window=2):
    """Training in which the loss that the switch is shown stops to fall."""
    model = Net()
    optimizer = MKOR(model, sgd(model), inv_freq=1, hybrid=HybridSwitch(window=window, tau=0.5, patience=2))
    for step in range(30):
        train(model, optimizer, 1, first=step)
        optimizer.observe(torch.tensor(1.0 if step >= 8 else 8.0 - step))
        if not optimizer.active:
            return model, optimizer, step + 1
    raise AssertionError("never switched")


def test_after_the_switch_it_is_the_inner_optimizer_to_the_bit_and_stays_it():
    model, optimizer, step = switched()
    assert not factors(optimizer)
    assert len(model.conv._forward_hooks) == 0
    other, inner = copy.deepcopy((model, optimizer.optimizer))
    for later in range(step, step + 6):
        train(model, optimizer, 1, first=later)
        optimizer.observe(100.0 / later)  # falling fast again
        assert not optimizer.active
    train(other, inner, 6, first=step)
    assert_same(model.parameters(), other.parameters())


def test_the_switch_is_in_the_state_and_a_state_from_before_it_takes_it_back():
    _, optimizer, _ = switched()
    fresh = Net()
    before = copy.deepcopy(MKOR(fresh, sgd(fresh), hybrid=HybridSwitch()).state_dict())
    other = MKOR(fresh, sgd(fresh), hybrid=HybridSwitch())
    other.load_state_dict(optimizer.state_dict())
    assert not other.active
    assert len(fresh.conv._forward_hooks) == 0
    other.load_state_dict(before)
    assert other.active
    assert len(fresh.conv._forward_hooks) == 1


def test_the_switch_follows_its_rule():
    switch = HybridSwitch(window=2, tau=0.5, patience=2)
    # Means 10, 8 (rate 0.1), 7 (0.0625 >= half the best), 6.9 (low), 5 (0.137, the new best), 4.9, 4.8: two low ones.
    means = [10, 8, 7, 6.9, 5, 4.9, 4.8]
    seen = [switch.observe(torch.tensor(mean + shift)) for mean in means for shift in (-0.5, 0.5)]
    assert seen == [None, False] * 6 + [None, True]


def test_a_resumed_switch_decides_alike_and_windows_that_are_not_finite_count_for_nothing():
    losses = [4.0, 2.0, float("nan"), 1.9, 1.85, 1.84, 1.83]
    one, other = (HybridSwitch(window=1, tau=0.2, patience=3) for _ in range(2))
    first = [one.observe(loss) for loss in losses[:4]]
    other.load_state_dict(one.state_dict())
    assert first == [False] * 4
    assert [other.observe(loss) for loss in losses[4:]] == [one.observe(loss) for loss in losses[4:]]
    assert one.state_dict() == other.state_dict()


def test_two_optimizers_may_be_given_one_switch():
    switch = HybridSwitch(window=1)
    optimizers = []
    for _ in range(2):
        model = Net()
        optimizers.append(MKOR(model, sgd(model), hybrid=switch))
    optimizers[0].observe(1.0)
    assert optimizers[1].state_dict()["mkor"]["hybrid"]["before"] is None


def test_observing_needs_a_switch():
    model = Net()
    with pytest.raises(RuntimeError, match=r"hybrid=HybridSwitch\(\)"):
        MKOR(model, sgd(model)).observe(1.0)


# ranks


def on_a_rank(rank, folder):
    model = Net(torch.float64)
    replica = DistributedDataParallel(model)
    optimizer = MKOR(
        replica, sgd(model), inv_freq=2, factor_dtype=torch.float64, hybrid=HybridSwitch(window=1, tau=1.0, patience=1)
    )
    sizes = []
    all_reduce = dist.all_reduce

    def counted(buffer, *args, **kwargs):
        sizes.append(buffer.numel())
        return all_reduce(buffer, *args, **kwargs)

    dist.all_reduce = counted
    for step in range(6):
        x, y = (part.chunk(RANKS)[rank] for part in batch(step, torch.float64))
        optimizer.zero_grad()
        (replica(x) - y).square().mean().backward()
        optimizer.step()
    reached = [p.detach().clone() for p in model.parameters()]
    # Rank 0 sees a loss that falls faster and faster, rank 1 one that does not.
    active = []
    for loss in (8.0, 7.0, 5.0, 1.0) if rank == 0 else (8.0, 8.0, 8.0, 8.0):
        optimizer.observe(loss)
        active.append(optimizer.active)
    optimizer.observe(9.0 if rank == 0 else 1.0)
    active.append(optimizer.active)
    torch.save((reached, sizes, active), f"{folder}/{rank}")


def test_two_ranks_on_half_batches_equal_one_on_the_whole_batch(tmp_path):
    run_ranks(on_a_rank, tmp_path)
    model = Net(torch.float64)
    train(model, MKOR(model, sgd(model), inv_freq=2, factor_dtype=torch.float64))
    for rank in range(RANKS):
        reached, sizes, active = torch.load(tmp_path / str(rank))
        assert_same(reached, model.parameters(), atol=1e-9)
        # One buffer at each of three refreshes: (in + 1) + out per layer, in + out without bias.
        assert sizes == [(8 + 1) + 3 + 48 + 6 + (6 + 1) + 2] * 3
        assert active == [True] * 4 + [False]  # as rank 0 decides
