import copy

import pytest
import torch
from torch import nn

from headway.optim.swan import SWAN, grad_norm, grad_whiten, swan_param_groups
from headway.testing import check_optimizer


def gradient(m=6, n=9, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def update(G, **options):
    """D of the rule: the step with lr alpha = 1."""
    W = nn.Parameter(torch.zeros_like(G))
    W.grad = G.clone()
    SWAN([W], lr=1.0, alpha=1.0, **options).step()
    return -W.detach()


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "svd", "center": False, "weight_decay": 0.1}, {"ns_steps": 2, "ns_beta": 0.4, "lr": 0.1}],
    ids=str,
)
def test_contract(options):
    check_optimizer(SWAN, **options)


def test_rows_have_mean_zero_and_mean_square_one():
    N = grad_norm(gradient())
    torch.testing.assert_close(N.mean(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(N.square().mean(1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)
    assert N.square().sum().item() == pytest.approx(54, rel=1e-6)


def test_without_centering_only_the_scale_of_rows_goes():
    G = gradient()
    N = grad_norm(G, center=False)
    torch.testing.assert_close(N, G / G.square().mean(1, keepdim=True).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_singular_values_of_the_whitened_gradient_are_one(shape):
    P = grad_whiten(gradient(*shape), method="svd")
    torch.testing.assert_close(torch.linalg.svdvals(P), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("method", ["ns", "svd"])
def test_entries_of_the_update_have_mean_square_one(method):
    assert update(gradient(), method=method).square().mean().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("method", ["ns", "svd"])
def test_scales_of_rows_and_constants_in_rows_do_not_matter(method):
    G = gradient()
    rows = torch.tensor([1.0, 10.0, 0.1, 3.0, 7.0, 100.0], dtype=torch.float64).unsqueeze(1)
    expected = update(G, method=method)
    torch.testing.assert_close(update(8 * G, method=method), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(update(rows * G, method=method), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(update(G + rows, method=method), expected, rtol=1e-5, atol=1e-5)


def test_many_newton_schulz_steps_are_the_svd():
    torch.testing.assert_close(update(gradient(), ns_steps=30), update(gradient(), method="svd"), rtol=0, atol=1e-6)


def test_centering_a_tall_matrix_leaves_a_partial_isometry():
    N = grad_norm(gradient(9, 4))
    torch.testing.assert_close(N.sum(1), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-6)
    values = torch.linalg.svdvals(grad_whiten(N, method="svd"))
    torch.testing.assert_close(values, torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", [0.0, 0.1])
def test_a_constant_row_contributes_nothing_in_float32(row):
    G = gradient(dtype=torch.float32)
    G[2] = row
    D = update(G)
    assert torch.equal(D[2], torch.zeros(9))
    assert D.isfinite().all()


def test_one_step_cancels_the_curvature_of_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    Q, W0 = (torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    H = (Q * torch.logspace(-6, 0, 20, dtype=torch.float64)) @ Q.T
    assert (W0 - grad_whiten(H @ W0, method="svd")).square().sum() <= 1e-8 * W0.square().sum()


def test_the_same_gradient_gives_the_same_update_whatever_came_before():
    W = nn.Parameter(torch.zeros(6, 9))
    optimizer = SWAN([W], lr=1.0, alpha=1.0)
    for seed in (1, 2):
        W.grad = gradient(seed=seed, dtype=torch.float32)
        optimizer.step()
    before = W.detach().clone()
    W.grad = gradient(dtype=torch.float32)
    optimizer.step()
    torch.testing.assert_close(before - W.detach(), update(gradient(dtype=torch.float32)), rtol=1e-5, atol=1e-5)


def test_whitened_weights_hold_no_state_and_others_that_of_adamw():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    optimizer = SWAN(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert all(p not in optimizer.state for p in (model[0].weight, model[1].weight))
    assert optimizer.state_bytes() == 2 * 4 * (6 + 4)


def test_other_parameters_follow_adamw_at_their_scale():
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    swan = SWAN([ours], lr=0.1, adamw_lr_scale=0.5, weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1)
    for step in range(10):
        for p in (ours, theirs):
            p.grad = torch.tensor([1.0, -0.5, float(step)])
        swan.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_a_convolution_is_whitened_as_outputs_against_the_rest():
    conv = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    conv.grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(
        memory_format=torch.channels_last
    )
    SWAN([conv], lr=1.0, alpha=1.0).step()
    torch.testing.assert_close(-conv.detach().reshape(4, 12), update(conv.grad.reshape(4, 12)), rtol=1e-5, atol=1e-6)


def test_a_vector_in_a_whitened_group_is_refused():
    with pytest.raises(ValueError, match=r"two rows and columns or more with whitened=True, got shape \(3,\)"):
        SWAN([{"params": [nn.Parameter(torch.zeros(3))], "whitened": True}])
    optimizer = SWAN([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="whitened must be one of"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], "whitened": "yes"})
    assert len(optimizer.param_groups) == 1


def test_models_are_split_into_hidden_matrices_and_the_rest():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    whitened, regular = swan_param_groups(model)
    assert len(whitened["params"]) == 14
    assert {id(model.lm_head.weight), id(model.get_input_embeddings().weight)} <= {id(p) for p in regular["params"]}


def test_16_bit_weights_are_whitened_in_float32():
    W = nn.Parameter(torch.zeros(6, 9, dtype=torch.bfloat16))
    W.grad = gradient(dtype=torch.float32).bfloat16()
    expected = update(W.grad.float())
    SWAN([W], lr=1.0, alpha=1.0).step()
    assert torch.equal(W.detach(), -expected.bfloat16())


def test_maximize_turns_the_step_around():
    first, second = nn.Parameter(torch.zeros(6, 9)), nn.Parameter(torch.zeros(6, 9))
    first.grad = gradient(dtype=torch.float32)
    second.grad = copy.deepcopy(first.grad)
    SWAN([first], lr=1.0).step()
    SWAN([second], lr=1.0, maximize=True).step()
    assert torch.equal(first.detach(), -second.detach())
