import sys

import pytest
import torch

from headway.claims import wsd_s
from headway.schedules import WSDSLR

pytest.importorskip("sklearn")

SMALL = {"chains": 500, "digits_checkpoints": (300, 600), "seeds": 24}


def test_claim_holds_at_a_reduced_size():
    outcome = wsd_s.claim(**SMALL)
    assert outcome.holds, [check for check in outcome.checks if not check.holds]
    assert len(outcome.checks) == 2 + 2 + 4 + 4


def test_claim_fails_where_it_should_for_a_schedule_that_never_decays(monkeypatch):
    def constant(optimizer, checkpoints, **options):
        return WSDSLR(optimizer, checkpoints, **{**options, "min_lr_ratio": 1.0})

    monkeypatch.setattr(wsd_s, "WSDSLR", constant)
    failed = [check.what for check in wsd_s.claim(**SMALL).checks if not check.holds]
    assert any("height after the decay" in what for what in failed)
    assert sum("fall of the loss" in what for what in failed) == 2


def test_claim_fails_where_it_should_for_a_decay_as_long_as_its_cycle(monkeypatch):
    def always_decaying(optimizer, checkpoints, **options):
        return WSDSLR(optimizer, checkpoints, **{**options, "decay_fraction": 1.0, "warmup_steps": 0})

    monkeypatch.setattr(wsd_s, "WSDSLR", always_decaying)
    checks, _ = wsd_s._river_valley()
    assert not all(check.holds for check in checks)


def test_expected_losses_of_the_river_valley_are_those_computed_independently():
    at = [step - 1 for step in wsd_s.CHECKPOINTS]
    last = wsd_s.CHECKPOINTS[-1]
    single = wsd_s._valley(wsd_s._rates(wsd_s._wsd_s, [0.5], last), 0.005)[at, 0]
    cosine = wsd_s._valley(wsd_s._rates(wsd_s._cyclic_cosine, [0.5], last), 0.005)[at, 0]
    branches = [float(wsd_s._valley(wsd_s._rates(wsd_s._branch(b), [0.5], b), 0.005)[-1, 0]) for b in wsd_s.CHECKPOINTS]
    assert single.tolist() == pytest.approx([-0.497, -1.074, -2.234], abs=0.006)
    assert branches == pytest.approx([-0.497, -1.079, -2.238], abs=0.006)
    assert cosine.tolist() == pytest.approx([-0.326, -0.671, -1.360], abs=0.006)


def test_a_constant_rate_settles_at_the_stationary_height():
    rates = torch.full((2000, 1), 0.5, dtype=torch.float64)
    assert float(wsd_s._valley(rates, slope=0.0)[-1]) == pytest.approx(0.5 / (2 * 1.5))


def test_panels_hold_rate_valley_and_training_curves():
    outcome = wsd_s.claim(chains=10, digits_checkpoints=(100, 200), seeds=1)
    assert len(outcome.panels) == 3
    for panel in outcome.panels:
        for x, y in panel.curves.values():
            assert len(x) == len(y) > 10


def test_missing_scikit_learn_is_named_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "headway\[estimators\]"'):
        wsd_s.claim(chains=10, digits_checkpoints=(100, 200), seeds=1)
