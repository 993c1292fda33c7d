import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ranks import run_ranks
from torch import nn

from headway.schedules.gradient_noise import (
    NoiseStats,
    chunk_stats,
    gram_stats,
    noise_stats,
    per_sample_grads,
    pool_noise_stats,
)

seeds = st.integers(0, 2**31)


def gradients(batch, size, seed=0, mean=0.3):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    return mean + scale * torch.randn(batch, size, generator=generator, dtype=torch.float64)


def by_hand(G):
    """The definitions, one by one."""
    g = G.mean(0)
    along = G @ g
    rest = G - (along / g.dot(g)).unsqueeze(1) * g
    return NoiseStats(
        len(G),
        float(G.var(0).sum()),
        float(g.dot(g)),
        float(along.var()),
        float(rest.var(0).sum()),
        float((G.var(0) / g.square()).max()),
    )


def assert_close(got, expected, tolerance=1e-10):
    assert got.batch == expected.batch
    for name, value in got._asdict().items():
        if value is not None:
            assert value == pytest.approx(getattr(expected, name), rel=tolerance, abs=tolerance), name


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(2, 12), size=st.integers(1, 9), seed=seeds)
def test_statistics_equal_their_definitions(batch, size, seed):
    G = gradients(batch, size, seed)
    assert_close(noise_stats(G), by_hand(G))


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(2, 12), size=st.integers(1, 9), seed=seeds)
def test_total_variance_is_that_along_the_gradient_plus_that_across(batch, size, seed):
    stats = noise_stats(gradients(batch, size, seed))
    assert stats.var_l1 == pytest.approx(stats.var_ip / stats.grad_sq + stats.var_orth, rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(2, 12), size=st.integers(1, 9), seed=seeds)
def test_gram_route_equals_the_explicit_route(batch, size, seed):
    G = gradients(batch, size, seed)
    stats = gram_stats(G @ G.T)
    assert_close(stats, noise_stats(G))
    assert stats.var_coord_ratio is None


@pytest.mark.parametrize("batch", [2, 3, 6, 7])
def test_identical_samples_have_no_variance_at_all(batch):
    G = gradients(1, 5).expand(batch, 5)
    stats = noise_stats(G)
    assert (stats.var_l1, stats.var_ip, stats.var_orth, stats.var_coord_ratio) == (0, 0, 0, 0)
    assert pool_noise_stats([G, G[:1]], "coordinate").var_coord_ratio == 0


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    test=st.sampled_from(["norm", "ip", "ip+orth", "coordinate"]),
    seed=seeds,
)
def test_pooled_chunks_equal_the_whole_batch(sizes, test, seed):
    G = gradients(sum(sizes), 6, seed)
    chunks = [{"a": chunk[:, :2], "b": chunk[:, 2:].reshape(-1, 2, 2)} for chunk in G.split(sizes)]
    pooled = pool_noise_stats(chunks, test)
    assert_close(pooled, noise_stats(G))
    assert (pooled.var_ip is None) == (test in ("norm", "coordinate"))
    assert (pooled.var_coord_ratio is None) == (test != "coordinate")


def test_six_samples_in_three_chunks_are_not_over_estimated():
    """The authors' rule, the mean of the chunks' variances plus the variance of their means, does."""
    G = gradients(6, 1, seed=1)
    parts = G.split(2)
    theirs = torch.stack([part.var() for part in parts]).mean() + torch.stack([part.mean() for part in parts]).var(
        correction=0
    )
    assert float(theirs) > 1.05 * float(G.var())
    assert pool_noise_stats(parts).var_l1 == pytest.approx(float(G.var()), rel=1e-12)


def test_one_tensor_or_several_are_the_same_globally_and_not_by_tensor():
    G = gradients(7, 6)
    parts = {"a": G[:, :2], "b": G[:, 2:].reshape(7, 2, 2)}
    assert_close(noise_stats(parts), noise_stats(G))
    assert noise_stats(G, "tensor") == noise_stats(G)
    each = [noise_stats(part) for part in parts.values()]
    added = noise_stats(parts, "tensor")
    assert added.var_ip == pytest.approx(sum(stats.var_ip for stats in each), rel=1e-12)
    assert added.var_orth == pytest.approx(sum(stats.var_orth for stats in each), rel=1e-12)
    assert added.var_l1 == pytest.approx(noise_stats(G).var_l1, rel=1e-12)
    assert abs(added.var_ip - noise_stats(G).var_ip) > 1e-3


def test_a_scalar_parameter_counts_as_one_coordinate():
    G = gradients(5, 3)
    assert_close(noise_stats({"matrix": G[:, :2], "scalar": G[:, 2]}), noise_stats(G))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_squared_in_32_bits(dtype):
    G = (1000 * gradients(8, 4)).to(dtype)  # squares beyond 65504
    assert_close(noise_stats(G), noise_stats(G.double()), 1e-5)
    assert_close(pool_noise_stats(G.split(3), "ip+orth"), noise_stats(G.double()), 1e-5)


def test_small_gradients_in_float32_do_not_underflow():
    G = gradients(8, 4).float()
    expected, small = noise_stats(G), noise_stats(1e-15 * G)
    assert small.var_ip / small.grad_sq**2 == pytest.approx(expected.var_ip / expected.grad_sq**2, rel=1e-4)


def test_zero_mean_gradient_leaves_all_variance_across():
    stats = noise_stats(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert stats == NoiseStats(2, 2.0, 0.0, 0.0, 2.0, math.inf)
    assert gram_stats(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == stats._replace(var_coord_ratio=None)


def test_quantile_and_epsilon_tame_coordinates_near_zero():
    G = torch.tensor([[1.0, 2.0, 4.0], [-1.0, 4.0, 8.0]])  # ratios inf, 2/9, 8/36
    G[0, 2] = 3.0  # the last 12.5 / 30.25
    assert noise_stats(G).var_coord_ratio == math.inf
    assert noise_stats(G, coordinate_quantile=2 / 3).var_coord_ratio == pytest.approx(12.5 / 30.25)
    assert noise_stats(G, coordinate_quantile=1 / 3).var_coord_ratio == pytest.approx(2 / 9)
    assert noise_stats(G, coordinate_eps=0.5).var_coord_ratio == pytest.approx(4)
    pooled = pool_noise_stats([G[:1], G[1:]], "coordinate", coordinate_quantile=2 / 3)
    assert pooled.var_coord_ratio == pytest.approx(12.5 / 30.25)


def test_chunk_statistics_are_unbiased_for_the_variance_of_samples():
    chunks, size, dimensions = 4, 8, 20
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 1.5, dimensions, dtype=torch.float64)
    estimates = []
    for _ in range(2000):
        samples = 0.1 + scale * torch.randn(chunks, size, dimensions, generator=generator, dtype=torch.float64)
        means = samples.mean(1)
        norms = means.square().sum(1).tolist()
        estimates.append(chunk_stats(norms, float(means.mean(0).square().sum()), size).var_l1)
    mean, expected = torch.tensor(estimates).mean(), float(scale.square().sum())
    assert float(mean) == pytest.approx(expected, rel=0.02)


def test_chunks_of_one_sample_give_exactly_the_variance():
    G = gradients(6, 5)
    stats = chunk_stats(G.square().sum(1).tolist(), float(G.mean(0).square().sum()), 1)
    assert_close(stats, noise_stats(G))
    assert (stats.var_ip, stats.var_orth, stats.var_coord_ratio) == (None, None, None)


def test_chunk_statistics_take_rounding_and_refuse_a_sum_for_a_mean():
    assert chunk_stats([1.0, 1.0], 1.0 + 1e-7, 4).var_l1 == 0
    with pytest.raises(ValueError, match="mean_sq_norm must be the squared norm of the chunks' mean gradient"):
        chunk_stats([1.0, 1.0], 4.0, 4)
    assert math.isnan(chunk_stats([1.0, math.nan], 1.0, 4).var_l1)
    assert not math.isfinite(chunk_stats([1.0, math.inf], 1.0, 4).var_l1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_stats(torch.ones(1, 3)), "at least two samples, got 1"),
        (lambda: pool_noise_stats([torch.ones(1, 3)]), "at least two samples, got 1"),
        (lambda: gram_stats(torch.ones(1, 1)), "at least two samples, got 1"),
        (lambda: gram_stats(torch.ones(2, 3)), r"gram must be a square matrix, got shape \(2, 3\)"),
        (lambda: noise_stats({}), "at least one tensor, got none"),
        (lambda: pool_noise_stats([]), "at least one chunk of gradients, got none"),
        (lambda: noise_stats({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}), r"got \[2, 3\] samples"),
        (lambda: noise_stats(torch.ones(2, 3), "row"), "granularity must be one of 'global', 'tensor', got 'row'"),
        (lambda: noise_stats(torch.ones(2, 3), coordinate_quantile=0.0), r"coordinate_quantile must be in \(0, 1\]"),
        (lambda: pool_noise_stats([torch.ones(2, 3)], "l2"), "test must be one of 'norm', 'ip'"),
        (lambda: chunk_stats([1.0], 1.0, 4), "at least two chunks, got 1"),
        (lambda: chunk_stats([1.0, 2.0], 1.0, 0), "chunk_size must be a whole number >= 1, got 0"),
    ],
    ids=range(12),
)
def test_what_gives_no_variance_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def small_model(*, dropout=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 2))


def data(batch=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, generator=generator), torch.randint(2, (batch,), generator=generator)


def test_per_sample_gradients_equal_those_of_a_loop():
    model, (inputs, targets) = small_model(), data()
    model[0].bias.requires_grad_(False)
    each = per_sample_grads(model, nn.functional.cross_entropy, (inputs, targets), chunk_size=2)
    assert set(each) == {"0.weight", "3.weight", "3.bias"}
    for i in range(len(inputs)):
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs[i : i + 1]), targets[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            if name in each:
                torch.testing.assert_close(each[name][i], parameter.grad)
    assert not any(gradient.requires_grad for gradient in each.values())


def test_dropout_is_drawn_as_told():
    model = small_model(dropout=0.5)
    inputs, targets = data(1)
    batch = (inputs.expand(64, -1), targets.expand(64))
    with pytest.raises(RuntimeError, match="randomness"):
        per_sample_grads(model, nn.functional.cross_entropy, batch)
    with torch.random.fork_rng(devices=[]):
        same = per_sample_grads(model, nn.functional.cross_entropy, batch, randomness="same")
        different = per_sample_grads(model, nn.functional.cross_entropy, batch, randomness="different")
    assert noise_stats(same).var_l1 == pytest.approx(0, abs=1e-12)
    assert noise_stats(different).var_l1 > 1e-3


def test_batch_normalisation_is_refused_in_training_and_taken_in_evaluation_mode():
    model, batch = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), data()
    with pytest.raises(
        ValueError, match="model must not normalise over the batch in training mode, got 1: BatchNorm1d"
    ):
        per_sample_grads(model, nn.functional.cross_entropy, batch)
    assert noise_stats(per_sample_grads(model.eval(), nn.functional.cross_entropy, batch)).batch == 5


SPLITS = ([3, 1], [2, 5, 1])


def _pool(rank, folder):
    import torch.distributed as dist

    calls = []
    all_reduce = dist.all_reduce

    def counted(buffer, *arguments, **options):
        calls.append(buffer.numel())
        return all_reduce(buffer, *arguments, **options)

    dist.all_reduce = counted
    rows = gradients(12, 6).split([4, 8])[rank].split(SPLITS[rank])
    results = {}
    for test in ("norm", "coordinate", "ip+orth"):
        calls.clear()
        results[test] = (tuple(pool_noise_stats(rows, test)), list(calls))
    torch.save(results, f"{folder}/{rank}.pt")


def test_ranks_pool_to_the_statistics_of_the_whole_batch_in_one_all_reduce(tmp_path):
    run_ranks(_pool, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    for stats, _ in first.values():
        assert_close(NoiseStats(*stats), noise_stats(gradients(12, 6)))
    assert first["norm"][1] == [1 + 6 + 2]
    assert first["coordinate"][1] == [1 + 3 * 6]
    assert first["ip+orth"][1] == [1 + 6 + 2, 1]  # <g_i, g> needs the pooled g
