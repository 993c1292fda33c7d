import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from headway.optim.fira import Fira, fira_param_groups
from headway.testing import check_optimizer

# Weights after 50 steps of `official_problem`, with a spike of the gradient at step 30: the authors' code.
OFFICIAL = json.loads((Path(__file__).parent / "data" / "fira_official.json").read_text())["runs"]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def projected(weight, **options):
    return Fira([{"params": [weight], "projected": True}], **options)


def train(weight, optimizer, steps, gradient=lambda step: random(1)):
    for step in range(steps):
        weight.grad = gradient(step)
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "update_proj_gap": 3},
        {"rank": 2, "update_proj_gap": 3, "scaling": False, "proj_type": "left"},
        {"rank": 1, "alpha": 0.5, "residual": "orthogonal", "limiter": None, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_contract(options):
    check_optimizer(Fira, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("std", {}),
        ("alpha", {"alpha": 0.5}),
        ("reverse_std", {"proj_type": "reverse_std"}),
        ("galore", {"scaling": False}),
    ],
)
def test_agrees_with_the_official_code(name, options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(6, 4), (4, 7), (5,)]]
    groups = [{"params": params[:2], "projected": True}, {"params": params[2:], "projected": False}]
    optimizer = Fira(groups, lr=0.01, rank=2, weight_decay=0.1, **options)
    for step in range(50):
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            noise = torch.randn(p.shape, generator=generator)
            p.grad = p.detach() - 1 + noise * (20.0 if step == 30 else 1.0)
        optimizer.step()
    for p, expected in zip(params, OFFICIAL[name], strict=True):
        torch.testing.assert_close(p.detach().flatten(), torch.tensor(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_full_rank_is_adamw(shape):
    ours, theirs = nn.Parameter(random(*shape)), nn.Parameter(random(*shape))
    fira = projected(ours, rank=4, lr=0.01)
    adamw = Fira([{"params": [theirs], "projected": False}], lr=0.01)
    # One direction: in the singular basis Adam's division by entries is another one, so the gradient is kept diagonal.
    base = torch.zeros(shape)
    base.fill_diagonal_(1.0)
    for step in range(20):
        g = base * torch.tensor([4.0, 3.0, 2.0, 1.0]).view(-1, 1 if shape[0] == 4 else 4) * (1 + 0.1 * (step % 3))
        for p, optimizer in ((ours, fira), (theirs, adamw)):
            p.grad = g.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_norm_of_the_residual_grows_by_at_most_one_percent():
    weight = nn.Parameter(random(8, 6))
    optimizer = projected(weight, rank=2)
    norms = []
    for step in range(60):
        weight.grad = random(8, 6, seed=step) * (1000 if step == 50 else 1)
        optimizer.step()
        norms.append(optimizer.state[weight]["residual_norm"].item())
    for before, after in pairwise(norms):
        assert after <= 1.01 * before * (1 + 1e-6)
    assert norms[50] == pytest.approx(1.01 * norms[49], rel=1e-6)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_without_the_limiter_a_spike_grows_the_residual_as_adams_step(shape):
    # A limit that is never reached, so that the norm is stored. phi divides the factor 1000 out of the residual; what
    # is left is the growth of psi, known in closed form for a constant gradient.
    beta1, beta2, before = 0.9, 0.99, 300
    steady, weight = random(*shape, dtype=torch.float64), nn.Parameter(torch.zeros(*shape, dtype=torch.float64))
    optimizer = projected(weight, rank=2, limiter=1e9, betas=(beta1, beta2), eps=1e-30)
    train(weight, optimizer, before, lambda _: steady)
    calm = optimizer.state[weight]["residual_norm"].item()
    train(weight, optimizer, 1, lambda _: 1000 * steady)
    grown = optimizer.state[weight]["residual_norm"].item() / calm
    m, v = 1 - beta1**before, 1 - beta2**before
    spiked = (beta1 * m + (1 - beta1) * 1e3) / (beta2 * v + (1 - beta2) * 1e6) ** 0.5
    assert grown == pytest.approx(spiked / (m / v**0.5), rel=1e-6)
    assert grown < 2


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
@pytest.mark.parametrize("outside", [1.0, 1e-2, 1e-4])
def test_the_stored_norm_is_that_of_the_residual_however_little_of_the_gradient_it_is(shape, outside):
    # A gradient of rank 4 and a little noise: |G|^2 - |R|^2 alone loses all digits in float32.
    G = random(shape[0], 4) @ random(4, shape[1], seed=1) + outside * random(*shape, seed=2)
    norms = []
    for dtype in (torch.float32, torch.float64):
        weight = nn.Parameter(torch.zeros(*shape, dtype=dtype))
        optimizer = projected(weight, rank=4)
        train(weight, optimizer, 1, lambda _, dtype=dtype: G.to(dtype))
        norms.append(optimizer.state[weight]["residual_norm"].item())
    assert norms[1] > 0.1 * outside
    assert norms[0] == pytest.approx(norms[1], rel=1e-2 if outside == 1e-4 else 1e-4)


def test_a_zero_gradient_holds_the_residual_back_afterwards_but_not_without_limiter():
    for limiter, held_back in ((1.01, True), (None, False)):
        weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
        optimizer = projected(weight, rank=2, limiter=limiter, lr=1.0)
        for step in range(3):
            start = weight.detach().clone()
            train(weight, optimizer, 1, lambda _, step=step: (step != 1) * random(8, 6, seed=step).double())
        P = optimizer.state[weight]["projector"]
        moved = weight.detach() - start
        assert ((moved - moved @ P.T @ P).norm() < 1e-6) == held_back


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_each_row_or_column_gets_the_residual_times_a_positive_number(shape):
    G = random(*shape, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(*shape, dtype=torch.float64))
    optimizer = projected(weight, rank=1, lr=1.0)
    train(weight, optimizer, 1, lambda _: G)
    P, moved = optimizer.state[weight]["projector"], -weight.detach()
    if shape[0] < shape[1]:  # the left side is the right side of the transpose
        G, P, moved = G.T, P.T, moved.T
    outside, residual = moved - moved @ P.T @ P, G - G @ P.T @ P
    cosines = torch.nn.functional.cosine_similarity(outside, residual, dim=1)
    torch.testing.assert_close(cosines, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("residual", ["code", "orthogonal"])
def test_the_residual_keeps_a_share_of_the_subspace_in_the_code_and_none_in_the_paper(residual):
    G, alpha = random(6, 4, dtype=torch.float64), 0.25
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = projected(weight, rank=1, lr=1.0, alpha=alpha, residual=residual, correct_bias=False)
    train(weight, optimizer, 1, lambda _: G)
    P = optimizer.state[weight]["projector"]
    R = G @ P.T
    psi = 0.1 * R / (0.001**0.5 * R.abs() + 1e-6)
    phi = psi.abs() / (R.abs() + 1e-8)
    expected = alpha * psi @ P + phi * (G - (alpha if residual == "code" else 1.0) * R @ P)
    torch.testing.assert_close(-weight.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_scale_of_all_gradients_does_not_matter():
    ends = []
    for scale in (1.0, 1e3):
        weight = nn.Parameter(random(6, 4, dtype=torch.float64))
        train(
            weight, projected(weight, rank=2, eps=1e-30), 20, lambda step, s=scale: s * random(6, 4, seed=step).double()
        )
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_scaling_off_is_galore():
    weight = nn.Parameter(random(6, 4))
    start = weight.detach().clone()
    optimizer = projected(weight, rank=1, scaling=False, lr=0.1)
    train(weight, optimizer, 5, lambda step: random(6, 4, seed=step))
    change = weight.detach() - start
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 1
    assert "residual_norm" not in optimizer.state[weight]


@pytest.mark.parametrize(("shape", "side"), [((6, 4), "right"), ((4, 6), "left"), ((5, 5), "right")])
def test_sides_orthonormal_projectors_and_state_bytes(shape, side):
    weight = nn.Parameter(random(*shape))
    optimizer = projected(weight, rank=2)
    train(weight, optimizer, 2, lambda step: random(*shape, seed=step))
    (m, n), P = shape, optimizer.state[weight]["projector"]
    P = P if side == "right" else P.T
    assert P.shape == (2, n if side == "right" else m)
    torch.testing.assert_close(P @ P.T, torch.eye(2), rtol=0, atol=1e-5)
    small, projector = (m * 2, 2 * n) if side == "right" else (2 * n, m * 2)
    assert optimizer.state_bytes() == 4 * (2 * small + projector + 1)


def test_the_projector_changes_every_gap_and_moments_stay():
    weight = nn.Parameter(random(6, 4))
    optimizer = projected(weight, rank=2, update_proj_gap=3)
    seen = []
    for step in range(7):
        weight.grad = random(6, 4, seed=step)
        optimizer.step()
        seen.append(optimizer.state[weight]["projector"].clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, False, True]
    assert optimizer.state[weight]["step"] == 7


def test_a_row_without_gradient_gets_no_residual_step():
    weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = projected(weight, rank=2, lr=1.0)
    for step in range(3):
        g = random(6, 4, seed=step)
        g[2] = 0
        weight.grad = g
        optimizer.step()
    assert torch.equal(weight.detach()[2], torch.zeros(4))


def test_a_resumed_run_with_bfloat16_weights_is_the_uninterrupted_one():
    def start():
        weight = nn.Parameter(random(6, 4).bfloat16())
        return weight, projected(weight, rank=2, update_proj_gap=4, lr=0.05)

    def gradient(step):
        return random(6, 4, seed=step).bfloat16()

    weight, optimizer = start()
    train(weight, optimizer, 6, gradient)
    other, loaded = start()
    with torch.no_grad():
        other.copy_(weight)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(6, 12):
        for p, o in ((weight, optimizer), (other, loaded)):
            p.grad = gradient(step)
            o.step()
    assert torch.equal(weight, other)
    assert loaded.state[other]["exp_avg"].dtype == torch.float32


def test_what_cannot_be_projected_is_refused():
    with pytest.raises(ValueError, match=r"rank must be <= the shorter side .* got 5 for shape \(6, 4\)"):
        projected(nn.Parameter(torch.zeros(6, 4)), rank=5)
    with pytest.raises(ValueError, match=r"params must be 2-D with projected=True, got shape \(3,\)"):
        projected(nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"limiter must be >= 1 or None, got 0\.5"):
        projected(nn.Parameter(torch.zeros(16, 16)), limiter=0.5)
    with pytest.raises(ValueError, match="rank must be < the shorter side of some linear layer"):
        fira_param_groups(nn.Linear(4, 4), rank=8)
