from __future__ import annotations

import pytest
import torch

from headway.optim.coordinate_clipping import CoordinateClip
from headway.optim.perpgrad_stablemax import PerpGrad


@pytest.mark.parametrize("wrap", [PerpGrad, lambda optimizer: CoordinateClip(optimizer, fraction=0.3)])
@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_step_of_adam_in_one_pass_equals_two(wrap, inner, maximize):
    """`foreach=True` changes the gradients first, and then lets torch take the step."""
    results = []
    for foreach in (None, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((33, 65), (7,), (1,))]
        optimizer = wrap(inner(params, lr=1e-2, weight_decay=0.1, maximize=maximize, foreach=foreach))
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results.append([*params, *(p.grad for p in params), *(optimizer.state[p]["exp_avg_sq"] for p in params)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [PerpGrad, CoordinateClip])
@pytest.mark.parametrize("shape", [(1,), (50,)])
def test_a_gradient_that_is_not_finite_is_refused_before_the_one_pass(wrap, shape):
    fine, bad = torch.nn.Parameter(torch.ones(40)), torch.nn.Parameter(torch.zeros(shape))
    optimizer = wrap(torch.optim.AdamW([fine, bad]))
    fine.grad, bad.grad = torch.linspace(-1, 1, 40), torch.full(shape, torch.nan)
    with pytest.raises(FloatingPointError, match="parameter 1 of group 0"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(fine, torch.ones(40))
    assert torch.equal(fine.grad, torch.linspace(-1, 1, 40))


def test_hooks_of_the_wrapped_adam_are_still_called():
    weight, calls = torch.nn.Parameter(torch.ones(4)), []
    inner = torch.optim.AdamW([weight])
    inner.register_step_post_hook(lambda *_: calls.append(1))
    weight.grad = torch.ones(4)
    PerpGrad(inner).step()
    assert calls == [1]
