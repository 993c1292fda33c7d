from dataclasses import replace

import pytest
import torch

from headway.budget import kinetics as method
from headway.budget.inference_plan import plan_inference
from headway.claims import kinetics

LENGTHS = (1000, 2000, 16000)
IDEAL = kinetics.Timings(
    lengths=LENGTHS,
    dense=[8192 * length / 8e9 for length in LENGTHS],
    sparse=[0.001, 0.0011, 0.0012],
    stream_rate=8e9,
    read_rate=12e9,
)


@pytest.fixture
def ideal(monkeypatch):
    """What a machine that reads its cache at the stream's rate would measure."""
    monkeypatch.setattr(kinetics, "measure", lambda *arguments: IDEAL)


def failing(outcome):
    return [check.what for check in outcome.checks if not check.holds]


def test_claim_holds_on_a_machine_that_the_model_describes(ideal):
    outcome = kinetics.claim()
    assert len(outcome.checks) == 8
    assert outcome.holds, failing(outcome)
    assert outcome.checks[1].measured == pytest.approx(714, abs=0.5)


def test_authors_sign_fails_the_closed_form(ideal, monkeypatch):
    monkeypatch.setattr(kinetics, "KineticsCostModel", lambda **options: method.KineticsCostModel(official_sign=True))
    assert "closed forms" in failing(kinetics.claim())[0]


def test_flops_alone_fail_the_choice_and_the_dominance(ideal, monkeypatch):
    monkeypatch.setattr(kinetics, "KineticsCostModel", lambda *a, **options: method.KineticsCostModel(intensity=0))
    assert {what.split(":")[0] for what in failing(kinetics.claim())} >= {
        "Qwen3-0.6B, 32768 tokens",
        "at the price of one answer of 14B",
    }


def test_a_planner_that_ignores_its_budget_fails(ideal, monkeypatch):
    monkeypatch.setattr(
        kinetics,
        "plan_inference",
        lambda records, budgets, **options: plan_inference(records, [1e3 * b for b in budgets], **options),
    )
    assert any("planner" in what for what in failing(kinetics.claim()))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"stream_rate": 12e9}, "its slope"),
        ({"dense": [0.016, 0.002, 0.016]}, "r^2"),
        ({"sparse": [0.0005, 0.001, 0.0012]}, "cached positions: ratio"),
        ({"sparse": [0.004, 0.004, 0.004]}, "dense step"),
    ],
    ids=["slower than its bytes", "not linear", "not flat", "not faster"],
)
def test_timings_that_the_model_does_not_describe_fail(monkeypatch, change, what):
    monkeypatch.setattr(kinetics, "measure", lambda *arguments: replace(IDEAL, **change))
    assert any(what in each for each in failing(kinetics.claim()))


def test_measurement_counts_every_step_by_its_clock_and_restores_the_threads():
    ticks = iter(range(10**6))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        timings = kinetics.measure((600, 800, 1000), 512, rounds=2, seed=0, clock=lambda: float(next(ticks)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert timings.dense == timings.sparse == [1.0, 1.0, 1.0]
    assert timings.stream_rate == timings.read_rate == 8 * 1000 * 128 * 4
    assert next(ticks) == 2 * 3 * 3 * 4


def test_short_run_measures_and_draws():
    outcome = kinetics.claim(lengths=(600, 800, 1000), rounds=2)
    assert all(check.holds for check in outcome.checks[:4])
    assert len(outcome.panels) == 2
    assert len(outcome.panels[0].curves) == 4
