import pytest
import torch
import torch.distributed as dist
from tests.ranks import run_ranks
from torch.distributed.tensor import Shard, distribute_tensor

from headway.kernels.select import kth_largest_magnitude
from headway.optim.quantile import magnitude_quantile


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator) * 10.0 ** torch.randn(shape, generator=generator)
        for shape in [(7, 5), (4,), (3, 2, 2)]
    ]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.98])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_sorted_magnitude_at_that_place(fraction, dtype):
    values = [t.to(dtype) for t in tensors()]
    ordered = torch.cat([t.abs().flatten() for t in values]).sort(descending=True).values
    assert magnitude_quantile(values, fraction) == ordered[int(len(ordered) * fraction)].item()


def test_ties_and_zeros_count_one_by_one():
    values = [torch.tensor([2.0, -2.0, 0.0, 0.0, 2.0]), torch.tensor([-1.0])]
    assert [kth_largest_magnitude(values, k) for k in range(1, 7)] == [2.0, 2.0, 2.0, 1.0, 0.0, 0.0]


def test_a_place_outside_is_refused():
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\], got 3"):
        kth_largest_magnitude([torch.ones(2)], 3)


def _sharded_quantile(rank, folder):
    mesh = dist.init_device_mesh("cpu", (2,))
    sharded = [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors()]
    found = [magnitude_quantile(sharded, fraction, dist.group.WORLD) for fraction in (0.0, 0.1, 0.5, 0.98)]
    torch.save(found, f"{folder}/{rank}.pt")


def test_shards_count_together(tmp_path):
    run_ranks(_sharded_quantile, tmp_path)
    expected = [magnitude_quantile(tensors(), fraction) for fraction in (0.0, 0.1, 0.5, 0.98)]
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == expected
