import copy
import json
from pathlib import Path

import pytest
import torch
from tests.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from headway.kernels.blockwise import create_dynamic_map, dequantize_blockwise
from headway.optim.blockwise_8bit import (
    Adagrad8bit,
    Adam8bit,
    AdamW8bit,
    Lion8bit,
    RMSprop8bit,
    SGD8bit,
    StableEmbedding,
)
from headway.testing import check_optimizer

FAMILY = [Adam8bit, AdamW8bit, SGD8bit, RMSprop8bit, Adagrad8bit, Lion8bit]
TORCH = {
    Adam8bit: (torch.optim.AdamW, {"weight_decay": 0.0}),
    AdamW8bit: (torch.optim.AdamW, {}),
    SGD8bit: (torch.optim.SGD, {"momentum": 0.9}),
    RMSprop8bit: (torch.optim.RMSprop, {}),
    Adagrad8bit: (torch.optim.Adagrad, {}),
}

# bitsandbytes 0.50.2 on the CPU: its maps, and weights after 20 steps of its optimizers on `official_gradient`.
OFFICIAL = json.loads((Path(__file__).parent / "data" / "blockwise_8bit_official.json").read_text())


def weight(*shape, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def set_gradient(p, step, noise=0.1):
    drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
    p.grad = (p.detach() - 1 + noise * drawn).to(p.dtype)


def train(p, optimizer, steps, noise=0.1):
    for step in range(steps):
        set_gradient(p, step, noise)
        optimizer.step()


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("options", [{}, {"min_8bit_size": 0, "block_size": 8, "lr": 0.02}], ids=["32 bits", "8 bits"])
def test_contract(cls, options):
    check_optimizer(cls, **options)


@pytest.mark.parametrize("cls", list(TORCH))
def test_the_first_step_is_that_of_32_bits(cls):
    ours, theirs = weight(80, 80), weight(80, 80)
    base, options = TORCH[cls]
    train(ours, cls([ours], lr=0.01), 1)
    train(theirs, base([theirs], lr=0.01, **options), 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", FAMILY)
def test_the_first_step_is_to_the_bit_that_of_32_bit_state(cls):
    end = {}
    for bits in (8, 32):
        p = weight(80, 80)
        train(p, cls([p], lr=0.01, weight_decay=0.1, state_bits=bits), 1)
        end[bits] = p.detach()
    assert torch.equal(end[8], end[32])


@pytest.mark.parametrize("cls", list(TORCH))
def test_small_tensors_follow_torch_in_32_bits(cls):
    ours, theirs = weight(4095), weight(4095)
    base, options = TORCH[cls]
    optimizer = cls([ours], lr=0.01)
    train(ours, optimizer, 20)
    train(theirs, base([theirs], lr=0.01, **options), 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(v.dtype == torch.float32 for v in optimizer.state[ours].values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("cls", FAMILY)
def test_a_run_on_noisy_gradients_ends_where_32_bits_end(cls):
    end = {}
    for bits in (8, 32):
        p = weight(64, 64)
        train(p, cls([p], lr=0.01, state_bits=bits), 200, noise=1.0)
        end[bits] = p.detach()
    start = weight(64, 64).detach()
    assert (end[8] - end[32]).norm() <= 0.05 * (end[32] - start).norm()


def official_run(make):
    """20 steps on sines whose size falls by a decade over each block, from cosines; two blocks, the second short."""
    i = torch.arange(300, dtype=torch.float64)
    p = nn.Parameter(torch.cos(0.7 * i).float())
    optimizer = make([p])
    for step in range(20):
        p.grad = ((0.5 + torch.sin(0.37 * i + 1.1 * step)) * 10 ** (-(i % 256) / 256)).float()
        optimizer.step()
    return p.detach()


def distances(cls, **options):
    """Of ours to the official weights, of ours to 32 bits, and of the official ones to 32 bits, each on average."""
    official = torch.tensor(OFFICIAL["weights"][cls.__name__])
    ours = official_run(lambda params: cls(params, lr=0.01, min_8bit_size=0, **options))
    whole = official_run(lambda params: cls(params, lr=0.01, state_bits=32, **options))
    return [(a - b).abs().mean().item() for a, b in ((ours, official), (ours, whole), (official, whole))]


def test_maps_are_the_official_ones_up_to_their_rounding():
    for signed, name in ((True, "signed"), (False, "unsigned")):
        torch.testing.assert_close(create_dynamic_map(signed), torch.tensor(OFFICIAL["maps"][name]), rtol=2e-7, atol=0)


@pytest.mark.parametrize(("cls", "options"), [(Adam8bit, {"weight_decay": 0.1}), (SGD8bit, {})])
def test_steps_are_the_official_ones_up_to_their_table_of_codes(cls, options):
    """The official CPU code looks codes up in a table of 65,536 cells; 32-bit state ends 20 times further away."""
    to_official, _, of_quantisation = distances(cls, **options)
    assert to_official < 0.06 * of_quantisation


def test_lion_takes_the_official_steps():
    to_official, _, _ = distances(Lion8bit, weight_decay=0.1)
    assert to_official < 1e-6


@pytest.mark.parametrize("cls", [RMSprop8bit, Adagrad8bit])
def test_a_lone_second_moment_is_kept_more_exactly_than_officially(cls):
    """The official code keeps it with the signed map."""
    to_official, ours, official = distances(cls)
    assert ours < 0.7 * official
    assert to_official < 1.5 * official


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_second_moment_far_below_its_neighbours_makes_no_large_step(dtype):
    """As in a block of rows of which some hardly get gradients: v below the smallest code is kept as that, m stays."""
    p = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = Adam8bit([p], lr=0.01)
    for small in (1e-4, 1e-4, 0.0, 0.0):
        p.grad = torch.ones(64, 64, dtype=dtype)
        p.grad[0, 1] = small
        before = p[0, 1].item()
        optimizer.step()
        assert abs(p[0, 1].item() - before) < 0.02
    assert (optimizer.state[p]["exp_avg_sq"] > 0).all()


def test_gradients_over_four_decades_within_each_block_train_as_in_32_bits():
    """With v rounded to zero the smallest entries are thrown to the hundreds."""
    ends = []
    for bits in (8, 32):
        p = nn.Parameter(torch.zeros(4096))
        optimizer = Adam8bit([p], lr=0.01, state_bits=bits)
        generator = torch.Generator().manual_seed(0)
        for step in range(600):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 600)
            noise = torch.randn(4096, generator=generator)
            p.grad = torch.logspace(-3.5, 0, 256).repeat(16) * (p.detach() - 1 + 0.3 * noise)
            optimizer.step()
        ends.append((p.detach() - 1).abs().max().item())
    assert ends[1] < 0.1
    assert ends[0] < 0.2


def test_state_of_a_million_elements_to_the_byte():
    p = weight(1_000_000)
    optimizer = Adam8bit([p])
    train(p, optimizer, 1)
    assert optimizer.state_bytes() == 2_031_256
    assert optimizer.state_bytes() <= 0.27 * 8_000_000


def test_the_update_uses_the_moments_before_they_are_quantised():
    p = weight(4096)
    optimizer = Adam8bit([p], lr=1.0, betas=(0.5, 0.5), eps=1e-12)
    before = p.detach().clone()
    p.grad = torch.linspace(-1, 1, 4096)
    optimizer.step()
    stored = dequantize_blockwise(optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_absmax"])
    torch.testing.assert_close(before - p.detach(), p.grad.sign(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(stored, 0.5 * p.grad, rtol=1e-4)


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_parameters_that_are_not_contiguous(layout):
    generator = torch.Generator().manual_seed(0)
    if layout == "transposed":
        value = torch.randn(60, 80, generator=generator).T
    else:
        value = torch.randn(8, 16, 6, 6, generator=generator).to(memory_format=torch.channels_last)
    odd, plain = nn.Parameter(value.clone(memory_format=torch.preserve_format)), nn.Parameter(value.contiguous())
    assert not odd.is_contiguous()
    for p in (odd, plain):
        train(p, AdamW8bit([p], lr=0.01), 5)
    apart = (odd - plain).detach().abs()
    assert apart.mean() < 1e-7
    assert apart.max() < 3e-4  # kernel and reference round differently, and an element on a midpoint goes either way


def test_state_keeps_its_dtypes_through_a_state_dict_of_bfloat16_parameters():
    def start():
        p = nn.Parameter(weight(64, 65).detach().bfloat16())
        return p, AdamW8bit([p])

    p, optimizer = start()
    train(p, optimizer, 3)
    q, loaded = start()
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kinds = {name: value.dtype for name, value in loaded.state[q].items() if isinstance(value, torch.Tensor)}
    assert kinds == {
        "exp_avg": torch.uint8,
        "exp_avg_absmax": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_absmax": torch.float32,
    }


def test_parameters_can_opt_out():
    first, second = weight(64, 64), weight(64, 64, seed=1)
    optimizer = Adam8bit([("embed", first), ("body", second)])
    optimizer.override("embed")
    for p in (first, second):
        set_gradient(p, 0)
    optimizer.step()
    assert optimizer.state[first]["exp_avg"].dtype == torch.float32
    assert optimizer.state[second]["exp_avg"].dtype == torch.uint8
    with pytest.raises(ValueError, match="no state yet"):
        optimizer.override(second)
    with pytest.raises(ValueError, match="one of this optimizer's, got 'head'"):
        optimizer.override("head")


def test_for_model_keeps_embeddings_in_32_bits_and_vectors_without_decay():
    model = nn.Sequential(nn.Embedding(200, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    groups = AdamW8bit.for_model(model, weight_decay=0.1).param_groups
    assert [(len(g["params"]), g["state_bits"], g["weight_decay"]) for g in groups] == [
        (1, 8, 0.1),
        (1, 32, 0.1),
        (3, 8, 0.0),
    ]


def _shards(rank, folder):
    for cls in (Adam8bit, Lion8bit):
        ends = []
        for sharded in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
            if sharded:
                fully_shard(model)
                with pytest.raises(ValueError, match="use state_bits=32"):
                    cls.for_model(model)
            optimizer = cls.for_model(model, lr=0.01, weight_decay=0.1, state_bits=32)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(4, 6)).square().mean().backward()
                optimizer.step()
            ends.append([p.full_tensor() if sharded else p.detach() for p in model.parameters()])
        for whole, parts in zip(*ends, strict=True):
            torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_shards_take_32_bit_state_and_are_refused_with_8(tmp_path):
    run_ranks(_shards, tmp_path)


def test_wrong_arguments_are_one_line():
    p = weight(2)
    with pytest.raises(ValueError, match="block_size must be a whole number >= 1, got 0"):
        Adam8bit([p], block_size=0)
    with pytest.raises(ValueError, match="state_bits must be one of 32, 8, got 4"):
        Adam8bit([p], state_bits=4)


def test_a_stable_embedding_is_normalised_and_starts_xavier_uniform():
    torch.manual_seed(0)
    embedding = StableEmbedding(50, 16, padding_idx=3)
    bound = (6 / (50 + 16)) ** 0.5
    assert embedding.weight.abs().max() <= bound
    assert embedding.weight[3].abs().sum() == 0
    out = embedding(torch.arange(10))
    rows = [i for i in range(10) if i != 3]
    torch.testing.assert_close(out[rows].mean(1), torch.zeros(9), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[rows].var(1, unbiased=False), torch.ones(9), rtol=1e-2, atol=1e-2)
    assert embedding.bfloat16()(torch.arange(2)).dtype == torch.bfloat16
