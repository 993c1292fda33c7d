import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headway.optim.opposing_pairs import OpposingSignals, Pair, shared_feature


class Recorded(nn.Module):
    """A model whose losses the test sets directly."""

    def __init__(self, examples):
        super().__init__()
        self.losses = nn.Parameter(torch.zeros(examples))


def watch(changes, k=2, order=None, **options):
    """The analyzer after a run in which the losses change by the given rows."""
    examples = len(changes[0])
    rows = torch.arange(examples) if order is None else order
    model = Recorded(examples)
    signals = OpposingSignals(rows, lambda model, batch: model.losses[batch], k=k, **{"warmup": 0, **options})
    signals.on_step_end(model)
    for change in changes:
        with torch.no_grad():
            model.losses += torch.as_tensor(change)
        signals.on_step_end(model)
    return signals


def random_changes(steps=12, examples=30):
    return torch.randn(steps, examples, generator=torch.Generator().manual_seed(0)).tolist()


def mean_loss(model, batch):
    x, y = batch
    return F.softplus(-y * model(x)[:, 0])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))


def data(examples=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 5, generator=generator)
    return x, x[:, 0].sign()


def test_the_strongest_step_names_both_tails_in_order_with_the_geometric_mean():
    changes = [[0.0] * 6, [0.1, 3.0, 0.0, -8.0, 5.0, -0.2], [0.0] * 6]
    pair = watch(changes).report()[0]
    assert (pair.step, pair.up_indices, pair.down_indices) == (3, [4, 1], [3, 5])
    assert pair.strength == pytest.approx(math.sqrt(4.0 * 4.1))


def test_identical_losses_at_two_steps_have_strength_zero_and_are_no_pair():
    assert watch([[0.0] * 6] * 3).report() == []


def test_a_change_in_one_direction_alone_is_no_pair():
    assert watch([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).report() == []


def test_permuting_the_probe_permutes_the_indices():
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    plain, permuted = watch(random_changes()).report(top=4), watch(random_changes(), order=order).report(top=4)
    for one, other in zip(plain, permuted, strict=True):
        assert order[other.up_indices].tolist() == one.up_indices
        assert order[other.down_indices].tolist() == one.down_indices
        assert (one.step, one.strength) == (other.step, other.strength)


def test_report_is_sorted_and_only_the_strongest_are_kept():
    everything = watch(random_changes()).report(top=100)
    strengths = [pair.strength for pair in everything]
    assert strengths == sorted(strengths, reverse=True)
    assert len(everything) == 12
    few = watch(random_changes(), keep=3)
    assert few.report(top=100) == everything[:3]


def test_opposite_phase_gives_correlation_minus_one_and_negative_alternation():
    swing = torch.tensor([1.0, 1.1, -1.0, -1.1, 0.0, 0.0])
    pair = watch([((-1) ** step * (1 + step) * swing).tolist() for step in range(9)]).report()[0]
    assert pair.loss_correlation == pytest.approx(-1.0, abs=1e-6)
    assert pair.alternation < -0.9


def test_warmup_and_interval_say_what_is_recorded():
    changes = random_changes()
    pairs = watch(changes, warmup=4, interval=2).report(top=100)
    assert sorted(pair.step for pair in pairs) == [8, 10, 12]  # the record at 6 is the first and has no difference
    assert watch(changes, warmup=100).report() == []


def test_history_bounds_the_memory():
    signals = watch(random_changes(steps=40), history=5)
    assert len(signals._changes) == 5


def test_gradients_of_the_groups_confirm_the_pair():
    x = torch.cat([torch.tensor([[9.0, 0.0]] * 4), 0.1 * torch.ones(8, 2)])
    y = torch.tensor([1.0, 1.0, -1.0, -1.0] + [1.0] * 8)
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    signals = OpposingSignals((x, y), mean_loss, k=2, warmup=0)
    signals.on_step_end(model)
    with torch.no_grad():
        model.weight[0, 0] = -0.1
    signals.on_step_end(model)
    pair = signals.report()[0]
    assert set(pair.up_indices) == {0, 1}
    assert set(pair.down_indices) == {2, 3}
    assert pair.gradient_cosine == pytest.approx(-1.0, abs=1e-5)
    assert min(pair.gradient_norms) > 1
    torch.testing.assert_close(shared_feature(x, pair), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("virtual_lr", [None, 0.5])
def test_training_is_not_changed(virtual_lr):
    def run(watched):
        model, batch = network(), data()
        torch.manual_seed(3)
        model[0].eval()  # a module that the user has frozen stays so
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        signals = OpposingSignals(batch, mean_loss, k=3, warmup=0, virtual_lr=virtual_lr)
        for _ in range(5):
            optimizer.zero_grad()
            mean_loss(model, batch).mean().backward()
            optimizer.step()
            if watched:
                signals.on_step_end(model)
        assert not watched or signals.report()
        modes = [module.training for module in model.modules()]
        gradients = [parameter.grad for parameter in model.parameters()]
        return model.state_dict(), gradients, modes, torch.get_rng_state()

    (state, gradients, modes, rng), (its_state, its_gradients, its_modes, its_rng) = run(False), run(True)
    assert all(torch.equal(state[name], its_state[name]) for name in state)
    assert all(torch.equal(a, b) for a, b in zip(gradients, its_gradients, strict=True))
    assert modes == its_modes
    assert torch.equal(rng, its_rng)


def test_a_virtual_step_is_one_gradient_step_on_the_whole_probe():
    model, batch = network(), data()
    signals = OpposingSignals(batch, mean_loss, k=12, warmup=0, virtual_lr=0.5)
    signals.on_step_end(model)
    other = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    before = mean_loss(other, batch)
    before.mean().backward()
    optimizer.step()
    torch.testing.assert_close(signals._changes[0], (mean_loss(other, batch) - before).detach())


def test_wrong_probes_and_losses_are_named():
    with pytest.raises(ValueError, match="at least 2 k = 20 examples, got 19"):
        OpposingSignals(torch.zeros(19, 2), mean_loss)
    with pytest.raises(ValueError, match=r"one number of examples, got \[3, 4\]"):
        OpposingSignals((torch.zeros(3), torch.zeros(4)), mean_loss, k=1)
    with pytest.raises(ValueError, match="k must be a whole number >= 1 or None, got 0"):
        OpposingSignals(torch.zeros(30), mean_loss, k=0)
    signals = OpposingSignals(torch.zeros(4), lambda model, batch: batch.mean(), k=1, warmup=0)
    with pytest.raises(ValueError, match=r"must return 4 losses, got shape \(\)"):
        signals.on_step_end(nn.Linear(1, 1))
    signals = OpposingSignals(torch.zeros(4), lambda model, batch: batch + math.nan, k=1, warmup=0)
    with pytest.raises(FloatingPointError, match="4 of 4 losses"):
        signals.on_step_end(nn.Linear(1, 1))


def test_default_group_size_grows_with_the_probe():
    assert OpposingSignals(torch.zeros(20), mean_loss).k == 10
    assert OpposingSignals(torch.zeros(20000), mean_loss).k == 40


def test_a_pair_can_be_saved():
    pair = watch(random_changes()).report()[0]
    assert isinstance(pair, Pair)
    assert pickle.loads(pickle.dumps(pair)) == pair
