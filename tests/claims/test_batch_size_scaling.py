import sys

import pytest

from headway.claims import batch_size_scaling as subject

pytest.importorskip("sklearn")


def short(seed=0, **options):
    return subject.claim(seed, **{"rows": 800, "draws": 10, **options})


def failed(outcome):
    return [check.what for check in outcome.checks if not check.holds]


def test_claim_holds_in_a_shortened_run():
    outcome = short()
    assert len(outcome.checks) == 7
    assert outcome.holds, failed(outcome)


def test_claim_fails_without_the_bulk_and_its_correction(monkeypatch):
    monkeypatch.setattr(subject, "batch_hessian_edge", lambda lam1, c, B, N=None: lam1)
    assert [what.split(":")[0] for what in failed(short())] == ["matrices", "digits"]


def test_claim_fails_for_a_learner_that_takes_the_smallest_eigenvalue_for_the_largest():
    what = failed(short(draws=5, lower=lambda spectrum: spectrum.lam_max))
    assert [text.split(":")[0] for text in what][-2:] == ["quadratic", "quadratic"]


def test_claim_fails_with_four_times_the_noise(monkeypatch):
    right = subject.calibrate_noise
    monkeypatch.setattr(subject, "calibrate_noise", lambda lam1, top, B, N: 4 * right(lam1, top, B, N))
    assert any("predicted" in what for what in failed(short()))


def test_claim_repeats_for_the_same_seed_and_differs_for_another():
    first, second, other = (short(seed, draws=2) for seed in (0, 0, 1))
    assert first.checks == second.checks != other.checks


def test_panels_show_formula_network_and_quadratic():
    panels = short(draws=1).panels
    assert [len(panel.curves) for panel in panels] == [3, 3, 2]


def test_missing_scikit_learn_is_named_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "headway\[estimators\]"'):
        short()
