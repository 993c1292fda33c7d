import pytest
import torch
from torch import nn

from headway.optim.evaluation_point import EvaluationPointOptimizer


class ReportsTheStart(EvaluationPointOptimizer):
    """Gradient descent that reports where it began; float64 state, to show that the way back is exact."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def evaluation_point(self, group, p):
        return self.state[p]["start"]

    @torch.no_grad()
    def step(self):
        self.require_training()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("start", p.double())
                    p.sub_(p.grad, alpha=group["lr"])


def trained(p):
    optimizer = ReportsTheStart([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_back_is_exact(dtype):
    p = nn.Parameter(torch.linspace(0, 1, 7).to(dtype))
    start = p.detach().clone()
    optimizer = trained(p)
    training = p.detach().clone()
    optimizer.eval()
    assert not optimizer.training
    assert torch.equal(p, start)
    optimizer.train()
    assert optimizer.training
    assert torch.equal(p, training)


def test_nothing_is_kept_in_training_mode():
    p = nn.Parameter(torch.zeros(2))
    optimizer = trained(p)
    optimizer.eval()
    assert "training_point" in optimizer.state[p]
    optimizer.train()
    assert "training_point" not in optimizer.state[p]


def test_a_step_in_evaluation_mode_says_what_to_do():
    optimizer = trained(nn.Parameter(torch.zeros(2)))
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"ReportsTheStart is in evaluation mode: call train\(\) before step\(\)"):
        optimizer.step()


def test_parameters_without_state_stay():
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = ReportsTheStart([used, unused])
    used.grad = torch.ones_like(used)
    optimizer.step()
    optimizer.eval()
    assert torch.equal(unused, torch.ones(2))
    optimizer.train()
    assert torch.equal(unused, torch.ones(2))


def test_an_added_group_is_in_the_mode_of_the_others():
    optimizer = trained(nn.Parameter(torch.zeros(2)))
    optimizer.eval()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group["training"] for group in optimizer.param_groups] == [False, False]
    optimizer.train()
    assert optimizer.training


def test_a_checkpoint_of_evaluation_mode_leads_back_to_training():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = trained(p)
    training = p.detach().clone()
    optimizer.eval()
    other = ReportsTheStart([q])
    other.load_state_dict(optimizer.state_dict())
    assert not other.training
    other.train()
    assert torch.equal(q, training)
