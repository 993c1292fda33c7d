import pytest
import torch
from torch import nn

from headway.optim.spikes import GradientSpikeMonitor, GradientSpikes


def report(monitor, parameter, gradient):
    parameter.grad = torch.as_tensor(gradient, dtype=parameter.dtype)
    return monitor.update([("p", parameter)])["p"]


def test_score_is_the_entry_over_its_mean_over_steps():
    monitor = GradientSpikeMonitor(window=1000)
    gradients = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        score = monitor.scores("p", gradient)
        torch.testing.assert_close(score, gradient.abs() / gradients[: step + 1].abs().mean(0))


def test_a_thousandfold_entry_among_many_is_the_only_spike():
    monitor, parameter = GradientSpikeMonitor(window=500), nn.Parameter(torch.zeros(4, 5))
    for _ in range(200):
        assert report(monitor, parameter, -torch.ones(4, 5)) == GradientSpikes(1.0, 0)
    spiked = torch.ones(4, 5)
    spiked[2, 3] = -1000.0
    largest, entries = report(monitor, parameter, spiked)
    assert largest == pytest.approx(1000 * 201 / 1200, rel=1e-5)
    assert entries == 1


def test_beyond_the_window_the_mean_follows_the_gradients():
    monitor, parameter = GradientSpikeMonitor(window=10), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    for _ in range(100):
        report(monitor, parameter, [1.0])
    assert report(monitor, parameter, [100.0]).largest == pytest.approx(100 / (0.9 + 10))
    for _ in range(300):
        last = report(monitor, parameter, [100.0])
    assert last.largest == pytest.approx(1.0)


def test_zero_gradients_score_zero_and_infinite_ones_score_infinity_and_leave_the_mean_alone():
    monitor, parameter = GradientSpikeMonitor(), nn.Parameter(torch.zeros(2))
    assert report(monitor, parameter, [0.0, 0.0]) == GradientSpikes(0.0, 0)
    report(monitor, parameter, [2.0, 2.0])
    for bad in (float("nan"), float("-inf")):
        assert report(monitor, parameter, [1.0, bad]) == GradientSpikes(float("inf"), 1)
    assert report(monitor, parameter, [1.0, 1.0]).largest < 2


def test_parameters_without_a_gradient_are_left_out_and_gradients_are_only_read():
    monitor, model = GradientSpikeMonitor(), nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), -3.0)
    assert list(monitor.update(model.named_parameters())) == ["weight"]
    assert (model.weight.grad == -3).all()
    assert monitor.update([]) == {}


def test_a_monitor_goes_on_from_its_state():
    first, second = GradientSpikeMonitor(window=20), GradientSpikeMonitor(window=20)
    parameter = nn.Parameter(torch.zeros(3))
    gradients = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    for gradient in gradients[:30]:
        report(first, parameter, gradient)
    second.load_state_dict(first.state_dict())
    for gradient in gradients[30:]:
        assert report(first, parameter, gradient) == report(second, parameter, gradient)


def test_bad_values_are_refused_with_their_name():
    with pytest.raises(ValueError, match="window must be a whole number >= 1, got 0"):
        GradientSpikeMonitor(window=0)
    with pytest.raises(ValueError, match="threshold must be > 0, got 0"):
        GradientSpikeMonitor(threshold=0)
