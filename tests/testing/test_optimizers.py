import copy

import pytest
import torch

from headway.constraints import Range, check_arguments
from headway.testing import check_optimizer
from headway.testing.optimizers import CLAUSES


@pytest.mark.parametrize(
    ("optimizer_class", "hyperparameters"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
    ],
)
def test_torch_optimizers_keep_the_contract(optimizer_class, hyperparameters):
    check_optimizer(optimizer_class, **hyperparameters)


def test_every_clause_is_described():
    assert all(f"`{clause.__name__}`:" in check_optimizer.__doc__ for clause in CLAUSES)


def test_rprop_hides_a_gradient_that_is_not_finite():
    # It is remembered as the previous gradient, and its sign moves nothing.
    with pytest.raises(AssertionError, match="Rprop breaks the clause 'nonfinite_gradients'"):
        check_optimizer(torch.optim.Rprop)


class Plain(torch.optim.Optimizer):
    """Correct gradient descent with momentum, to be broken in one place by each subclass."""

    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if self.takes_part(p):
                    self.update(group, p, -p.grad if group["maximize"] else p.grad)
        return loss

    def takes_part(self, p):
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError("no sparse gradients")
        return p.grad is not None

    def update(self, group, p, grad):
        buffer = self.buffer(p)
        buffer.mul_(group["momentum"]).add_(grad)
        p.sub_(group["lr"] * self.direction(buffer))

    def buffer(self, p):
        return self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))

    def direction(self, buffer):
        return buffer


class Validated(Plain):
    """Plain, with declared and checked ranges."""

    constraints = {"lr": Range(low=0, low_open=True), "momentum": Range(low=0, high=1, high_open=True)}  # noqa: RUF012

    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False):
        check_arguments(self.constraints, lr=lr, momentum=momentum)
        super().__init__(params, lr, momentum, maximize)

    def add_param_group(self, param_group):
        check_arguments(self.constraints, **{name: param_group[name] for name in param_group if name != "params"})
        super().add_param_group(param_group)


class Swapping(Plain):
    """Plain, reporting half of every parameter."""

    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False):
        super().__init__(params, lr, momentum, maximize)
        self.param_groups[0]["training"] = True

    @torch.no_grad()
    def eval(self):
        if self.param_groups[0]["training"]:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["kept"] = p.clone()
                    p.div_(2)
        self.param_groups[0]["training"] = False

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "kept" in self.state[p]:
                    p.copy_(self.state[p].pop("kept"))
        self.param_groups[0]["training"] = True

    def step(self, closure=None):
        if not self.param_groups[0]["training"]:
            raise RuntimeError("in evaluation mode")
        return super().step(closure)


@pytest.mark.parametrize("optimizer_class", [Plain, Validated, Swapping])
def test_own_optimizers_keep_the_contract(optimizer_class):
    check_optimizer(optimizer_class)


class UncheckedLearningRate(Validated):
    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False):
        check_arguments(self.constraints, momentum=momentum)
        Plain.__init__(self, params, lr, momentum, maximize)


class UncheckedGroup(Validated):
    def add_param_group(self, param_group):
        torch.optim.Optimizer.add_param_group(self, param_group)


class UnconstrainedNumber(Validated):
    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False, eps=1e-8):
        super().__init__(params, lr, momentum, maximize)


class MessageWithoutValue(Validated):
    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False):
        if not self.constraints["lr"].accepts(lr):
            raise ValueError("lr is wrong")
        super().__init__(params, lr, momentum, maximize)


class StepsWithoutGradient(Plain):
    def takes_part(self, p):
        if p.grad is None:
            p.grad = torch.ones_like(p)
        return super().takes_part(p)


class CountsStepsWithoutGradient(Plain):
    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False):
        super().__init__(params, lr, momentum, maximize)
        self.param_groups[0]["steps"] = 0

    def step(self, closure=None):
        self.param_groups[0]["steps"] += 1
        return super().step(closure)

    def direction(self, buffer):
        return buffer / self.param_groups[0]["steps"]


class Stubborn(Plain):
    def update(self, group, p, grad):
        pass


class DecaysParametersWithoutGradient(Plain):
    def takes_part(self, p):
        if p.grad is None and self.state:
            p.mul_(0.9)
        return super().takes_part(p)


class DividesByTheGradientNorm(Plain):
    def direction(self, buffer):
        return buffer / buffer.norm()


class DensifiesAfterTheChange(Plain):
    def takes_part(self, p):
        if p.grad is not None and p.grad.is_sparse:
            p.mul_(0.9)
        return super().takes_part(p)


class ClosureWithoutGradients(Plain):
    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        super().step()
        return loss


class LosesTheLoss(Plain):
    def step(self, closure=None):
        super().step(closure)


class NoisyFromTheGlobalGenerator(Plain):
    def direction(self, buffer):
        return buffer + 0.1 * torch.randn_like(buffer)


class AdvancesTheGlobalGenerator(Plain):
    def direction(self, buffer):
        torch.rand(())
        return buffer


class IgnoresMaximize(Plain):
    def update(self, group, p, grad):
        super().update(group, p, -grad if group["maximize"] else grad)


class IgnoresGroupLearningRate(Plain):
    def update(self, group, p, grad):
        super().update(self.param_groups[0], p, grad)


class CachesTheLearningRate(Plain):
    """Per group, as it was when the group was added."""

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self.param_groups[-1]["first_lr"] = self.param_groups[-1]["lr"]

    def update(self, group, p, grad):
        super().update({**group, "lr": group["first_lr"]}, p, grad)


class NeglectsAddedGroups(Plain):
    def add_param_group(self, param_group):
        late = {"lr": 0.0} if self.state else {}
        super().add_param_group({**param_group, **late})


class KeepsStateElsewhere(Plain):
    def buffer(self, p):
        buffers = self.__dict__.setdefault("buffers", {})
        return buffers.setdefault(p, torch.zeros_like(p))


class KeepsFullPrecisionWithoutSavingIt(Plain):
    """The buffer of a bfloat16 parameter is float32, which torch's `load_state_dict` rounds."""

    def buffer(self, p):
        return self.state[p].setdefault("momentum_buffer", torch.zeros_like(p, dtype=torch.float32))


class SavesAFunction(Plain):
    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False):
        super().__init__(params, lr, momentum, maximize)
        self.param_groups[0]["function"] = copy.copy


class LosesAnAttributeInCopies(Plain):
    """`Optimizer.__getstate__` leaves attributes out."""

    def __init__(self, params, lr=0.01, momentum=0.5, maximize=False):
        super().__init__(params, lr, momentum, maximize)
        self.factor = 2.0

    def direction(self, buffer):
        return buffer * getattr(self, "factor", 1.0)


class TurnsParametersIntoFloat32(Plain):
    def update(self, group, p, grad):
        super().update(group, p, grad)
        p.data = p.data.float()
        p.grad = None


class RemembersEveryStep(Plain):
    def update(self, group, p, grad):
        super().update(group, p, grad)
        self.__dict__.setdefault("history", []).append(p.clone())


class GrowsItsState(Plain):
    def update(self, group, p, grad):
        super().update(group, p, grad)
        past = self.state[p].get("past", p.new_zeros(0))
        self.state[p]["past"] = torch.cat([past, p.reshape(-1)])


class SwapsInexactly(Swapping):
    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p].pop("kept", None) is not None:
                    p.mul_(2.001)
        self.param_groups[0]["training"] = True


class StepsInEvaluationMode(Swapping):
    def step(self, closure=None):
        return Plain.step(self, closure)


class EvaluatesTwice(Swapping):
    def eval(self):
        self.param_groups[0]["training"] = True
        super().eval()


@pytest.mark.parametrize(
    ("optimizer_class", "clause"),
    [
        (UncheckedLearningRate, "hyperparameters_validated"),
        (UncheckedGroup, "hyperparameters_validated"),
        (UnconstrainedNumber, "hyperparameters_validated"),
        (MessageWithoutValue, "hyperparameters_validated"),
        (Stubborn, "parameters_move"),
        (TurnsParametersIntoFloat32, "bfloat16"),
        (NoisyFromTheGlobalGenerator, "deterministic"),
        (AdvancesTheGlobalGenerator, "deterministic"),
        (StepsWithoutGradient, "nothing_without_backward"),
        (CountsStepsWithoutGradient, "nothing_without_backward"),
        (DecaysParametersWithoutGradient, "missing_gradients_left_alone"),
        (DividesByTheGradientNorm, "zero_gradients_finite"),
        (DensifiesAfterTheChange, "sparse_gradients"),
        (ClosureWithoutGradients, "closure"),
        (LosesTheLoss, "closure"),
        (IgnoresMaximize, "maximize"),
        (IgnoresGroupLearningRate, "group_learning_rate"),
        (CachesTheLearningRate, "scheduler"),
        (KeepsStateElsewhere, "state_dict_round_trip"),
        (KeepsFullPrecisionWithoutSavingIt, "state_dict_round_trip"),
        (SavesAFunction, "state_dict_saved_safely"),
        (LosesAnAttributeInCopies, "copies"),
        (NeglectsAddedGroups, "add_param_group"),
        (RemembersEveryStep, "memory_bounded"),
        (GrowsItsState, "memory_bounded"),
        (SwapsInexactly, "evaluation_point"),
        (StepsInEvaluationMode, "evaluation_point"),
        (EvaluatesTwice, "evaluation_point"),
    ],
)
def test_a_broken_optimizer_is_caught_by_its_clause(optimizer_class, clause):
    with pytest.raises(AssertionError) as caught:
        check_optimizer(optimizer_class)
    assert str(caught.value).startswith(f"{optimizer_class.__name__} breaks the clause '{clause}': ")
