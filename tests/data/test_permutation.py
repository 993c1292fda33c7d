import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data import permute

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 2**40)


@given(size=sizes, seed=seeds, epoch=epochs)
@settings(deadline=None)
def test_is_a_bijection_of_any_size(size, seed, epoch):
    image = permute(np.arange(size), size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(image), np.arange(size))


@given(size=st.integers(1, 2**62), seed=seeds, data=st.data())
@settings(deadline=None)
def test_distinct_points_of_a_huge_domain_have_distinct_images_inside_it(size, seed, data):
    points = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40, unique=True))
    image = permute(np.array(points), size, seed=seed)
    assert len(set(image.tolist())) == len(points)
    assert image.min() >= 0
    assert image.max() < size


@given(size=sizes, seed=seeds, epoch=st.integers(0, 1000))
@settings(deadline=None)
def test_points_computed_alone_and_together_agree(size, seed, epoch):
    together = permute(np.arange(size), size, seed=seed, epoch=epoch)
    chosen = np.arange(0, size, max(1, size // 7))
    assert [int(permute(i, size, seed=seed, epoch=epoch)) for i in chosen] == together[chosen].tolist()


def test_every_element_can_have_its_own_epoch():
    epochs = np.array([[0], [1], [2]])
    together = permute(np.arange(50), 50, seed=3, epoch=epochs)
    assert together.shape == (3, 50)
    for epoch in range(3):
        assert np.array_equal(together[epoch], permute(np.arange(50), 50, seed=3, epoch=epoch))


def test_seeds_and_epochs_give_different_permutations():
    orders = {tuple(permute(np.arange(100), 100, seed=s, epoch=e).tolist()) for s in range(20) for e in range(20)}
    assert len(orders) == 400


def test_small_sizes_reach_every_order_about_equally_often():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        order = tuple(permute(np.arange(3), 3, seed=seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert 140 <= min(counts.values()) <= max(counts.values()) <= 260  # 200 expected, standard deviation 13


def test_places_and_images_are_independent():
    size, seeds = 1000, 300
    orders = np.stack([permute(np.arange(size), size, seed=seed) for seed in range(seeds)])
    for place in range(10):
        tenth = orders[:, place * 100 : (place + 1) * 100] // 100
        shares = np.bincount(tenth.ravel(), minlength=10) / tenth.size
        assert np.all(np.abs(shares - 0.1) < 0.01)  # more than 5 standard deviations
    assert abs(np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize(("index", "size"), [(0, 0), (5, 5), (-1, 5)])
def test_refuses_points_outside(index, size):
    with pytest.raises(ValueError, match="must be"):
        permute(index, size, seed=0)
