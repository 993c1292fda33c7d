import subprocess
import sys

import pytest
import torch
from torch import nn

from headway.optim import SPAM, AdaGradAGD, CompositeMirrorDescent, DiffGrad, Frugal, SEAOptimizer, SplitSGD
from headway.optim.state import restore_state, state_bytes

OPTIMIZERS = {
    "adagrad-accelerated": lambda params: AdaGradAGD(params, mode="diag"),
    "diffgrad": DiffGrad,
    "frugal": lambda params: Frugal(params, projection="randk"),
    "last-iterate-mirror-descent": lambda params: CompositeMirrorDescent(params, lr=0.1, prox="ball", radius=9.0),
    "opposing-signals": SplitSGD,
    "optimistic-mirror-descent": lambda params: SEAOptimizer(params, D=10.0, G=10.0, L=1.0),
    "spam": lambda params: SPAM(params, density=0.5),
}


class Counter(torch.optim.Optimizer):
    """Keeps the state that it is given."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)


def loaded(state, dtype=torch.bfloat16, parameters=1):
    """What an optimizer of 16-bit parameters holds after loading `state` (by index)."""
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(parameters)]
    optimizer = Counter(params)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return [optimizer.state.get(p) for p in params]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bool])
def test_state_of_16_bit_parameters_keeps_dtype_and_values(dtype):
    saved = torch.tensor([0, 1, 1]).to(dtype) if dtype == torch.bool else (torch.tensor([3, 255, 100]) / 1).to(dtype)
    (state,) = loaded({0: {"value": saved}})
    assert state["value"].dtype == dtype
    assert torch.equal(state["value"], saved)


def test_float32_state_keeps_the_bits_that_bfloat16_has_no_room_for():
    (state,) = loaded({0: {"exp_avg": torch.tensor([1 + 2**-20])}})
    assert state["exp_avg"].item() == 1 + 2**-20


def test_numbers_and_tuples_come_back_as_they_are():
    (state,) = loaded({0: {"step": 7, "shape": (2, 3), "name": "columns"}})
    assert state == {"step": 7, "shape": (2, 3), "name": "columns"}


def test_state_goes_to_the_parameter_of_its_place_and_others_get_none():
    first, second, third = loaded({0: {"step": 1}, 2: {"step": 3}}, parameters=3)
    assert (first, second, third) == ({"step": 1}, None, {"step": 3})


def test_the_saved_tensors_are_copied():
    saved = torch.ones(3)
    (state,) = loaded({0: {"exp_avg": saved}}, dtype=torch.float32)
    state["exp_avg"].zero_()
    assert saved.tolist() == [1, 1, 1]


@pytest.mark.parametrize("slug", OPTIMIZERS)
def test_each_optimizer_restores_its_state_exactly(slug):
    def build():
        parameter = nn.Parameter(torch.linspace(-1, 1, 24).reshape(6, 4).bfloat16())
        return parameter, OPTIMIZERS[slug]([parameter])

    parameter, optimizer = build()
    for step in range(3):
        parameter.grad = torch.sin(torch.arange(24.0) + step).reshape(6, 4).bfloat16()
        optimizer.step()
    other, fresh = build()
    fresh.load_state_dict(optimizer.state_dict())
    mine, theirs = optimizer.state[parameter], fresh.state[other]
    assert mine.keys() == theirs.keys()
    assert torch.float32 in {value.dtype for value in mine.values() if isinstance(value, torch.Tensor)}
    for name, value in mine.items():
        if isinstance(value, torch.Tensor):
            assert theirs[name].dtype == value.dtype
            assert torch.equal(theirs[name], value)
            assert theirs[name] is not value
        else:
            assert theirs[name] == value
    assert state_bytes(fresh) == state_bytes(optimizer) > 0


def test_state_bytes_counts_tensors_by_their_dtypes_and_nothing_else():
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = Counter(params)
    assert state_bytes(optimizer) == 0
    optimizer.state[params[0]] = {"step": 5, "codes": torch.zeros(10, dtype=torch.uint8), "absmax": torch.zeros(3)}
    optimizer.state[params[1]] = {"index": torch.zeros(2, dtype=torch.int64), "exp_avg": torch.zeros(2, 3)}
    assert state_bytes(optimizer) == 10 + 12 + 16 + 24


def test_importing_the_optimizers_loads_neither_the_compiler_nor_scipys_solvers():
    heavy = ("torch._dynamo", "scipy.optimize", "sklearn", "transformers")
    code = f"import headway.optim, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
