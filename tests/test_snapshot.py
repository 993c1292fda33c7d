import random

import numpy as np
import pytest
import torch

from headway.resilience import CheckpointStore
from headway.snapshot import Snapshot, put_back, rng_state, set_rng_state


def draws():
    # An odd number of normal deviates: both Python and NumPy then hold one back.
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(5).tolist(),
    )


@pytest.fixture(autouse=True)
def generators_as_they_were():
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(pytorch)


def test_generators_continue_where_the_snapshot_was_taken():
    draws()
    state = rng_state()
    expected = draws(), draws()
    draws()
    set_rng_state(state)
    assert (draws(), draws()) == expected


def test_a_snapshot_is_not_touched_by_later_draws():
    state = rng_state()
    first = draws()
    set_rng_state(state)
    draws()
    set_rng_state(state)
    assert draws() == first


def test_a_snapshot_goes_through_a_checkpoint(tmp_path):
    draws()
    store = CheckpointStore(tmp_path)
    store.save(1, {"rng": rng_state()})
    expected = draws()
    set_rng_state(store.load().state["rng"])
    assert draws() == expected


def test_a_generator_of_another_kind_is_refused():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        with pytest.raises(ValueError, match="NumPy's global generator must be MT19937, got PCG64"):
            rng_state()
    finally:
        np.random.set_bit_generator(before)


def a_step(model, optimizer):
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model, optimizer):
    return [t.clone() for t in [*model.state_dict().values(), *optimizer.state_dict()["state"].get(0, {}).values()]]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_snapshot_restores_model_optimizer_and_generators_any_number_of_times(tmp_path, on_disk, steps_before):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps_before):
        a_step(model, optimizer)
    before = everything(model, optimizer)
    identities = [id(parameter) for parameter in model.parameters()]
    snapshot = Snapshot(model, optimizer, file=tmp_path / "snapshot" if on_disk else None)
    ends = []
    for _ in range(3):
        for _ in range(4):
            a_step(model, optimizer)
        optimizer.param_groups[0]["lr"] *= 2
        ends.append(everything(model, optimizer))
        snapshot.restore()
        now = everything(model, optimizer)
        assert len(now) == len(before)
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(end, ends[0], strict=True))
    assert [id(parameter) for parameter in model.parameters()] == identities


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_a_snapshot_holds_goes_into_a_checkpoint_and_back_into_other_objects(tmp_path, on_disk):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    a_step(model, optimizer)
    snapshot = Snapshot(model, optimizer, file=tmp_path / "snapshot" if on_disk else None)
    torch.save(snapshot.state_dict(), tmp_path / "state")
    a_step(model, optimizer)
    expected = torch.rand(3)
    snapshot.restore()
    torch.rand(3)

    other = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    others = torch.optim.AdamW(other.parameters(), lr=0.3)
    put_back([other, others], torch.load(tmp_path / "state", weights_only=True))
    pairs = zip(everything(other, others), everything(model, optimizer), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    a_step(other, others)
    assert torch.equal(torch.rand(3), expected)


def test_a_snapshot_without_generators_leaves_them_alone():
    model = torch.nn.Linear(2, 2)
    snapshot = Snapshot(model, rng=False)
    torch.rand(3)
    state = torch.get_rng_state()
    snapshot.restore()
    assert torch.equal(torch.get_rng_state(), state)
