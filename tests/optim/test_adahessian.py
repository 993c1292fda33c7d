import io
import json
from pathlib import Path

import pytest
import torch
from tests.ranks import RANKS, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from headway.numerics.curvature import gradients_with_graph, hessian_diagonal, rademacher
from headway.optim.adahessian import AdaHessian, block_average
from headway.optim.subspace import seeded_generator
from headway.testing import check_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Using backward:UserWarning")

SHAPES = [(3,), (4, 3), (2, 3, 2, 2)]


def line(shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32)


def start(dtype=torch.float32):
    return [nn.Parameter(torch.sin(line(s) * 0.7 + i).reshape(s).to(dtype)) for i, s in enumerate(SHAPES)]


def loss_of(params, step):
    """Eight tanh units, whose data depend on the step, and a quartic: a Hessian with off-diagonal entries."""
    x = torch.cat([p.reshape(-1) for p in params])
    A = torch.cos(torch.arange(8 * x.numel(), dtype=torch.float32) ** 1.3 * 0.9 + 1.7 * step).reshape(8, -1).to(x)
    return (torch.tanh(A @ x / 2) - torch.sin(torch.arange(8.0) + step).to(x)).square().sum() / 4 + x.pow(4).sum() / 40


def train(optimizer, params, steps=6, first=0, loss=loss_of):
    for step in range(first, first + steps):
        optimizer.step(lambda step=step: loss(params, step))


def diagonal_of(params, step, loss=loss_of, counter=0):
    _, grads = gradients_with_graph(lambda: loss(params, step), params)
    generator = seeded_generator(0, counter)
    return grads, hessian_diagonal(grads, params, [[rademacher(p, generator) for p in params]])


def assert_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": "row", "weight_decay": 0.1, "n_samples": 2},
        {"update_each": 3, "hessian_power": 0.5, "block_reduce": "signed", "generator": torch.Generator()},
    ],
    ids=["defaults", "row", "delayed"],
)
def test_contract(options):
    check_optimizer(AdaHessian, **options)


GOLDEN = json.loads((Path(__file__).parent / "data" / "adahessian_official.json").read_text())["final_weights"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auto", {}),
        ("auto-half-power", {"hessian_power": 0.5}),
        ("row", {"block": "row"}),
        ("block-3", {"block": 3}),
        ("block-3", {"block": lambda shape: 3}),
        ("row", {"block": lambda shape: tuple(range(1, len(shape))) if len(shape) < 4 else (2, 3)}),
    ],
)
def test_seven_steps_equal_the_authors_code_on_the_same_probes(name, options):
    """The data file names the commit."""
    params = start()
    optimizer = AdaHessian(params, lr=0.1, weight_decay=0.05, **options)
    train(optimizer, params, 7)
    for p, expected in zip(params, GOLDEN[name], strict=True):
        torch.testing.assert_close(p.detach().flatten(), torch.tensor(expected), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_first_step_is_gradient_over_curvature(power):
    params = start(torch.float64)
    grads, diagonals = diagonal_of(params, 0)
    expected = [
        p.detach() - 0.2 * g / (D.abs() ** power + 1e-3) for p, g, D in zip(params, grads, diagonals, strict=True)
    ]
    AdaHessian(params, lr=0.2, eps=1e-3, hessian_power=power, block="none").step(lambda: loss_of(params, 0))
    assert_close(params, expected, rtol=1e-12, atol=1e-12)


def test_a_full_step_on_a_diagonal_quadratic_reaches_the_minimum():
    c, goal = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    AdaHessian([x], lr=1.0, betas=(0.0, 0.0), eps=0.0).step(lambda: (c * (x - goal).square()).sum() / 2)
    assert float((x.detach() - goal).abs().max()) < 1e-12


def test_power_zero_is_bias_corrected_momentum_descent_whatever_the_curvature():
    params, reference = start(torch.float64), start(torch.float64)
    train(AdaHessian(params, lr=0.1, eps=0.25, hessian_power=0.0), params)
    m = [torch.zeros_like(p) for p in reference]
    for step in range(6):
        for p, average, g in zip(reference, m, torch.autograd.grad(loss_of(reference, step), reference), strict=True):
            average.mul_(0.9).add_(g, alpha=0.1)
            p.data -= 0.1 * average / (1 - 0.9 ** (step + 1)) / 1.25
    assert_close(params, reference, rtol=1e-12, atol=1e-12)


def test_scaling_all_parameters_scales_all_iterates():
    params, scaled = start(torch.float64), start(torch.float64)
    scale = 37.0
    with torch.no_grad():
        torch._foreach_mul_(scaled, scale)
    train(AdaHessian(params, eps=0.0), params)
    train(AdaHessian(scaled, eps=0.0), scaled, loss=lambda ps, step: loss_of([p / scale for p in ps], step))
    assert_close([p / scale for p in scaled], params, rtol=1e-9, atol=1e-9)


def test_scaling_the_loss_changes_nothing():
    params, scaled = start(torch.float64), start(torch.float64)
    train(AdaHessian(params, eps=0.0), params)
    train(AdaHessian(scaled, eps=0.0), scaled, loss=lambda ps, step: 1e5 * loss_of(ps, step))
    assert_close(scaled, params, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", ["none", "auto", "row", 1, 3, 12, (0,), (0, 1), ()])
def test_blocks_keep_the_mean_and_are_constant_inside(block):
    D = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    average = block_average(D, block)
    assert average.shape == D.shape
    torch.testing.assert_close(average.mean(), D.mean())
    distinct = {"none": 12, "auto": 12, "row": 4, 1: 12, 3: 4, 12: 1, (0,): 3, (0, 1): 1, (): 12}[block]
    assert len({round(value, 5) for value in average.flatten().tolist()}) == distinct


def test_block_of_one_equals_none_and_block_of_all_gives_one_curvature_per_tensor():
    one, none, whole = (start() for _ in range(3))
    train(AdaHessian(one, block=1), one)
    train(AdaHessian(none, block="none"), none)
    assert_close(one, none, rtol=0, atol=0)
    optimizer = AdaHessian(whole, block=lambda shape: shape.numel())
    train(optimizer, whole)
    assert [len(optimizer.state[p]["exp_hessian_diag_sq"].unique()) for p in whole] == [1, 1, 1]


def test_auto_averages_over_the_kernel_of_convolutions_of_any_dimension():
    for shape in ((2, 3, 5), (2, 3, 2, 2), (2, 3, 2, 2, 2)):
        D = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            block_average(D, "auto"), D.flatten(2).mean(2).reshape(2, 3, *[1] * (D.ndim - 2)) + 0 * D
        )


def test_abs_is_at_least_signed_and_equal_where_signs_agree():
    x = nn.Parameter(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    curvature = torch.tensor([[2.0, 4.0], [2.0, -4.0]])
    seen = {}
    for reduce in ("abs", "signed"):
        optimizer = AdaHessian([x], lr=0.0, betas=(0.0, 0.0), block="row", block_reduce=reduce)
        optimizer.step(lambda: (curvature * x.square()).sum() / 2)
        seen[reduce] = optimizer.state[x]["exp_hessian_diag_sq"].sqrt()
    assert seen["abs"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert seen["signed"].tolist() == [[3.0, 3.0], [1.0, 1.0]]


class Shared(AdaHessian):
    """Probes that depend on the parameter's shape alone."""

    def sample_probe(self, p, generator):
        return rademacher(p, torch.Generator().manual_seed(p.numel()))


def test_two_groups_equal_two_optimizers_that_see_the_same_probes():
    """With a loss that is a sum over the groups, so that each Hessian-vector product is the group's own."""

    def loss(params, step):
        return loss_of([p for p in params if p.ndim < 4], step) + loss_of([p for p in params if p.ndim == 4], step)

    together, apart = start(), start()
    train(Shared([{"params": together[:2], "lr": 0.05}, {"params": together[2:], "lr": 0.3}]), together, loss=loss)
    first, second = Shared(apart[:2], lr=0.05), Shared(apart[2:], lr=0.3)
    for step in range(6):
        first.step(lambda step=step: loss_of(apart[:2], step))
        second.step(lambda step=step: loss_of(apart[2:], step))
    assert_close(together, apart, rtol=1e-6, atol=1e-7)


def test_samples_are_averaged_with_their_sign():
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    H = torch.tensor([[1.0, 5.0], [5.0, -1.0]], dtype=torch.float64)
    optimizer = AdaHessian([x], lr=0.0, betas=(0.0, 0.0), n_samples=1000)
    optimizer.step(lambda: x @ H @ x / 2)
    # The mean of |D| would be 5, that of D is 1 up to 5 / sqrt(1000).
    assert float((optimizer.state[x]["exp_hessian_diag_sq"].sqrt() - 1).abs().max()) < 0.5


class CountedSquare(torch.autograd.Function):
    """x^2 that counts how often it is differentiated."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        CountedSquare.calls += 1
        (x,) = ctx.saved_tensors
        return CountedProduct.apply(2 * x, grad)


class CountedProduct(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, grad):
        CountedProduct.calls += 1
        x, y = ctx.saved_tensors
        return grad * y, grad * x


@pytest.mark.parametrize(("n_samples", "update_each", "products"), [(1, 1, 12), (3, 1, 36), (1, 4, 3), (2, 5, 6)])
def test_a_step_costs_one_gradient_and_n_samples_products_every_update_each_steps(n_samples, update_each, products):
    CountedSquare.calls = CountedProduct.calls = 0
    x = nn.Parameter(torch.ones(3))
    optimizer = AdaHessian([x], n_samples=n_samples, update_each=update_each)
    for _ in range(12):
        optimizer.step(lambda: CountedSquare.apply(x).sum())
    assert (CountedSquare.calls, CountedProduct.calls) == (12, products)


def test_between_refreshes_the_last_curvature_is_used_again_and_bias_correction_counts_on():
    params, reference = start(torch.float64), start(torch.float64)
    train(AdaHessian(params, block="none", update_each=3), params)
    m = [torch.zeros_like(p) for p in reference]
    v = [torch.zeros_like(p) for p in reference]
    for step in range(6):
        grads, new = diagonal_of(reference, step, counter=step)
        D = new if step % 3 == 0 else D  # noqa: F821  # set in the first step
        for p, g, d, average, square in zip(reference, grads, D, m, v, strict=True):
            average.mul_(0.9).add_(g.detach(), alpha=0.1)
            square.mul_(0.999).addcmul_(d, d, value=0.001)
            h = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-4
            p.data -= 0.15 * average / (1 - 0.9 ** (step + 1)) / h
    assert_close(params, reference, rtol=1e-12, atol=1e-12)


def test_between_refreshes_plain_backward_is_enough_and_late_parameters_wait():
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([early, late], update_each=3)
    before = late.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        x = early if step == 0 else late
        x.pow(4).sum().backward(create_graph=step % 3 == 0)
        optimizer.step()
        assert torch.equal(before, late.detach()) == (step < 3)


def test_a_gradient_without_graph_is_refused_with_the_remedy():
    params = start()
    loss_of(params, 0).backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 has no graph: call loss.backward\(create_graph"):
        AdaHessian(params).step()


def test_a_closure_without_a_graph_is_refused():
    params = start()
    with pytest.raises(RuntimeError, match="without backward"):
        AdaHessian(params).step(lambda: torch.tensor(1.0))


def test_a_loss_that_is_linear_in_a_parameter_has_no_curvature_there():
    x, linear = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([x, linear], lr=1e-4, eps=0.5)
    optimizer.step(lambda: x.square().sum() + 3 * linear.sum())
    torch.testing.assert_close(linear.detach(), torch.full((2,), 1 - 1e-4 * 3 / 0.5))
    only = nn.Parameter(torch.ones(2))
    AdaHessian([only], lr=0.1, eps=0.5).step(lambda: 3 * only.sum())
    torch.testing.assert_close(only.detach(), torch.full((2,), 1 - 0.1 * 3 / 0.5))


def test_accumulated_micro_batches_equal_the_whole_batch():
    parts, whole = start(torch.float64), start(torch.float64)
    optimizer = AdaHessian(parts)
    for step in range(3):
        optimizer.zero_grad()
        for micro in (2 * step, 2 * step + 1):
            (loss_of(parts, micro) / 2).backward(create_graph=True)
        optimizer.step()
    train(AdaHessian(whole), whole, 3, loss=lambda ps, step: (loss_of(ps, 2 * step) + loss_of(ps, 2 * step + 1)) / 2)
    assert_close(parts, whole, rtol=1e-10, atol=1e-10)


def test_the_step_frees_the_graph_and_leaves_the_gradient():
    params = start()
    optimizer = AdaHessian(params)
    loss_of(params, 0).backward(create_graph=True)
    values = [p.grad.detach().clone() for p in params]
    optimizer.step()
    assert all(p.grad.grad_fn is None for p in params)
    assert_close([p.grad for p in params], values, rtol=0, atol=0)


def test_a_closure_neither_reads_nor_writes_the_gradients():
    params = start()
    for p in params:
        p.grad = torch.full_like(p, 7.0)
    optimizer, reference = AdaHessian(params), start()
    train(optimizer, params, 2)
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in params)
    train(AdaHessian(reference), reference, 2)
    assert_close(params, reference, rtol=0, atol=0)


def test_infinite_curvature_is_refused_before_anything_changes():
    x = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = AdaHessian([x])
    with pytest.raises(FloatingPointError, match="Hessian diagonal of parameter 0 of group 0"):
        optimizer.step(lambda: x.abs().pow(1.5).sum())
    assert x.tolist() == [0.0, 1.0]
    assert not optimizer.state


def test_state_of_16_bit_parameters_is_fp32_also_after_loading():
    params = start(torch.bfloat16)
    optimizer = AdaHessian(params, update_each=2)
    train(optimizer, params, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = AdaHessian(params, update_each=2)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for p in params:
        for name in ("exp_avg", "exp_hessian_diag_sq", "hessian_diag"):
            assert loaded.state[p][name].dtype == torch.float32
            assert torch.equal(loaded.state[p][name], optimizer.state[p][name])


def test_the_generator_sets_the_probes_and_its_seed_is_saved():
    params, again, other = start(), start(), start()
    optimizer = AdaHessian(params, generator=torch.Generator().manual_seed(5))
    train(optimizer, params, 3)
    train(AdaHessian(again, generator=torch.Generator().manual_seed(5)), again, 3)
    assert_close(params, again, rtol=0, atol=0)
    resumed = AdaHessian(other, generator=torch.Generator().manual_seed(6))
    train(resumed, other, 3)
    assert not torch.equal(other[0], params[0])
    with torch.no_grad():
        torch._foreach_copy_(other, params)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 3, first=3)
    train(resumed, other, 3, first=3)
    assert_close(params, other, rtol=0, atol=0)


def test_a_function_for_blocks_becomes_numbers_in_the_group_so_that_a_checkpoint_can_hold_it():
    params = start()
    optimizer = AdaHessian(params, block=lambda shape: shape[-1])
    assert optimizer.param_groups[0]["block"] == [3, 3, 2]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["block"] == [3, 3, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 5}, "block must divide the 3 entries of a tensor of the group, got 5"),
        ({"block": lambda shape: 0}, "block must give a whole number >= 1 or a tuple of dimensions, got 0"),
        ({"block": lambda shape: (1,)}, r"block must name dimensions of a tensor of shape \(3,\), got \(1,\)"),
        ({"lr": -0.1}, "lr must be >= 0, got -0.1"),
        ({"hessian_power": 1.5}, r"hessian_power must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaHessian(start(), **options)


def test_groups_share_the_number_of_samples():
    params = start()
    with pytest.raises(ValueError, match="n_samples must be the same in all groups, 1, got 2"):
        AdaHessian([{"params": params[:1]}, {"params": params[1:], "n_samples": 2}])


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="complex"):
        AdaHessian([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def network():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(8, size, generator=generator, dtype=torch.float64) for size in (5, 3))


def on_a_rank(rank, folder):
    reached = {}
    for way in ("closure", "no_sync"):
        model = network()
        optimizer = AdaHessian(model.parameters(), n_samples=2, update_each=2)
        replica = DistributedDataParallel(model) if way == "no_sync" else model
        for step in range(5):
            x, y = (part.chunk(RANKS)[rank] for part in batch(step))
            if way == "closure":
                optimizer.step(lambda x=x, y=y, model=model: (model(x) - y).square().mean())
            else:
                optimizer.zero_grad()
                with replica.no_sync():
                    (replica(x) - y).square().mean().backward(create_graph=True)
                optimizer.step()
        reached[way] = [p.detach() for p in model.parameters()]

    model = network()
    scale = float("nan") if rank == 1 else 1.0
    x, y = batch(0)
    try:
        AdaHessian(model.parameters()).step(lambda: scale * (model(x) - y).square().mean())
    except FloatingPointError as error:
        reached["nan"] = str(error)
    torch.save(reached, f"{folder}/{rank}")


@pytest.fixture(scope="module")
def reached_by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(on_a_rank, folder)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


@pytest.mark.parametrize("way", ["closure", "no_sync"])
def test_two_ranks_on_half_batches_equal_one_on_the_whole_batch(reached_by_rank, way):
    model = network()
    optimizer = AdaHessian(model.parameters(), n_samples=2, update_each=2)
    for step in range(5):
        x, y = batch(step)
        optimizer.step(lambda x=x, y=y: (model(x) - y).square().mean())
    for reached in reached_by_rank:
        assert_close(reached[way], list(model.parameters()), rtol=0, atol=1e-9)


def test_a_nan_on_one_rank_is_refused_on_all(reached_by_rank):
    for reached in reached_by_rank:
        assert "gradient of parameter 0 of group 0" in reached["nan"]
