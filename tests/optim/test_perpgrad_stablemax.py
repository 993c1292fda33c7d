import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headway.optim.perpgrad_stablemax import (
    PerpGrad,
    StableMaxCrossEntropyLoss,
    log_stablemax,
    project_orthogonal_gradients_,
    softmax_collapse_fraction,
    stablemax,
    stablemax_cross_entropy,
)
from headway.testing import check_optimizer

# Weights after 50 steps of `golden_problem` with OrthoGrad of LucasPrietoAl/grokking-at-the-edge-of-numerical-stability
# at 0cc9e8d around torch.optim.SGD(lr=0.01) and torch.optim.AdamW(lr=0.05, betas=(0.9, 0.99)).
SGD_WEIGHTS = [5.2140708, 0.7835402, -0.54778, 1.97923, -0.1448392, -0.0708934, -0.593698, -0.0418664, 13.0101547]
SGD_WEIGHTS += [-0.7047266, 0.065807, 0.4872651]
ADAMW_WEIGHTS = [2.1252019, 0.4420831, -2.3414652, 0.7934019, -0.7365975, -0.7770172, 0.2721419, 0.7884393, -0.2823639]
ADAMW_WEIGHTS += [0.466655, -0.1986524, 0.6902157]


def golden_problem(make):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.randn(4, generator=generator))]
    optimizer = make(params)
    for step in range(50):
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            noise = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randn(p.shape, generator=generator)
            p.grad = (p.detach() - 1) + noise
        optimizer.step()
    return params


def pair(seed=0, shape=(5, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
    p.grad = torch.randn(shape, generator=generator, dtype=dtype)
    return p


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"inner": "adamw", "lr": 0.1, "renormalize": False}], ids=str)
def test_contract(options):
    check_optimizer(PerpGrad, **options)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=0.01), SGD_WEIGHTS),
        (lambda ps: torch.optim.AdamW(ps, lr=0.05, betas=(0.9, 0.99)), ADAMW_WEIGHTS),
    ],
    ids=["sgd", "adamw"],
)
def test_agrees_with_the_official_code(make, expected):
    weight, _ = golden_problem(lambda ps: PerpGrad(make(ps)))
    torch.testing.assert_close(weight.detach().flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6), st.booleans())
def test_the_result_is_orthogonal_and_keeps_the_norm_if_asked(seed, renormalize):
    p = pair(seed)
    norm = p.grad.norm()
    project_orthogonal_gradients_([p], renormalize)
    assert abs((p * p.grad).sum()) <= 1e-12 * p.norm() * norm
    if renormalize:
        torch.testing.assert_close(p.grad.norm(), norm)
    else:
        assert p.grad.norm() <= norm


def test_the_projection_is_exact_for_long_float32_tensors():
    p = pair(shape=(300, 1000), dtype=torch.float32)
    p.grad += 3 * p.detach()
    project_orthogonal_gradients_([p])
    inner = (p.detach().double() * p.grad.double()).sum()
    assert abs(inner) <= 1e-6 * p.detach().double().norm() * p.grad.double().norm()


def test_an_orthogonal_gradient_and_a_zero_weight_change_nothing():
    p = nn.Parameter(torch.tensor([1.0, 0.0]))
    p.grad = torch.tensor([0.0, 3.0])
    zero = nn.Parameter(torch.zeros(3))
    zero.grad = torch.tensor([1.0, 2.0, 3.0])
    project_orthogonal_gradients_([p, zero])
    assert p.grad.tolist() == [0.0, 3.0]
    torch.testing.assert_close(zero.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_a_parallel_gradient_becomes_zero_not_noise():
    p = nn.Parameter(torch.tensor([3.3, 1.7, 0.1]))
    p.grad = 0.3 * p.detach()
    project_orthogonal_gradients_([p])
    assert p.grad.tolist() == [0.0, 0.0, 0.0]


def test_scalars_and_excluded_parameters_are_left_as_they_are():
    scalar, excluded, projected = (pair(seed, shape) for seed, shape in [(0, (1,)), (1, (4,)), (2, (4,))])
    before = [p.grad.clone() for p in (scalar, excluded, projected)]
    inner = torch.optim.SGD([("scale", scalar), ("head", excluded), ("body", projected)], lr=0.0)
    PerpGrad(inner, exclude=lambda name, p: name == "head").step()
    same = [torch.equal(p.grad, g) for p, g in zip((scalar, excluded, projected), before, strict=True)]
    assert same == [True, True, False]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_under_sgd_the_norm_grows_by_the_steps_alone(weight_decay):
    lr = 0.05
    p = pair()
    optimizer = PerpGrad(torch.optim.SGD([p], lr=lr, weight_decay=weight_decay))
    expected = p.detach().norm() ** 2
    for step in range(20):
        p.grad = pair(step + 1).grad
        expected = (1 - lr * weight_decay) ** 2 * expected + lr**2 * p.grad.norm() ** 2
        optimizer.step()
    torch.testing.assert_close(p.detach().norm() ** 2, expected, rtol=1e-10, atol=0)


def test_a_16_bit_gradient_is_projected_in_float32():
    p = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = p.grad.double() - (p.double() * p.grad.double()).sum() / p.double().square().sum() * p.double()
    exact *= p.grad.double().norm() / exact.norm()
    project_orthogonal_gradients_([p])
    assert p.grad.dtype == torch.bfloat16
    torch.testing.assert_close(p.grad.double(), exact.detach(), rtol=2**-8, atol=1e-6)


def test_stablemax_is_a_distribution_in_the_order_of_the_logits():
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    s = stablemax(x)
    assert (s > 0).all()
    torch.testing.assert_close(s.sum(-1), torch.ones(7, dtype=torch.float64))
    assert torch.equal(s.argsort(-1), x.argsort(-1))


def test_s_is_reciprocal_symmetric():
    x = torch.linspace(-50, 50, 101, dtype=torch.float64)
    # stablemax over (x, 0) is s(x) / (s(x) + 1).
    odds = torch.stack([x, torch.zeros_like(x)], -1)
    s = stablemax(odds)[:, 0] / stablemax(odds)[:, 1]
    torch.testing.assert_close(s * s.flip(0), torch.ones_like(s))


def test_log_stablemax_has_right_gradients_across_zero():
    x = torch.tensor([[-3.0, -1e-3, 0.5], [1e-3, 2.0, -7.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_stablemax, (x,))
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    log_stablemax(x)[0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=torch.float64))


def test_where_the_softmax_has_collapsed_stablemax_has_a_gradient():
    logits = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)
    label = torch.tensor([0])
    nn.functional.cross_entropy(logits, label).backward()
    assert logits.grad[0, 0] == 0
    logits.grad = None
    loss = stablemax_cross_entropy(logits, label)
    loss.backward()
    assert loss.item() == pytest.approx(0.09097, abs=5e-6)
    assert logits.grad[0, 0].item() == pytest.approx(-0.00414, abs=5e-6)
    assert logits.grad.sum().abs() > 1e-3  # a constant added to all logits matters


@pytest.mark.parametrize("value", [-1e7, -30.0, 30.0, 1e7])
def test_the_labels_gradient_is_never_zero(value):
    logits = torch.tensor([[value, 0.0, 0.0]], requires_grad=True)
    stablemax_cross_entropy(logits, torch.tensor([0]), dtype=None).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] != 0


def test_conventions_of_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(4, (6, 5), generator=generator)
    target[0] = 3
    target[1, 2] = -7
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    # Cross-entropy of log-probabilities is that of the distribution: the same conventions, without the softmax.
    log_p = log_stablemax(logits, 1)
    for reduction in ("mean", "sum", "none"):
        ours = stablemax_cross_entropy(logits, target, reduction, ignore_index=-7, weight=weight)
        theirs = nn.functional.cross_entropy(log_p, target, weight, ignore_index=-7, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        soft = torch.softmax(torch.randn(6, 4, 5, generator=generator, dtype=torch.float64), 1)
        torch.testing.assert_close(
            stablemax_cross_entropy(logits, soft, reduction, weight=weight),
            nn.functional.cross_entropy(log_p, soft, weight, reduction=reduction)
            * (5 if reduction == "mean" else 1)
            / (5 if reduction == "mean" else 1)
            if reduction != "mean"
            else nn.functional.cross_entropy(log_p, soft, weight, reduction="sum") / 30,
        )
    module = StableMaxCrossEntropyLoss(weight=weight, ignore_index=-7)
    torch.testing.assert_close(
        module(logits, target), stablemax_cross_entropy(logits, target, weight=weight, ignore_index=-7)
    )


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'median'"):
        stablemax_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), reduction="median")


@pytest.mark.parametrize(
    ("dtype", "lead"), [(torch.bfloat16, 6.0), (torch.float16, 8.0), (torch.float32, 18.0), (torch.float64, 38.0)]
)
def test_collapse_begins_where_the_precision_ends(dtype, lead):
    logits = torch.tensor([[lead, 0.0], [lead / 2, 0.0], [0.0, lead]], dtype=dtype)
    assert softmax_collapse_fraction(logits, torch.tensor([0, 0, 0])) == pytest.approx(1 / 3)
