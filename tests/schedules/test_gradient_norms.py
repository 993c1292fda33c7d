import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from headway.schedules.gradient_norms import GradNormRecorder, clean_norms, read_norms


def parameter(*gradient: float, dtype=torch.float32) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(len(gradient), dtype=dtype))
    p.grad = torch.tensor(gradient, dtype=dtype)
    return p


# recorder


def test_it_records_the_norm_of_all_gradients_before_every_step():
    first, second, without = parameter(3.0), parameter(0.0, -4.0), nn.Parameter(torch.zeros(2))
    for norm, expected in (("l2", 5.0), ("l1", 7.0)):
        optimizer = torch.optim.SGD([{"params": [first, without]}, {"params": [second]}], lr=0.1)
        recorder = GradNormRecorder(optimizer, norm)
        optimizer.step()
        optimizer.step()
        assert recorder.norms == [expected, expected]


def test_a_call_before_clipping_stands_for_the_step():
    p = parameter(3.0, 4.0)
    optimizer = torch.optim.SGD([p], lr=0.1)
    recorder = GradNormRecorder(optimizer)
    assert recorder.record() == 5.0
    nn.utils.clip_grad_norm_([p], 1.0)
    optimizer.step()
    assert recorder.norms == [5.0]
    optimizer.step()
    assert recorder.norms == [5.0, pytest.approx(1.0, abs=1e-5)]


def test_a_skipped_step_leaves_no_entry():
    p = parameter(math.inf)
    optimizer = torch.optim.SGD([p], lr=0.1)
    recorder = GradNormRecorder(optimizer)
    assert recorder.record() == math.inf
    p.grad = torch.tensor([2.0])
    recorder.record()
    optimizer.step()
    assert recorder.norms == [2.0]


def test_parameters_are_recorded_on_call_also_within_a_closure():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([p], lr=0.25)
    recorder = GradNormRecorder(iter([p]))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        recorder.record()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert recorder.norms == [4.0, 2.0]


def test_detach_takes_the_hook_away_and_keeps_the_norms():
    optimizer = torch.optim.SGD([parameter(3.0)], lr=0.1)
    recorder = GradNormRecorder(optimizer)
    optimizer.step()
    recorder.detach()
    recorder.detach()
    optimizer.step()
    assert recorder.norms == [3.0]
    assert not optimizer._optimizer_step_pre_hooks


def test_a_group_added_later_counts():
    optimizer = torch.optim.SGD([parameter(3.0)], lr=0.1)
    recorder = GradNormRecorder(optimizer)
    optimizer.add_param_group({"params": [parameter(4.0)]})
    assert recorder.record() == 5.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_16_bit_gradients_are_summed_in_float32(dtype):
    p = nn.Parameter(torch.zeros(300_000, dtype=dtype))
    p.grad = torch.full_like(p, 1.0)
    assert GradNormRecorder([p], "l1").record() == 300_000  # above the largest float16
    assert GradNormRecorder([p]).record() == pytest.approx(math.sqrt(300_000), rel=1e-6)


def test_types_mix_and_sparse_gradients_count():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()  # rows of 2 and of 1
    double = parameter(1e200, dtype=torch.float64)
    assert GradNormRecorder(embedding.parameters()).record() == pytest.approx(math.sqrt(10))
    assert GradNormRecorder([*embedding.parameters(), parameter(1.0), double], "l1").record() == 1e200


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_scaler_does_not_show(fused):
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=fused)
    recorder = GradNormRecorder(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.square().sum() / 2).backward()
    scaler.step(optimizer)
    assert recorder.norms == [5.0]


def test_state_continues_in_another_recorder():
    optimizer = torch.optim.SGD([parameter(3.0)], lr=0.1)
    recorder = GradNormRecorder(optimizer)
    optimizer.step()
    recorder.record()
    state = json.loads(json.dumps(recorder.state_dict()))
    other = torch.optim.SGD([parameter(5.0)], lr=0.1)
    resumed = GradNormRecorder(other)
    resumed.load_state_dict(state)
    other.step()  # its norm was recorded before the state was taken
    other.step()
    assert resumed.norms == [3.0, 3.0, 5.0]
    assert recorder.norms == [3.0, 3.0]
    with pytest.raises(ValueError, match="norm must be 'l1' in the loaded state, got 'l2'"):
        GradNormRecorder(other, "l1").load_state_dict(state)


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match="norm must be one of 'l2', 'l1', got 'linf'"):
        GradNormRecorder([parameter(1.0)], "linf")
    with pytest.raises(ValueError, match="optimizer_or_params must be an optimizer or at least one parameter"):
        GradNormRecorder([])
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        GradNormRecorder([nn.Parameter(torch.zeros(1))]).record()


# ranks


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def inputs() -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def norms_of(module: nn.Module, rows: torch.Tensor, parameters) -> list[float]:
    module(rows).square().mean().backward()
    parameters = list(parameters)
    return [GradNormRecorder(parameters, norm).record() for norm in ("l2", "l1")]


def _on_ranks(rank, folder):
    replica = model()
    parallel = DistributedDataParallel(replica)
    found = {"replicas": norms_of(parallel, inputs()[4 * rank : 4 * rank + 4], replica.parameters())}
    sharded = model()
    fully_shard(sharded)
    found["shards"] = norms_of(sharded, inputs(), sharded.parameters())
    mesh = dist.init_device_mesh("cpu", (2,))
    kinds = []
    for place in (Shard(0), Replicate()):
        p = nn.Parameter(distribute_tensor(torch.zeros(3, 2), mesh, [place]))
        p.grad = distribute_tensor(torch.full((3, 2), 2.0), mesh, [place])
        kinds.append(p)
    p = nn.Parameter(distribute_tensor(torch.zeros(1, 2), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.tensor([[2.0 * rank, 1.0]]), mesh, [Partial()])
    kinds += [p, parameter(-2.0)]
    found["mixed"] = [GradNormRecorder(kinds, norm).record() for norm in ("l2", "l1")]
    torch.save(found, f"{folder}/{rank}.pt")


def test_ranks_agree_on_the_norm_of_the_whole_averaged_gradient(tmp_path):
    run_ranks(_on_ranks, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    whole = model()
    expected = norms_of(whole, inputs(), whole.parameters())
    assert first["replicas"] == pytest.approx(expected, rel=1e-5)
    assert first["shards"] == pytest.approx(expected, rel=1e-5)
    # 6 twos in shards, 6 twos replicated, the sum (2, 2) of the partial ones, and a plain -2.
    assert first["mixed"] == pytest.approx([math.sqrt(15 * 4), 30.0])


# metrics of a run


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_norms_are_read_in_the_order_of_steps_and_the_last_line_of_a_step_wins(tmp_path):
    file = write(
        tmp_path / "metrics.jsonl",
        {"step": 2, "grad_norm": 9.0},
        {"step": 1, "grad_norm": 1},
        {"step": 2, "validation_loss": 3.0},
        "",
        {"step": 3, "grad_norm": math.nan},
        {"step": 2, "grad_norm": 2.0},
        {"step": 10, "grad_norm": 4.0},
    )
    for path in (file, str(tmp_path), tmp_path):
        norms = read_norms(path)
        assert norms[:2] + norms[3:] == [1.0, 2.0, 4.0]
        assert math.isnan(norms[2])


def test_the_unfinished_line_of_a_killed_run_is_passed_over(tmp_path):
    file = write(tmp_path / "metrics.jsonl", {"step": 1, "grad_norm": 1.0}, {"step": 2, "grad_norm": 2.0})
    with file.open("a") as stream:
        stream.write('{"step": 3, "gra')
    assert read_norms(file) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{", "{}"], r"^norms: line 1 of '.*metrics.jsonl' is not JSON$"),
        (["[1]"], "line 1 of .* must be an object, got list"),
        ([{"step": 1, "grad_norm": 1.0}, {"step": 2, "grad_norm": "2"}], "line 2 .* a number as grad_norm, got '2'"),
        ([{"grad_norm": 1.0}], "line 1 .* a whole number as step, got None"),
        ([{"step": 1, "loss": 1.0}, {"step": 1, "grad_norm": 1.0}], "norms must be 2 or more records .*, got 1 in"),
    ],
    ids=["no JSON", "no object", "no number", "no step", "too few"],
)
def test_a_file_that_is_not_of_a_run_is_refused_with_the_line(tmp_path, lines, message):
    file = write(tmp_path / "metrics.jsonl", *lines)
    with pytest.raises(ValueError, match=message) as caught:
        read_norms(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "run"):
        with pytest.raises(ValueError, match=f"^norms must be the path .*, got '{path}': No such file or directory$"):
            read_norms(path)


def test_norms_that_are_not_finite_are_interpolated():
    cleaned = clean_norms([math.nan, 1.0, math.inf, 2.0, -math.inf])
    assert cleaned.tolist() == [1.0, 1.0, 1.5, 2.0, 2.0]
    assert clean_norms(torch.tensor([1, 2])).dtype == np.float64


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ([1.0], r"norms must hold at least 2 finite numbers, got \[1.0\]"),
        ([1.0, math.nan], "norms must hold at least 2 finite numbers"),
        ([1.0] * 9 + [0.0], "norms must be > 0, got 0 at position 9 of 10 values"),
        ("12", "norms must be a sequence of numbers, got '12'"),
        ([[1.0], [2.0]], "norms must be a sequence of numbers"),
    ],
    ids=["one", "one finite", "zero", "text", "nested"],
)
def test_norms_that_say_nothing_are_refused(norms, message):
    with pytest.raises(ValueError, match=message):
        clean_norms(norms)
