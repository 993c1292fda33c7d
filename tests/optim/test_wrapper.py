import copy

import pytest
import torch
from torch import nn

from headway.optim import AdaGradAGD
from headway.optim.wrapper import OptimizerWrapper
from headway.testing import check_optimizer


class Plain(OptimizerWrapper):
    def before_step(self):
        pass


class Scaled(OptimizerWrapper):
    def __init__(self, optimizer, factor=0.5):
        super().__init__(optimizer)
        self.factor = factor

    def before_step(self):
        for p in self.parameters():
            p.grad.mul_(self.factor)


def weight():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.tensor([1.0, -1.0])
    return p


@pytest.mark.parametrize("inner", ["sgd", "adamw", "frugal", "adagrad-accelerated"])
@pytest.mark.filterwarnings("ignore:density")
def test_the_wrapper_keeps_the_contract_around(inner):
    check_optimizer(Plain, inner=inner, lr=0.01)


def test_wrapping_changes_nothing_by_itself():
    alone, wrapped = weight(), weight()
    torch.optim.AdamW([alone], lr=0.1).step()
    Plain(torch.optim.AdamW([wrapped], lr=0.1)).step()
    assert torch.equal(alone, wrapped)


def test_groups_and_state_are_the_wrapped_optimizers_also_after_loading():
    p = weight()
    inner = torch.optim.AdamW([p], lr=0.1)
    optimizer = Plain(inner)
    optimizer.step()
    assert optimizer.param_groups is inner.param_groups
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.state_dict().keys() == {"state", "param_groups"}


def test_a_scheduler_acts_through_the_wrapper():
    optimizer = Plain(torch.optim.SGD([weight()], lr=1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    optimizer.step()
    schedule.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_options_go_to_the_wrapper_and_to_the_wrapped():
    model = nn.Linear(2, 2)
    optimizer = Scaled.for_model(model, inner="adamw", lr=0.3, weight_decay=0.1, factor=0.25)
    assert optimizer.factor == 0.25
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.3, 0.1), (0.3, 0.0)]


def test_wrappers_nest():
    p = weight()
    Scaled(Scaled(torch.optim.SGD([p], lr=1.0))).step()
    assert p.tolist() == [0.75, 2.25]


def test_methods_of_the_wrapped_optimizer_are_there():
    optimizer = Plain(AdaGradAGD([weight()], variant="averaging"))
    optimizer.step()
    optimizer.eval()
    assert not optimizer.training
    with pytest.raises(AttributeError, match="no_such_thing"):
        Plain(torch.optim.SGD([weight()], lr=1.0)).no_such_thing()


def test_step_hooks_run_once():
    calls = []
    optimizer = Plain(torch.optim.SGD([weight()], lr=1.0))
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]


def test_what_evaluates_the_loss_itself_is_refused():
    with pytest.raises(ValueError, match="LBFGS"):
        Plain(torch.optim.LBFGS([weight()]))
    with pytest.raises(TypeError, match="optimizer must be"):
        Plain([weight()])


def test_a_gradient_scaler_works_through_the_wrapper():
    p = nn.Parameter(torch.ones(2))
    optimizer = Plain(torch.optim.SGD([p], lr=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [0.5, 0.5]
