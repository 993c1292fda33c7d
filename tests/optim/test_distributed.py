"""Every optimizer of the catalogue on two real ranks: replicas stay equal to the bit; shards work or are refused."""

import warnings

import pytest
import torch
import torch.distributed as dist
from tests.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from headway import catalogue

STEPS = 6
SLUGS = [
    row.slug
    for row in catalogue.methods()
    if row.role == "optimizer" and getattr(row.load(), "step_protocol", "gradients") == "gradients"
]
# Refused with the reason, because their rule needs whole tensors or a sum over all of them.
REFUSED = {
    "adagrad-accelerated": "process_group must be given",
    "blockwise-8bit": "use state_bits=32",
    "coordinate-clipping": "process_group must be given",
    "fira": "sharded",
    "mkor": "sharded",
    "opposing-signals": "process_group",
    "perpgrad-stablemax": "inner product of a whole weight",
    "swan": "sharded",
}


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1))


def optimizer_for(slug, model):
    cls = catalogue.get(slug, "optimizer").load()
    options = {"lr": 0.01} | ({"rank": 2} if slug == "fira" else {})
    build = getattr(cls, "for_model", None)
    return build(model, **options) if build is not None else cls(model.parameters(), **options)


def train(model, optimizer, inputs):
    for x in inputs:
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def batches(rank=None):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(STEPS, 8, 8, generator=generator)
    return whole if rank is None else whole[:, 4 * rank : 4 * rank + 4]


def _replicas(rank, folder):
    warnings.simplefilter("ignore")
    torch.manual_seed(rank)  # no method may draw from the global generator
    reached = {}
    for slug in SLUGS:
        model = network()
        parallel = DistributedDataParallel(model)
        optimizer = optimizer_for(slug, model)
        train(parallel, optimizer, batches(rank))
        reached[slug] = [p.detach().clone() for p in model.parameters()]
    torch.save(reached, f"{folder}/{rank}.pt")


def _shards(rank, folder):
    warnings.simplefilter("ignore")
    reached = {}
    for slug in SLUGS:
        model = network()
        fully_shard(model)
        try:
            optimizer = optimizer_for(slug, model)
            train(model, optimizer, batches())
        except ValueError as error:
            reached[slug] = str(error)
        else:
            reached[slug] = [p.detach().full_tensor() for p in model.parameters()]
        dist.barrier()
    torch.save(reached, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    run_ranks(_replicas, folder, seconds=120)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    run_ranks(_shards, folder, seconds=120)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("slug", SLUGS)
def test_replicas_stay_identical_to_the_bit_and_move(replicas, slug):
    first, second = (reached[slug] for reached in replicas)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, network().parameters(), strict=True))


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug not in REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_sharded_parameters_give_the_steps_of_whole_ones(shards, slug):
    model = network()
    train(model, optimizer_for(slug, model), batches())
    for reached in shards:
        assert not isinstance(reached[slug], str), reached[slug]
        for sharded, whole in zip(reached[slug], model.parameters(), strict=True):
            torch.testing.assert_close(sharded, whole.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug in REFUSED])
def test_sharded_parameters_are_refused_with_the_reason(shards, slug):
    assert isinstance(shards[0][slug], str)
    assert REFUSED[slug] in shards[0][slug]
