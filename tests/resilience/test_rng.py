import random

import numpy as np
import pytest
import torch

from headway.resilience import CheckpointStore, rng_state, set_rng_state


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
