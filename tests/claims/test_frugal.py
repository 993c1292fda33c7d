import pytest
import torch

from headway.claims.frugal import claim


@pytest.fixture(scope="module")
def outcome():
    return claim(steps=240, update_gap=30)


def test_claim_holds_in_fewer_steps(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []
    assert outcome.holds


def test_state_is_two_moments_of_64_by_8_and_the_projector(outcome):
    assert outcome.checks[2].measured == outcome.checks[2].baseline == 2 * 4 * 64 * 8 + 4 * 8 * 48


def test_claim_fails_without_the_state_free_part():
    assert not claim(steps=40, update_gap=10, state_free="none").holds


def test_panels_show_all_three_methods_over_all_steps(outcome):
    for panel in outcome.panels:
        assert len(panel.curves) == 3
        assert all(len(x) == len(y) == 241 for x, y in panel.curves.values())
        assert all(y[0] == pytest.approx(1.0, abs=1e-6) for _, y in panel.curves.values())


def test_claim_is_a_function_of_its_seed_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    first, second, other = (claim(seed, steps=20).checks[0].measured for seed in (3, 3, 4))
    assert first == second != other
    assert torch.get_num_threads() == threads
