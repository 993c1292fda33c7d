import copy
from itertools import combinations, pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from headway.budget.logit_ensemble import LogitEnsemble, ensemble_curve, train_ensemble
from headway.testing.planners import check_planner

CLASSES = 5


def members(k, seed=0):
    torch.manual_seed(seed)
    return [nn.Linear(4, CLASSES) for _ in range(k)]


def batch(seed=0, rows=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


class Shifted(nn.Module):
    """A member plus a constant per row in every logit."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + 3 * x[:, :1]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 6), scale=st.floats(0.1, 20))
def test_loss_of_both_ensembles_is_at_most_the_mean_of_the_members(seed, k, scale):
    models, (x, y) = members(k, seed), batch(seed)
    mean = sum(functional.cross_entropy(model(scale * x), y).item() for model in models) / k
    for reduce in ("mean", "probability"):
        loss = functional.cross_entropy(LogitEnsemble(models, reduce=reduce)(scale * x), y).item()
        assert loss <= mean + 1e-5 * max(1, mean)


def test_loss_equals_the_mean_of_the_members_iff_they_agree_up_to_a_constant():
    (x, y), (first, second) = batch(), members(2)
    single = functional.cross_entropy(first(x), y).item()
    same = functional.cross_entropy(LogitEnsemble([first, Shifted(first)])(x), y)
    assert same.item() == pytest.approx(single, abs=1e-6)
    mean = sum(functional.cross_entropy(model(x), y) for model in (first, second)) / 2
    assert functional.cross_entropy(LogitEnsemble([first, second])(x), y).item() < mean.item() - 1e-3


@pytest.mark.parametrize("reduce", ["mean", "max", "min", "probability"])
def test_copies_of_one_model_are_that_model(reduce):
    model, (x, _) = members(1)[0], batch()
    ensemble = LogitEnsemble([copy.deepcopy(model) for _ in range(3)], reduce=reduce)
    torch.testing.assert_close(ensemble(x).log_softmax(-1), model(x).log_softmax(-1))


@pytest.mark.parametrize("reduce", ["mean", "max", "min", "probability"])
@pytest.mark.parametrize("sequential", [False, True])
def test_every_reduction_equals_its_formula_in_any_order_of_the_members(reduce, sequential):
    models, (x, _) = members(4), batch()
    z = torch.stack([model(x) for model in models]) / 2
    expected = {
        "mean": z.mean(0),
        "max": z.amax(0),
        "min": z.amin(0),
        "probability": z.softmax(-1).mean(0).log(),
    }[reduce]
    for order in (models, models[::-1]):
        ensemble = LogitEnsemble(order, temperature=2.0, reduce=reduce, sequential=sequential)
        torch.testing.assert_close(ensemble(x), expected)


def test_a_constant_per_row_in_one_member_changes_nothing():
    models, (x, _) = members(3), batch()
    shifted = [Shifted(models[0]), *models[1:]]
    plain, moved = LogitEnsemble(models)(x), LogitEnsemble(shifted)(x)
    torch.testing.assert_close(plain.softmax(-1), moved.softmax(-1))


def test_gradients_reach_every_member():
    models, (x, y) = members(2), batch()
    functional.cross_entropy(LogitEnsemble(models)(x), y).backward()
    assert all(bool(model.weight.grad.abs().sum() > 0) for model in models)


def test_logits_of_16_bit_members_are_averaged_in_float32():
    models, (x, _) = [model.bfloat16() for model in members(3)], batch()
    x = x.bfloat16()
    logits = LogitEnsemble(models)(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.stack([model(x).float() for model in models]).mean(0))


def test_causal_models_of_transformers_are_members():
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    torch.manual_seed(0)
    models = [transformers.GPT2LMHeadModel(config).eval() for _ in range(2)]
    ids = torch.arange(8).view(2, 4)
    logits = LogitEnsemble(models)(input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(logits, sum(model(input_ids=ids).logits for model in models) / 2)


class Recorder(nn.Linear):
    """A member that pretends to sit elsewhere and records where it is sent."""

    def __init__(self):
        super().__init__(4, CLASSES)
        self.moves = []

    def to(self, device):
        self.moves.append(str(device))
        return self


@pytest.mark.parametrize("fails", [False, True])
def test_sequential_brings_a_waiting_member_to_the_inputs_and_back(monkeypatch, fails):
    waiting, (x, _) = Recorder(), batch()
    monkeypatch.setattr(waiting, "parameters", lambda: iter([torch.empty(1, device="meta")]))
    if fails:
        monkeypatch.setattr(waiting, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            LogitEnsemble([waiting], sequential=True)(x)
    else:
        LogitEnsemble([waiting], sequential=True)(x)
    assert waiting.moves == ["cpu", "meta"]


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="values that cross devices need a second device, and without CUDA there is one; "
    "which member is moved where is tested on one device above",
)
@pytest.mark.parametrize("sequential", [False, True])
def test_members_and_inputs_meet_across_devices(sequential):
    models, (x, _) = members(3), batch()
    expected = LogitEnsemble(models)(x)
    models[1].cuda()
    for inputs in (x, x.cuda()):
        logits = LogitEnsemble(models, sequential=sequential)(inputs)
        assert logits.device == inputs.device
        torch.testing.assert_close(logits.cpu(), expected)
        assert [model.weight.device.type for model in models] == ["cpu", "cuda", "cpu"]


def test_wrong_models_and_options_are_refused():
    x, _ = batch()
    with pytest.raises(ValueError, match="models must hold at least one module"):
        LogitEnsemble([])
    with pytest.raises(ValueError, match=r"logits of one shape, got \(7, 6\) from model 1 after \(7, 5\)"):
        LogitEnsemble([nn.Linear(4, 5), nn.Linear(4, 6)])(x)
    with pytest.raises(ValueError, match=r"an object with .logits, got tuple"):
        LogitEnsemble([nn.GRU(4, 5)])(x)
    for name, constraint in LogitEnsemble.constraints.items():
        for value in constraint.outside():
            with pytest.raises(ValueError, match=name):
                LogitEnsemble(members(1), **{name: value})


def test_members_are_functions_of_their_seed_and_leave_the_global_generator_alone():
    trained = []

    def train(model, seed):
        trained.append(seed)
        with torch.no_grad():
            model.weight += torch.rand(())

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_ensemble(lambda seed: nn.Linear(2, 2), train, 3)
    assert bool((torch.get_rng_state() == before).all())
    torch.rand(10)
    second = train_ensemble(lambda seed: nn.Linear(2, 2), train, 2, seeds=[2, 0])
    assert trained == [0, 1, 2, 2, 0]
    assert torch.equal(second[0].weight, first[2].weight)
    assert torch.equal(second[1].weight, first[0].weight)
    assert not torch.equal(first[0].weight, first[1].weight)


def test_the_generator_is_put_back_when_training_fails():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        train_ensemble(lambda seed: nn.Linear(2, 2), lambda model, seed: 1 / 0, 2)
    assert bool((torch.get_rng_state() == before).all())


@pytest.mark.parametrize("seeds", [[0], [1, 1], [0, -1]])
def test_seeds_must_be_as_many_and_different(seeds):
    with pytest.raises(ValueError, match="seeds must be 2 different whole numbers >= 0"):
        train_ensemble(lambda seed: nn.Linear(2, 2), lambda model, seed: None, 2, seeds)


def logits_of(k, seed=0):
    x, y = batch(seed, rows=20)
    return [model(x).detach() for model in members(k, seed)], y


def test_curve_ends_at_the_members_mean_and_at_the_whole_ensemble():
    logits, y = logits_of(4)
    sizes, losses = ensemble_curve(logits, y)
    assert sizes == [1, 2, 3, 4]
    singles = [float(functional.cross_entropy(z, y)) for z in logits]
    assert losses[0] == pytest.approx(sum(singles) / 4)
    pairs = [float(functional.cross_entropy((a + b) / 2, y)) for a, b in combinations(logits, 2)]
    assert losses[1] == pytest.approx(sum(pairs) / 6)
    assert losses[3] == pytest.approx(float(functional.cross_entropy(sum(logits) / 4, y)))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 6))
def test_over_all_subsets_one_more_member_never_hurts(seed, k):
    _, losses = ensemble_curve(*logits_of(k, seed))
    assert all(after <= before + 1e-6 for before, after in pairwise(losses))


def test_drawn_subsets_depend_on_the_seed_only_and_approach_all_subsets():
    logits, y = logits_of(7)
    exact = ensemble_curve(logits, y, repeats=35)[1]
    drawn = ensemble_curve(logits, y, repeats=20, seed=1)[1]
    assert drawn == ensemble_curve(logits, y, repeats=20, seed=1)[1]
    assert drawn != ensemble_curve(logits, y, repeats=20, seed=2)[1]
    assert drawn == pytest.approx(exact, rel=0.1)
    assert drawn[0] == exact[0]
    check_planner(lambda a, b: ensemble_curve(a, b, 3), predict=(logits, y))


def test_ignored_targets_of_token_logits_do_not_count():
    logits = [torch.randn(2, 3, CLASSES, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    targets = torch.tensor([[1, 2, -100], [0, -100, -100]])
    kept = targets != -100
    assert ensemble_curve(logits, targets)[1] == pytest.approx(
        ensemble_curve([z[kept] for z in logits], targets[kept])[1]
    )


def test_logits_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="logits_list must hold tensors of one shape"):
        ensemble_curve([torch.zeros(2, 3), torch.zeros(2, 4)], torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="logits_list must hold tensors of one shape"):
        ensemble_curve([], torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="repeats must be a whole number >= 1"):
        ensemble_curve([torch.zeros(2, 3)], torch.zeros(2, dtype=torch.long), 0)
