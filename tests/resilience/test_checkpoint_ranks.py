"""Saving and loading by two real processes, and by one what two have saved and the reverse."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RANKS, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from headway.resilience import CheckpointError, CheckpointStore
from headway.resilience import storage as storage_module
from headway.resilience.storage import read_metadata, write_file

FULL = torch.arange(4000.0).reshape(4, 1000)


def state(step=1):
    return {"model": {"a": FULL * step, "b": FULL + step}, "progress": {"step": step, "loss": float("inf")}}


def rank_state(rank):
    return {"generator": torch.full((3,), rank, dtype=torch.uint8), "position": (rank, 10 * rank)}


def plain(restored):
    """A Restored as numbers and text."""
    own = restored.rank_state
    return {
        "step": restored.step,
        "whole": bool((restored.state["model"]["a"] == FULL * restored.step).all())
        and bool((restored.state["model"]["b"] == FULL + restored.step).all()),
        "progress": restored.state["progress"],
        "rank_state": own and {"generator": own["generator"].tolist(), "position": list(own["position"])},
        "skipped": restored.skipped,
    }


def failure_of(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def saved_and_loaded(rank, folder):
    store = CheckpointStore(folder)
    store.save(1, state(), rank_state(rank))
    return plain(store.load())


def one_process_had_saved(rank, folder):
    return plain(CheckpointStore(folder).load())


def one_rank_has_no_space(rank, folder):
    store = CheckpointStore(folder)
    store.save(1, state(), rank_state(rank))
    write = storage_module._HashedFile.write

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 1:
        storage_module._HashedFile.write = full
    failure = failure_of(store.save, 2, state(2), rank_state(rank))
    storage_module._HashedFile.write = write
    dist.barrier()
    left = sorted(os.listdir(folder))
    dist.barrier()
    store.save(3, state(3), rank_state(rank))
    return {"failure": failure, "left": left, "next": plain(store.load())}


def the_last_rename_fails(rank, folder):
    store = CheckpointStore(folder)
    store.save(1, state())

    def broken(step, temporary):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if rank == 0:
        store._publish = broken
    return {"failure": failure_of(store.save, 2, state(2)), "next": plain(store.load())}


def one_rank_has_a_function(rank, folder):
    return failure_of(CheckpointStore(folder).save, 1, state(), {"hook": len} if rank == 1 else {})


def ranks_have_different_tensors(rank, folder):
    return failure_of(CheckpointStore(folder).save, 1, {"x": torch.ones(2 + rank)})


def the_newest_is_damaged(rank, folder):
    store = CheckpointStore(folder)
    store.save(1, state(1), rank_state(rank))
    path = store.save(2, state(2), rank_state(rank))
    dist.barrier()
    if rank == 0:
        os.truncate(path / "__1_0.distcp", 10)
    dist.barrier()
    return {"latest": plain(store.load()), "asked": failure_of(store.load, 2)}


def what_one_rank_needs_is_wrong(rank, folder):
    store = CheckpointStore(folder)
    store.save(1, state(1), rank_state(rank))
    path = store.save(2, state(2), rank_state(rank))
    dist.barrier()
    if rank == 0:
        skeleton = json.loads((path / "state.json").read_text())
        skeleton["ranks"][1] = {"tensor": "no such"}
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["state.json"] = write_file(path / "state.json", json.dumps(skeleton).encode())
        (path / "manifest.json").write_text(json.dumps(manifest))
    dist.barrier()
    return plain(store.load())


def sharded(rank, folder):
    mesh = init_device_mesh("cpu", (RANKS,))
    store = CheckpointStore(folder)
    store.save(1, {"w": distribute_tensor(FULL, mesh, [Shard(0)])})
    return bool((store.load().state["w"] == FULL).all())


SCENES = (
    saved_and_loaded,
    one_process_had_saved,
    one_rank_has_no_space,
    the_last_rename_fails,
    one_rank_has_a_function,
    ranks_have_different_tensors,
    the_newest_is_damaged,
    what_one_rank_needs_is_wrong,
    sharded,
)


def play(rank, folder):
    answers = {scene.__name__: scene(rank, os.path.join(folder, scene.__name__)) for scene in SCENES}
    Path(folder, f"answers-{rank}.json").write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def answers(folder):
    """What every scene gave on every rank: {scene: [rank 0, rank 1]}."""
    CheckpointStore(folder / "one_process_had_saved").save(5, state(5), rank_state(7))
    run_ranks(play, folder)
    ranks = [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(RANKS)]
    return {scene: [answer[scene] for answer in ranks] for scene in ranks[0]}


def expected(step, rank=None, skipped=()):
    own = None if rank is None else {"generator": [rank] * 3, "position": [rank, 10 * rank]}
    progress = {"step": step, "loss": float("inf")}
    return {"step": step, "whole": True, "progress": progress, "rank_state": own, "skipped": list(skipped)}


def test_each_rank_gets_the_common_state_and_its_own(answers):
    assert answers["saved_and_loaded"] == [expected(1, rank=0), expected(1, rank=1)]


def test_tensors_that_ranks_have_in_common_are_written_once_and_spread(answers, folder):
    path = folder / "saved_and_loaded" / "step-00000001"
    files = json.loads((path / "manifest.json").read_text())["files"]
    metadata = read_metadata(path, files)
    assert all(len(entry.chunks) == 1 for entry in metadata.state_dict_metadata.values())
    assert set(metadata.state_dict_metadata) == {"model.a", "model.b", "rank.0.generator", "rank.1.generator"}
    # Two tensors of equal size: one lies in the file of each rank.
    for rank in range(RANKS):
        assert FULL.nbytes < files[f"__{rank}_0.distcp"]["size"] < 1.5 * FULL.nbytes


def test_one_process_loads_what_two_have_saved(answers, folder):
    assert plain(CheckpointStore(folder / "saved_and_loaded").load()) == expected(1, rank=0)


def test_two_processes_load_what_one_has_saved(answers):
    assert answers["one_process_had_saved"] == [expected(5, rank=7), expected(5)]


def test_a_full_disk_on_one_rank_is_raised_on_all(answers):
    for rank, answer in enumerate(answers["one_rank_has_no_space"]):
        kind, message = answer["failure"]
        assert kind == "CheckpointError"
        assert message.startswith("checkpoint at step 2 not saved: rank 1: No space left on device (2 MB needed, ")
        assert answer["left"] == ["step-00000001"]
        assert answer["next"] == expected(3, rank=rank)


def test_a_failure_after_all_have_written_is_raised_on_all(answers):
    for answer in answers["the_last_rename_fails"]:
        assert answer["failure"] == ["CheckpointError", "checkpoint at step 2 not saved: rank 0: Input/output error"]
        assert answer["next"] == expected(1)


def test_a_state_that_one_rank_cannot_save_is_refused_on_all(answers):
    for kind, message in answers["one_rank_has_a_function"]:
        assert kind == "TypeError"
        assert message.startswith("rank.1.hook is a builtin_function_or_method; ")


def test_tensors_that_differ_between_ranks_are_refused(answers):
    for kind, message in answers["ranks_have_different_tensors"]:
        assert kind == "ValueError"
        assert message == (
            "state must have the same tensors on all ranks, but ranks 0 and 1 differ; rank_state is for what differs"
        )


def test_all_ranks_pass_over_the_same_damaged_checkpoint(answers):
    for rank, answer in enumerate(answers["the_newest_is_damaged"]):
        ((kind, message), latest) = answer["asked"], answer["latest"]
        (skipped,) = latest["skipped"]
        assert skipped.startswith("step 2: ")
        assert "__1_0.distcp has 10 bytes instead of " in skipped
        assert latest == expected(1, rank=rank, skipped=[skipped])
        assert kind == "CheckpointError"
        assert "__1_0.distcp has 10 bytes instead of " in message


def test_a_checkpoint_that_one_rank_cannot_use_is_passed_over_by_all(answers):
    first, second = answers["what_one_rank_needs_is_wrong"]
    assert (first["step"], second["step"]) == (1, 1)
    assert first["skipped"] == second["skipped"]
    assert "no such" in first["skipped"][0]


def test_a_sharded_tensor_comes_back_whole(answers, folder):
    assert answers["sharded"] == [True, True]
    assert torch.equal(CheckpointStore(folder / "sharded").load().state["w"], FULL)


def test_damage_found_by_one_process_is_that_of_two(answers, folder):
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp has 10 bytes instead of"):
        CheckpointStore(folder / "the_newest_is_damaged").load(2)
