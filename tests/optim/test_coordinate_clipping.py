import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headway.optim import Frugal
from headway.optim.coordinate_clipping import (
    CoordinateClip,
    clip_top_coordinates_,
    compare_directions,
    directional_sharpness,
)
from headway.testing import check_optimizer

# Weights after 50 steps of the problem below with panyan7/adam-vs-sgd at d85d3a1, foreach=True: SGDClip(lr=0.01,
# momentum=0.9, weight_decay=0.01, coordinate_clip=0.25), AdamClip(lr=0.05, betas=(0.9, 0.99), weight_decay=0.02,
# coordinate_clip=0.5).
SGD_WEIGHTS = [0.7410906, 2.1617301, 0.6247469, 1.6978681, 1.6183435, 1.1489648, 1.2062105, -0.538213, 2.5387573]
SGD_WEIGHTS += [-0.3839948, -1.4144233, 0.9486911, 2.2254636, 1.7767823, 1.921703, 1.8919766]
ADAM_WEIGHTS = [1.1010325, 0.0957839, -2.0207598, 0.6346577, -0.7825776, -0.9261093, 0.5590676, 1.0132507, -0.5783001]
ADAM_WEIGHTS += [0.2290149, -0.2360639, 0.6510481, -0.7386658, 0.9927654, -0.8965502, 0.1368002]


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(4, 3), (4,)]]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randn(p.shape, generator=generator)
        p.grad = (p.detach() - 1) + noise.to(p.dtype)


def run(make, steps=50, dtype=torch.float32):
    params = problem(dtype)
    optimizer = make(params)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params]), optimizer


def worked_example():
    first, second = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    first.grad, second.grad = torch.tensor([[3.0, -1.0], [0.5, -7.0]]), torch.tensor([2.0, -4.0, 0.1])
    return [first, second]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"inner": "adamw", "lr": 0.1, "target": "first_moment", "fraction": 0.5},
        {"inner": "adamw", "lr": 0.1, "target": "update", "fraction": 0.5, "scope": "tensor"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:coordinate clipping")
def test_contract(options):
    check_optimizer(CoordinateClip, **options)


def test_around_sgd_it_agrees_with_the_official_code():
    weights, _ = run(lambda ps: CoordinateClip(torch.optim.SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.01), 0.25))
    torch.testing.assert_close(weights, torch.tensor(SGD_WEIGHTS), rtol=1e-5, atol=1e-6)


def test_around_adam_it_agrees_with_the_official_code():
    def make(ps):
        inner = torch.optim.Adam(ps, lr=0.05, betas=(0.9, 0.99), weight_decay=0.02)
        return CoordinateClip(inner, 0.5, "first_moment")

    weights, _ = run(make)
    torch.testing.assert_close(weights, torch.tensor(ADAM_WEIGHTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("fraction", "tau"), [(0.3, 3.0), (0.5, 2.0), (0.9, 0.1), (0.1, 7.0)])
def test_worked_example(fraction, tau):
    params = worked_example()
    before = [p.grad.clone() for p in params]
    assert clip_top_coordinates_(params, fraction) == pytest.approx(tau)
    for p, g in zip(params, before, strict=True):
        assert torch.equal(p.grad, g.clamp(-tau, tau))


@given(st.integers(0, 10**6), st.floats(0, 0.99))
def test_signs_stay_nothing_grows_few_change_and_twice_is_once(seed, fraction):
    params = problem()
    set_gradients(params, seed)
    before = torch.cat([p.grad.flatten() for p in params])
    clip_top_coordinates_(params, fraction)
    once = torch.cat([p.grad.flatten() for p in params])
    assert torch.equal(once.sign(), before.sign())
    assert (once.abs() <= before.abs()).all()
    assert (once != before).sum() <= int(len(before) * fraction)
    clip_top_coordinates_(params, fraction)
    assert torch.equal(torch.cat([p.grad.flatten() for p in params]), once)


def test_it_scales_with_the_gradient_and_does_not_see_how_tensors_are_split():
    params, scaled, joined = problem(), problem(), nn.Parameter(torch.zeros(16))
    set_gradients(params, 0)
    for p, q in zip(params, scaled, strict=True):
        q.grad = 8 * p.grad
    joined.grad = torch.cat([p.grad.flatten() for p in params]).flip(0)
    for each in (params, scaled, [joined]):
        clip_top_coordinates_(each, 0.4)
    for p, q in zip(params, scaled, strict=True):
        assert torch.equal(8 * p.grad, q.grad)
    assert torch.equal(torch.cat([p.grad.flatten() for p in params]), joined.grad.flip(0))


def test_all_but_one_clipped_is_sign_descent():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([5.0, -3.0, 2.0, 0.5])
    CoordinateClip(torch.optim.SGD([p], lr=0.1), fraction=0.75).step()
    torch.testing.assert_close(p.detach(), -0.1 * 0.5 * torch.tensor([1.0, -1.0, 1.0, 1.0]))


def test_scopes():
    first, second = worked_example()
    CoordinateClip(torch.optim.SGD([first, second], lr=0.0), fraction=0.5, scope="tensor").step()
    assert first.grad.tolist() == [[1.0, -1.0], [0.5, -1.0]]
    assert second.grad.tolist() == pytest.approx([2.0, -2.0, 0.1])
    first, second = worked_example()
    groups = [{"params": [first]}, {"params": [second]}]
    CoordinateClip(torch.optim.SGD(groups, lr=0.0), fraction=0.5, scope="group").step()
    assert first.grad.tolist() == [[1.0, -1.0], [0.5, -1.0]]


def test_the_first_moment_is_clipped_and_the_second_is_plain_adams():
    _, clipped = run(lambda ps: CoordinateClip(torch.optim.AdamW(ps, lr=0.0), 0.5, "first_moment"), steps=5)
    _, plain = run(lambda ps: torch.optim.AdamW(ps, lr=0.0), steps=5)
    for ours, theirs in zip(clipped.state.values(), plain.state.values(), strict=True):
        torch.testing.assert_close(ours["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-6, atol=0)
        assert not torch.allclose(ours["exp_avg"], theirs["exp_avg"])


def test_without_clipping_the_first_moment_path_is_adamw():
    ours, _ = run(lambda ps: CoordinateClip(torch.optim.AdamW(ps, lr=0.01), 0.0, "first_moment"))
    theirs, _ = run(lambda ps: torch.optim.AdamW(ps, lr=0.01))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_first_moment_path_leaves_a_state_that_adamw_goes_on_with():
    _, clipped = run(lambda ps: CoordinateClip(torch.optim.AdamW(ps, lr=0.01), 0.5, "first_moment"), steps=3)
    params = problem()
    plain = torch.optim.AdamW(params, lr=0.01)
    plain.load_state_dict(clipped.state_dict())
    set_gradients(params, 3)
    plain.step()
    assert plain.state[params[0]]["step"] == 4


def test_the_update_is_clipped_for_any_optimizer():
    params = problem()
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    reference = problem()
    set_gradients(reference, 0)
    torch.optim.Adagrad(reference, lr=0.1, eps=1.0).step()
    CoordinateClip(torch.optim.Adagrad(params, lr=0.1, eps=1.0), 0.5, "update").step()
    full = torch.cat([(p - b).detach().flatten() for p, b in zip(reference, before, strict=True)])
    clipped = torch.cat([(p - b).detach().flatten() for p, b in zip(params, before, strict=True)])
    tau = full.abs().sort(descending=True).values[8]
    torch.testing.assert_close(clipped, full.clamp(-tau, tau), rtol=1e-4, atol=1e-7)


def test_it_clips_inside_the_step_of_methods_with_subspaces():
    params = problem()
    optimizer = CoordinateClip(Frugal([{"params": params, "projected": None}], projection="columns", density=0.5), 0.25)
    set_gradients(params, 0)
    largest = max(p.grad.abs().max() for p in params)
    optimizer.step()
    assert max(p.grad.abs().max() for p in params) < largest


def test_what_cannot_be_done_is_refused():
    p = problem()
    with pytest.raises(ValueError, match="target must be 'gradient' or 'update' around SGD, got 'first_moment'"):
        CoordinateClip(torch.optim.SGD(p, lr=0.1), target="first_moment")
    with pytest.raises(ValueError, match="amsgrad=True"):
        CoordinateClip(torch.optim.AdamW(p, amsgrad=True), target="first_moment")
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1"):
        CoordinateClip(torch.optim.SGD(p, lr=0.1), fraction=1)
    with pytest.raises(ValueError, match="parameters must have gradients, got none"):
        clip_top_coordinates_(p, 0.1)


def test_a_gradient_that_is_not_finite_raises_unless_allowed():
    first, second = worked_example()
    first.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"parameter 0 of group 0, shape \(2, 2\)"):
        clip_top_coordinates_([first, second], 0.3)
    assert clip_top_coordinates_([first, second], 0.3, error_if_nonfinite=False) != 0
    assert second.grad.tolist() == pytest.approx([2.0, -4.0, 0.1])


def test_a_vanishing_threshold_is_told():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([1.0, 0.0, 0.0, 0.0])
    with pytest.warns(UserWarning, match="the threshold is zero"):
        clip_top_coordinates_([p], 0.5)


def test_sharpness_of_a_quadratic_is_exact_and_does_not_see_the_length():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    H = half + half.T
    x, v = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    x = nn.Parameter(x)
    for length in (1.0, 1e-3, 1e3):
        s = directional_sharpness(lambda: x @ H @ x / 2, [x], [length * v])
        assert s == pytest.approx((v @ H @ v / (v @ v)).item(), rel=1e-12)
    with pytest.raises(ValueError, match="direction must not be zero"):
        directional_sharpness(lambda: x @ H @ x / 2, [x], [0 * v])


def test_comparing_directions_leaves_the_model_as_it_was():
    model = nn.Linear(3, 1, bias=False)
    h = torch.tensor([100.0, 1.0, 1.0])
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizers = {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1),
        "clipped": CoordinateClip(torch.optim.SGD(model.parameters(), lr=0.1), 0.34),
        "adam": torch.optim.Adam(model.parameters(), lr=0.1),
    }
    table = compare_directions(model, lambda m: (h * m.weight.square()).sum() / 2, optimizers)
    assert torch.equal(model.weight.detach(), torch.ones(1, 3))
    assert model.weight.grad is None
    assert table["sgd"]["sharpness"] == pytest.approx(float((h**3).sum() / (h**2).sum()), rel=1e-5)
    assert table["clipped"]["sharpness"] == pytest.approx(34.0, rel=1e-5)
    assert table["adam"]["sharpness"] == pytest.approx(34.0, rel=1e-5)
    assert table["clipped"]["reduction"] > table["sgd"]["reduction"]
