import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.optim.subspace import (
    COORDINATE_PROJECTIONS,
    TENSOR_PROJECTIONS,
    Basis,
    Coordinates,
    active_blocks,
    as_matrix,
    draw,
    reproject,
    reproject_units,
    restore,
    seeded_generator,
    svd_basis,
)

SHAPES = [(12, 8), (8, 12), (9, 9)]


def matrix(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("projection", TENSOR_PROJECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_up_of_down_plus_residual_is_the_gradient(projection, shape, density):
    G = matrix(shape)
    subspace = draw(projection, G, density, seeded_generator(0))
    small = subspace.down(G)
    residual = subspace.residual(G, small)
    torch.testing.assert_close(subspace.up(small, G.shape) + residual, G, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(subspace.down(subspace.up(small, G.shape)), small, rtol=1e-5, atol=1e-5)
    assert subspace.is_full(G.shape) == (density == 1.0)


@pytest.mark.parametrize("projection", COORDINATE_PROJECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_coordinates_leave_exactly_zero_on_active_entries_and_the_gradient_elsewhere(projection, shape):
    G = matrix(shape)
    subspace = draw(projection, G, 0.3, seeded_generator(0))
    active = subspace.up(torch.ones_like(subspace.down(G)), G.shape).bool()
    residual = subspace.residual(G, subspace.down(G))
    assert 0 < active.sum() < G.numel()
    assert torch.equal(residual[active], torch.zeros(int(active.sum())))
    assert torch.equal(residual[~active], G[~active])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    density=st.floats(0, 1),
    projection=st.sampled_from(TENSOR_PROJECTIONS),
)
def test_sizes_follow_int_for_coordinates_and_round_for_ranks(rows, columns, density, projection):
    G = matrix((rows, columns))
    subspace = draw(projection, G, density, seeded_generator(1))
    rank = round(density * min(rows, columns))
    along_columns = rows >= columns
    expected = {
        "columns": (rows, int(density * columns)),
        "rows": (int(density * rows), columns),
        "randk": (int(density * rows * columns),),
    }.get(projection, (rows, rank) if along_columns else (rank, columns))
    assert subspace.down(G).shape == expected


def test_drawn_indices_do_not_repeat():
    indices = draw("randk", matrix((12, 8)), 0.7, seeded_generator(3)).tensor
    assert indices.unique().numel() == indices.numel() == int(0.7 * 96)


def test_random_k_indices_take_four_bytes_each():
    assert draw("randk", matrix((12, 8)), 0.5, seeded_generator(0)).tensor.element_size() == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_keeps_the_largest_singular_values(shape):
    G = matrix(shape)
    subspace = draw("svd", G, 0.25, seeded_generator(0))
    kept = torch.linalg.svdvals(subspace.up(subspace.down(G), G.shape))[:2]
    torch.testing.assert_close(kept, torch.linalg.svdvals(G)[:2])


@pytest.mark.parametrize("projection", ["svd", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_basis_is_orthonormal_and_on_the_shorter_side(projection, shape):
    basis = draw(projection, matrix(shape), 0.5, seeded_generator(0)).tensor
    vectors = basis if shape[0] >= shape[1] else basis.T
    assert vectors.shape[1] == min(shape)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)), rtol=0, atol=1e-5)


def test_svd_of_bfloat16_is_computed_and_kept_in_float32():
    assert draw("svd", matrix((6, 4)).bfloat16(), 0.5, seeded_generator(0)).tensor.dtype == torch.float32


def test_svd_basis_does_not_keep_the_whole_factor_in_memory():
    basis = draw("svd", matrix((64, 48)), 8 / 48, seeded_generator(0)).tensor
    assert basis.untyped_storage().nbytes() == 4 * 8 * 48


@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
def test_residual_of_a_gradient_inside_the_subspace_is_exactly_zero(shape):
    G = matrix((shape[0], 8)) @ matrix((8, shape[1]), seed=1)
    subspace = draw("svd", G, 0.2, seeded_generator(0))
    assert not subspace.residual(G, subspace.down(G)).any()


@pytest.mark.parametrize("projection", TENSOR_PROJECTIONS)
def test_a_subspace_is_restored_from_its_tensor(projection):
    for shape in SHAPES:
        G = matrix(shape)
        subspace = draw(projection, G, 0.4, seeded_generator(0))
        assert torch.equal(restore(projection, subspace.tensor, G.shape).down(G), subspace.down(G))


@pytest.mark.parametrize("projection", [p for p in TENSOR_PROJECTIONS if p != "svd"])
def test_draws_are_a_function_of_seed_and_counters(projection):
    G = matrix((40, 30))
    first, again, other = (draw(projection, G, 0.4, seeded_generator(*c)).tensor for c in [(7, 1), (7, 1), (7, 2)])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    for projection in TENSOR_PROJECTIONS:
        draw(projection, matrix((6, 4)), 0.5, seeded_generator(0))
    assert torch.equal(before, torch.get_rng_state())


def test_reprojection_keeps_shared_coordinates_and_zeroes_new_ones():
    old, new = Coordinates(1, torch.tensor([0, 2])), Coordinates(1, torch.tensor([2, 3]))
    shape = torch.Size((2, 4))
    assert reproject(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), old, new, shape).tolist() == [[2.0, 0.0], [4.0, 0.0]]
    assert reproject_units(torch.tensor([[5.0, 6.0]]), old, new, shape).tolist() == [[6.0, 0.0]]


@pytest.mark.parametrize("projection", COORDINATE_PROJECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_units_broadcast_against_the_coefficients(projection, shape):
    G = matrix(shape)
    subspace = draw(projection, G, 0.4, seeded_generator(0))
    units = subspace.units(G, fill=3)
    assert torch.equal(units.expand_as(subspace.down(G)), torch.full_like(subspace.down(G), 3))
    assert units.numel() == subspace.tensor.numel()


def test_as_matrix_of_any_shape():
    assert [as_matrix(torch.zeros(s)).shape for s in [(), (5,), (2, 3), (4, 3, 2, 2)]] == [
        (1, 1),
        (1, 5),
        (2, 3),
        (4, 12),
    ]
    x = matrix((2, 3, 4, 5))
    assert torch.equal(as_matrix(x.to(memory_format=torch.channels_last)), x.flatten(1))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12),
    density=st.floats(0, 1),
    order=st.sampled_from(["random", "ascending", "descending"]),
    change=st.integers(0, 9),
)
def test_round_of_density_times_count_distinct_blocks_are_active(count, density, order, change):
    blocks = active_blocks(count, density, order, change, seeded_generator(0, change))
    assert len(set(blocks)) == len(blocks) == round(density * count)
    assert all(0 <= block < count for block in blocks)


def test_block_orders_by_hand():
    def sequence(order, count=6, density=1 / 3, changes=4):
        return [active_blocks(count, density, order, change, seeded_generator(0)) for change in range(changes)]

    assert sequence("ascending") == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert sequence("descending") == [[4, 5], [2, 3], [0, 1], [4, 5]]
    assert sequence("mirror") == [[0, 5], [1, 4], [2, 3], [0, 5]]
    assert sequence("ascending", count=5, density=0.4) == [[0, 1], [2, 3], [0, 4], [1, 2]]


def test_mirror_refuses_an_odd_number_of_active_blocks():
    with pytest.raises(ValueError, match=r"mirror.*even number.*got 3"):
        active_blocks(6, 0.5, "mirror", 0, seeded_generator(0))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'nothing'"):
        draw("nothing", matrix((2, 2)), 0.5, seeded_generator(0))
    with pytest.raises(ValueError, match="'nothing'"):
        active_blocks(2, 0.5, "nothing", 0, seeded_generator(0))


def test_basis_merge_adds_and_coordinates_overwrite():
    ones = torch.ones(2, 2)
    assert Basis("left", torch.tensor([[1.0], [0.0]])).merge_(ones.clone(), ones[:1]).tolist() == [[2, 2], [1, 1]]
    assert Coordinates(0, torch.tensor([0])).merge_(ones.clone(), 5 * ones[:1]).tolist() == [[5, 5], [1, 1]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_basis_is_in_the_order_in_which_a_checkpoint_gives_it_back(side, shape):
    basis = svd_basis(matrix(shape), 3, side).tensor
    assert basis.is_contiguous()
    assert basis.untyped_storage().nbytes() == 4 * basis.numel()
