import json
import os
from itertools import islice

import pytest
import torch.distributed as dist
from tests.ranks import RANKS, run_ranks
from torch.utils.data import DataLoader, IterableDataset

from headway.budget.fresh_data import DataExhausted, NoRepeatSampler, epoch_guard


class Stream(IterableDataset):
    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        return iter(self.sampler)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_each_index_comes_once_and_the_next_request_is_refused(size):
    sampler = NoRepeatSampler(size)
    assert sorted(sampler) == list(range(size))
    with pytest.raises(DataExhausted, match=f"all {size} indices have been drawn once"):
        next(iter(sampler))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_indices(ranks):
    drawn = [list(NoRepeatSampler(20, rank=rank, world_size=ranks)) for rank in range(ranks)]
    assert sorted(index for part in drawn for index in part) == list(range(20))
    assert max(map(len, drawn)) - min(map(len, drawn)) <= 1


def test_drop_last_gives_all_ranks_equally_many():
    samplers = [NoRepeatSampler(20, rank=rank, world_size=3, drop_last=True) for rank in range(3)]
    assert [len(sampler) for sampler in samplers] == [6, 6, 6]
    drawn = [index for sampler in samplers for index in sampler]
    assert len(set(drawn)) == len(drawn) == 18


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_delivers_each_index_once(workers):
    sampler = NoRepeatSampler(21)
    loader = DataLoader(range(21), batch_size=4, sampler=sampler, num_workers=workers)
    assert sorted(int(i) for batch in loader for i in batch) == list(range(21))
    with pytest.raises(DataExhausted):
        list(loader)


@pytest.mark.parametrize("drop_last", [False, True])
def test_workers_share_the_indices_of_a_rank(drop_last):
    drawn = []
    for rank in range(2):
        sampler = NoRepeatSampler(21, rank=rank, world_size=2, drop_last=drop_last)
        share = [int(i) for batch in DataLoader(Stream(sampler), batch_size=4, num_workers=2) for i in batch]
        assert len(share) == len(sampler)
        drawn += share
    assert len(set(drawn)) == len(drawn) == (20 if drop_last else 21)


def draw(rank, folder):
    with open(os.path.join(folder, f"{rank}.json"), "w") as file:
        json.dump([dist.get_rank(), list(NoRepeatSampler(11))], file)


def test_rank_and_number_of_ranks_come_from_torch_distributed(tmp_path):
    run_ranks(draw, tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert sorted(index for _, part in results for index in part) == list(range(11))


def test_broken_off_pass_goes_on_where_it_stopped():
    sampler = NoRepeatSampler(10)
    first = list(islice(iter(sampler), 4))
    assert len(sampler) == 6
    assert sorted(first + list(sampler)) == list(range(10))


def test_state_continues_exactly():
    sampler, again = NoRepeatSampler(50, seed=3), NoRepeatSampler(50, seed=3)
    list(islice(iter(sampler), 20))
    again.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert list(again) == list(sampler)


def test_state_continues_with_another_number_of_ranks():
    drawn, state = [], {}
    for rank in range(2):
        sampler = NoRepeatSampler(20, rank=rank, world_size=2)
        drawn += islice(iter(sampler), 3)
        state = sampler.state_dict()
    for rank in range(3):
        sampler = NoRepeatSampler(20, rank=rank, world_size=3)
        sampler.load_state_dict(state)
        drawn += sampler
    assert sorted(drawn) == list(range(20))


def test_drop_last_counts_from_where_the_ranks_began():
    state = NoRepeatSampler(20).state_dict() | {"drawn": 6}
    lengths = []
    for rank in range(4):
        sampler = NoRepeatSampler(20, rank=rank, world_size=4, drop_last=True)
        sampler.load_state_dict(state)
        lengths.append(len(list(sampler)))
    assert lengths == [3, 3, 3, 3]


def test_seed_decides_the_order_and_without_shuffling_there_is_none():
    assert list(NoRepeatSampler(30)) == list(NoRepeatSampler(30)) != list(NoRepeatSampler(30, seed=1))
    assert list(NoRepeatSampler(5, shuffle=False)) == [0, 1, 2, 3, 4]


def test_state_of_another_order_is_refused():
    sampler = NoRepeatSampler(30, seed=1)
    with pytest.raises(ValueError, match="seed must be 0 as in the state, got 1"):
        sampler.load_state_dict(NoRepeatSampler(30).state_dict())


@pytest.mark.parametrize("name", sorted(NoRepeatSampler.constraints))
def test_arguments_outside_their_range_are_refused(name):
    for value in NoRepeatSampler.constraints[name].outside():
        with pytest.raises(ValueError, match=name):
            NoRepeatSampler(**{"size": 10, "rank": 0, "world_size": 1, name: value})


def test_rank_beyond_the_ranks_is_refused():
    with pytest.raises(ValueError, match="rank must be < world_size = 2, got 2"):
        NoRepeatSampler(10, rank=2, world_size=2)


def test_guard_lets_the_allowed_passes_through():
    guarded = epoch_guard([1, 2, 3], max_epochs=2)
    assert len(guarded) == 3
    assert list(guarded) + list(guarded) == [1, 2, 3, 1, 2, 3]
    with pytest.raises(DataExhausted, match="max_epochs = 2 passes"):
        list(guarded)


def test_broken_off_pass_counts_for_the_guard():
    guarded = epoch_guard([1, 2, 3])
    assert next(iter(guarded)) == 1
    with pytest.raises(DataExhausted):
        list(guarded)


def test_state_of_the_guard_counts_ended_passes_only():
    guarded = epoch_guard([1, 2, 3])
    running = iter(guarded)
    next(running)
    resumed = epoch_guard([2, 3])
    resumed.load_state_dict(guarded.state_dict())
    assert list(resumed) == [2, 3]
    ended = epoch_guard([1])
    ended.load_state_dict(resumed.state_dict())
    with pytest.raises(DataExhausted):
        list(ended)


def test_guard_refuses_less_than_one_epoch():
    with pytest.raises(ValueError, match="max_epochs must be a whole number >= 1, got 0"):
        epoch_guard([], max_epochs=0)
