import math
from itertools import pairwise

import numpy as np
import pytest

from headway.plan.reference import COMPARED, Curve, Reference, areas, reference
from headway.plan.sizes import LADDER, size_named

TRUE = {"E": 1.5, "A": 2.0, "alpha": 0.5, "B": 0.4, "beta": 0.3, "C": 2e-3}


def rates(kind, steps, warmup=10):
    up = [step / warmup for step in range(warmup)]
    z = [(step - warmup) / (steps - warmup) for step in range(warmup, steps)]
    shapes = {"constant": [1.0] * len(z), "linear": [1 - part for part in z]}
    return tuple(3e-3 * rate for rate in [*up, *shapes[kind]])


def loss(size, lrs, tokens):
    S1, S2 = areas(lrs, tokens)
    with np.errstate(divide="ignore"):
        return TRUE["E"] + TRUE["A"] * S1 ** -TRUE["alpha"] + TRUE["B"] * size ** -TRUE["beta"] - TRUE["C"] * S2


def curve(size, kind, steps):
    lrs = rates(kind, steps)
    at = tuple(range(steps // 4, steps + 1, steps // 40))
    return Curve(size, 2048, lrs, at, tuple(loss(size, lrs, 2048)[np.array(at) - 1]))


@pytest.fixture(scope="module")
def fitted():
    curves = [curve(size, "linear", steps) for size in (0.15, 0.8, 1.8) for steps in (400, 1200)]
    settings = {"tokens_per_step": 2048, "vocab_size": 2048, "lr": 3e-3}
    return Reference.fit(curves, early={0.15: 6.2, 1.8: 6.0}, settings=settings)


def test_the_law_is_recovered_from_its_own_curves(fitted):
    for size, kind, steps in ((0.15, "linear", 800), (0.4, "linear", 1000), (1.8, "constant", 600)):
        lrs = rates(kind, steps)
        predicted, true = fitted.losses(size, lrs, 2048), loss(size, lrs, 2048)
        known = np.isfinite(predicted)
        assert known[-1]
        assert predicted[known] == pytest.approx(true[known], rel=5e-3)
    assert fitted.spread < 1e-3


def test_before_the_first_measured_point_nothing_is_predicted(fitted):
    predicted = fitted.losses(0.8, rates("linear", 400), 2048)
    assert np.isnan(predicted[:20]).all()
    assert np.isfinite(predicted[-1])


def test_what_lies_outside_of_the_runs_is_said(fitted):
    assert fitted.outside(0.8, 500_000) == ""
    assert "M parameters (measured: 0.15 to 1.8)" in fitted.outside(5.0, 500_000)
    assert "M tokens" in fitted.outside(0.8, 5e8)


def test_the_early_loss_is_interpolated_in_the_logarithm_of_the_size(fitted):
    assert fitted.early_loss(0.15) == 6.2
    assert fitted.early_loss(math.sqrt(0.15 * 1.8)) == pytest.approx(6.1)
    assert fitted.early_loss(50.0) == 6.0


def test_plain_values_hold_the_reference(fitted):
    assert Reference.from_dict(fitted.to_dict()) == fitted


def test_one_size_cannot_tell_the_size_term():
    with pytest.raises(ValueError, match="curves must be of at least two model sizes, got one"):
        Reference.fit([curve(0.8, "linear", 400)], early={0.8: 6.0}, settings={})


def test_the_reference_that_comes_with_the_package_is_sensible():
    ref = reference()
    lrs = rates("linear", 600)
    by_size = [ref.losses(size.body() / 1e6, lrs, 2048)[-1] for size in LADDER[:3]]
    assert by_size == sorted(by_size, reverse=True)  # at equal tokens the larger model is better
    longer = [ref.losses(0.8, rates("linear", steps), 2048)[-1] for steps in (300, 600, 1200)]
    assert longer == sorted(longer, reverse=True)
    assert 0 < ref.spread < 0.03
    assert all(4 < loss < 8 for loss in ref.early.values())
    assert COMPARED == (20, 60)


def test_sizes_count_what_transformers_counts():
    from transformers import LlamaConfig, LlamaForCausalLM

    for size in LADDER[:3]:
        config = LlamaConfig(
            vocab_size=300,
            tie_word_embeddings=True,
            num_hidden_layers=size.layers,
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
        )
        model = LlamaForCausalLM(config)
        assert size.parameters(300) == sum(p.numel() for p in model.parameters())


def test_the_ladder_rises_and_every_step_can_be_configured():
    sizes = [size.parameters(2048) for size in LADDER]
    assert all(1.9 < b / a < 4 for a, b in pairwise(sizes))
    assert all(size.hidden_size % (2 * size.heads) == 0 for size in LADDER)
    assert size_named("m") is LADDER[3]
    with pytest.raises(ValueError, match=r"model size must be auto or one of xxs, xs, s, .*, got 'huge'"):
        size_named("huge")
