import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ranks import run_ranks

from headway.optim.mirror import (
    Ball,
    Box,
    Entropy,
    Euclidean,
    MirrorMap,
    PowerMap,
    Simplex,
    UnnormalisedEntropy,
    block_norm,
    project_ball_,
    project_ball_in_norm,
    project_simplex,
    soft_threshold_,
)

MAPS = [Euclidean(), Entropy(), UnnormalisedEntropy(), PowerMap(1.5), PowerMap(1.2, center=0.3), PowerMap(1.5, dim=-1)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex_points(seed=0):
    return [normal(3, 5, seed=seed + i).softmax(-1) for i in range(3)]  # in the domain of every map


def name_of(mirror):
    return repr(mirror) if isinstance(mirror, PowerMap) else type(mirror).__name__


@pytest.mark.parametrize("mirror", MAPS, ids=name_of)
def test_inverse_of_grad_is_the_point(mirror):
    assert isinstance(mirror, MirrorMap)
    for x in simplex_points():
        torch.testing.assert_close(mirror.inverse(mirror.grad(x)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mirror", MAPS, ids=name_of)
def test_divergence_has_the_three_point_identity(mirror):
    x, y, z = simplex_points()
    left = mirror.divergence(x, z) - mirror.divergence(x, y) - mirror.divergence(y, z)
    right = ((mirror.grad(y) - mirror.grad(z)) * (x - y)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mirror", MAPS, ids=name_of)
def test_divergence_is_zero_at_the_point_and_positive_elsewhere(mirror):
    x, y, _ = simplex_points()
    assert abs(float(mirror.divergence(x, x))) < 1e-15
    assert float(mirror.divergence(x, y)) > 0


@pytest.mark.parametrize(
    "mirror", [Euclidean(), UnnormalisedEntropy(), PowerMap(1.5), PowerMap(1.3, center=0.2)], ids=name_of
)
def test_grad_is_the_gradient_of_what_the_divergence_is_made_of(mirror):
    # d/dx D(x, y) = grad(x) - grad(y)
    x, y, _ = simplex_points()
    x.requires_grad_()
    mirror.divergence(x, y).backward()
    torch.testing.assert_close(x.grad, mirror.grad(x.detach()) - mirror.grad(y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("p", [1.1, 1.5, 1.9, 2.0])
def test_power_map_is_uniformly_convex_of_degree_q(p):
    mirror = PowerMap(p)
    for seed in range(50):
        x, y = normal(4, seed=seed), normal(4, seed=1000 + seed)
        bound = torch.linalg.vector_norm(x - y) ** mirror.q / mirror.q
        assert float(mirror.divergence(x, y)) >= float(bound) * (1 - 1e-9)


def test_power_map_at_its_center_is_zero_in_the_dual_and_back():
    mirror = PowerMap(1.5, center=2.0)
    center = torch.full((3,), 2.0)
    assert torch.equal(mirror.grad(center), torch.zeros(3))
    assert torch.equal(mirror.inverse(torch.zeros(3)), center)


def test_power_map_with_p_2_is_the_euclidean_map_about_the_center():
    x, y, _ = simplex_points()
    assert torch.equal(PowerMap(2.0).grad(x), x)
    torch.testing.assert_close(PowerMap(2.0, center=0.7).divergence(x, y), Euclidean().divergence(x, y))


@pytest.mark.parametrize("p", [1.0, 2.1, 0.5])
def test_power_map_refuses_other_moments(p):
    with pytest.raises(ValueError, match="p must be in"):
        PowerMap(p)


def test_entropy_canonical_dual_point_changes_nothing_but_the_constant():
    z = normal(2, 4) + 50
    canonical = Entropy().canonical(z)
    torch.testing.assert_close(canonical.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(Entropy().inverse(canonical), Entropy().inverse(z))


@pytest.mark.parametrize("project", [Ball(0.8), Ball(0.5, center=0.3), Box(-0.2, 0.4), Simplex()], ids=repr)
def test_projection_is_idempotent_feasible_and_nearest(project):
    for seed in range(20):
        v = normal(3, seed=seed)
        x = project(v)
        torch.testing.assert_close(project(x), x, rtol=0, atol=1e-15)
        # the variational inequality <v - x, y - x> <= 0 for all y of the set
        others = project(2 * normal(500, 3, seed=100 + seed))
        assert float(((others - x) @ (v - x)).max()) <= 1e-12


def test_points_of_the_ball_stay_to_the_bit_and_rows_are_projected_one_by_one():
    rows = torch.tensor([[0.3, 0.1], [3.0, 4.0]], dtype=torch.float64)
    projected = Ball(1.0)(rows)
    assert torch.equal(projected[0], rows[0])
    torch.testing.assert_close(projected[1], torch.tensor([0.6, 0.8], dtype=torch.float64))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_simplex_projection_meets_its_optimality_conditions(values):
    v = torch.tensor(values, dtype=torch.float64)
    x = project_simplex(v)
    assert abs(float(x.sum()) - 1) < 1e-12
    assert bool((x >= 0).all())
    threshold = (v - x)[x > 0]  # v - x is one number on the support, and at least v elsewhere
    assert float(threshold.max() - threshold.min()) < 1e-12 * 100
    assert bool((v[x == 0] <= threshold.max() + 1e-10).all())


def test_simplex_projection_of_a_scalar_is_one():
    assert float(project_simplex(torch.tensor(-3.0))) == 1.0


def test_ball_projection_in_a_metric_meets_its_optimality_conditions():
    for seed in range(20):
        root, v = normal(4, 4, seed=seed), 3 * normal(4, seed=100 + seed)
        H, center = root @ root.T + 0.1 * torch.eye(4, dtype=torch.float64), 0.1 * normal(4, seed=7)
        x = project_ball_in_norm(H, v, 1.0, center)
        assert float(torch.linalg.vector_norm(x - center)) == pytest.approx(1.0, abs=1e-12)
        pull = H @ (v - x)  # = mu (x - c) with mu > 0
        cosine = pull @ (x - center) / torch.linalg.vector_norm(pull)
        assert float(cosine) == pytest.approx(1.0, abs=1e-9)


def test_ball_projection_in_the_identity_metric_is_the_plain_one_and_inside_nothing_moves():
    identity, v = torch.eye(3, dtype=torch.float64), 2 * normal(3)
    torch.testing.assert_close(project_ball_in_norm(identity, v, 0.5), Ball(0.5)(v), rtol=1e-12, atol=1e-12)
    assert project_ball_in_norm(3 * identity, v, 100.0) is v


def test_soft_threshold_equals_its_formula_and_gives_exact_zeros():
    v = normal(1000)
    moved = v.clone()
    soft_threshold_([moved], 0.5)
    np.testing.assert_array_equal(moved.numpy(), (v.sign() * (v.abs() - 0.5).clamp_min(0)).numpy())
    assert 0 < int((moved == 0).sum()) < 1000


def test_block_norm_is_that_of_the_concatenation_in_mixed_precision():
    tensors = [normal(3, 2), normal(4, seed=1).float(), normal(seed=2)]
    expected = torch.cat([t.double().reshape(-1) for t in tensors]).norm()
    assert block_norm(tensors).dtype == torch.float64
    torch.testing.assert_close(block_norm(tensors), expected, rtol=1e-7, atol=0)


def test_block_on_a_ball_moves_as_one_vector():
    tensors, centers = [normal(3), normal(2, 2, seed=1)], [torch.zeros(3).double(), torch.zeros(2, 2).double()]
    flat = torch.cat([t.reshape(-1) for t in tensors])
    project_ball_(tensors, centers, 0.5, block_norm(tensors))
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in tensors]), Ball(0.5)(flat))


@pytest.mark.parametrize(("make", "name"), [(lambda: Ball(0.0), "radius"), (lambda: Box(1.0, 0.0), "low")])
def test_empty_sets_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def sharded_norm(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    values = [torch.arange(10.0).reshape(5, 2), torch.ones(3)]  # five rows: shards of different size
    parts = [distribute_tensor(values[0], mesh, [Shard(0)]), distribute_tensor(values[1], mesh, [Replicate()])]
    norm = block_norm([part.to_local() for part in parts] + [torch.tensor(2.0)], [*parts, torch.tensor(2.0)])
    torch.save(norm, f"{folder}/norm-{rank}.pt")


def test_norm_of_sharded_parameters_is_that_of_the_whole(tmp_path):
    run_ranks(sharded_norm, tmp_path)
    expected = math.sqrt(sum(i**2 for i in range(10)) + 3 + 4)
    for rank in range(2):
        assert float(torch.load(tmp_path / f"norm-{rank}.pt")) == pytest.approx(expected, rel=1e-6)
