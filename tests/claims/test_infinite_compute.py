import sys

import pytest

from headway.claims import infinite_compute

pytest.importorskip("sklearn")

SHORT = {
    "widths": (16, 64),
    "grids": {**infinite_compute.GRIDS, "lr": [0.01], "epochs": [20, 40]},
    "splits": 4,
    "ensemble_splits": 2,
}
FIXED = {**SHORT, "grids": {name: [value] for name, value in infinite_compute.STANDARD.items()}}


def failed(outcome):
    return [check.what for check in outcome.checks if not check.holds]


def test_claim_holds_at_two_widths_with_fewer_splits():
    outcome = infinite_compute.claim(**SHORT)
    assert len(outcome.checks) == 9
    assert outcome.holds, failed(outcome)
    widths = outcome.panels[0].curves
    assert set(widths) == {"decay 0.1", "decay tuned", "decay, rate and epochs tuned"}
    assert all(list(x) == [16, 64] and len(y) == 2 for x, y in widths.values())
    assert set(outcome.panels[1].curves) == {"h = 16", "h = 64"}


def test_claim_fails_without_weight_decay(monkeypatch):
    train = infinite_compute._train

    def without(rows, width, point, *arguments):
        return train(rows, width, {**point, "weight_decay": 0.0}, *arguments)

    monkeypatch.setattr(infinite_compute, "_train", without)
    # One length only: stopping early would stand in for the decay.
    wrong = failed(infinite_compute.claim(**{**SHORT, "grids": {**SHORT["grids"], "epochs": [40]}}))
    assert "tuned jointly: test loss at h = 64 / at h = 16" in wrong
    assert "best decay at h = 64, 40 epochs, over the standard 0.1" in wrong


@pytest.mark.filterwarnings("ignore:asymptote not identified")
def test_claim_fails_when_all_members_are_the_same(monkeypatch):
    members = infinite_compute._member_logits

    def copies(*arguments):
        return [logits[:, :1].expand_as(logits) for logits in members(*arguments)]

    monkeypatch.setattr(infinite_compute, "_member_logits", copies)
    monkeypatch.setattr(infinite_compute, "_distilled", lambda *arguments: (1.0, 1.0))
    outcome = infinite_compute.claim(**FIXED)
    assert any(what.startswith("ensemble: ") for what in failed(outcome))


def test_claim_fails_for_a_student_that_learns_nothing(monkeypatch):
    monkeypatch.setattr(infinite_compute, "distillation_loss", lambda student, *arguments: 0 * student.sum())
    outcome = infinite_compute.claim(**FIXED)
    assert not outcome.checks[-1].holds


def test_missing_scikit_learn_is_named_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "headway\[estimators\]"'):
        infinite_compute.claim(**SHORT)
