import ctypes
import errno
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import struct
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from headway.resilience import CheckpointError, CheckpointStore
from headway.resilience import storage as storage_module

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
)


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(restored, saved):
    """Equal in type, structure and every bit."""
    if isinstance(saved, torch.Tensor):
        assert isinstance(restored, torch.Tensor)
        assert (restored.dtype, restored.shape) == (saved.dtype, saved.shape)
        assert raw_bytes(restored) == raw_bytes(saved)
        return
    assert type(restored) is type(saved)
    if isinstance(saved, dict):
        assert [(type(key), key) for key in restored] == [(type(key), key) for key in saved]
        for key, value in saved.items():
            assert_same(restored[key], value)
    elif isinstance(saved, list | tuple):
        assert len(restored) == len(saved)
        for one, other in zip(restored, saved, strict=True):
            assert_same(one, other)
    elif isinstance(saved, float):
        assert struct.pack("<d", restored) == struct.pack("<d", saved)
    else:
        assert restored == saved


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.empty(shape, dtype=dtype).nbytes
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    content = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        content = bytearray(byte % 2 for byte in content)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


# Few letters, so that joined names often coincide.
KEYS = st.text("ab.~0", max_size=3) | st.integers(-1, 2)
LEAVES = tensors() | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state=st.dictionaries(KEYS, NESTED, max_size=4), rank_state=NESTED)
def test_any_nested_state_comes_back_bit_for_bit(state, rank_state):
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(folder)
        store.save(7, state, rank_state)
        restored = store.load()
    assert (restored.step, restored.skipped) == (7, [])
    assert_same(restored.state, state)
    assert_same(restored.rank_state, rank_state)


def test_a_training_run_continues_as_if_it_had_not_stopped(tmp_path):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        return model, optimizer, schedule

    def train(model, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
            schedule.step()

    parts = build()
    train(*parts, 3)
    store = CheckpointStore(tmp_path)
    names = ("model", "optimizer", "schedule")
    state = {name: part.state_dict() for name, part in zip(names, parts, strict=True)}
    store.save(3, {**state, "rng": torch.get_rng_state()})
    train(*parts, 3)

    resumed = build()
    restored = store.load("latest").state
    for name, part in zip(names, resumed, strict=True):
        part.load_state_dict(restored[name])
    torch.set_rng_state(restored["rng"])
    train(*resumed, 3)
    for one, other in zip(parts, resumed, strict=True):
        assert_same(dict(other.state_dict()), dict(one.state_dict()))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.ones(1).expand(3, 2),
        torch.arange(12.0)[3::4],
        torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.view_as_complex(torch.ones(2, 2)).conj(),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=["transposed", "expanded", "strided", "channels last", "conjugated", "parameter"],
)
def test_a_view_comes_back_as_the_values_it_shows(tmp_path, tensor):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": tensor})
    restored = store.load().state["x"]
    assert type(restored) is torch.Tensor
    assert not restored.requires_grad
    torch.testing.assert_close(restored, tensor.detach().resolve_conj(), rtol=0, atol=0)


def test_tied_tensors_come_back_under_both_names(tmp_path):
    embedding = torch.nn.Embedding(4, 3)
    head = torch.nn.Linear(3, 4, bias=False)
    head.weight = embedding.weight
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": torch.nn.ModuleDict({"embedding": embedding, "head": head}).state_dict()})
    model = store.load().state["model"]
    torch.testing.assert_close(model["embedding.weight"], embedding.weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(model["head.weight"], embedding.weight.detach(), rtol=0, atol=0)


def test_the_step_before_the_first_and_an_empty_state_can_be_saved(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.save(0, {}) == tmp_path / "step-00000000"
    assert (store.load().step, store.load().state) == (0, {})


def test_plain_pytorch_loads_the_model_by_its_names(tmp_path):
    model, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    path = CheckpointStore(tmp_path).save(1, {"model": model.state_dict(), "progress": {"loss": 1.0}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": fresh.state_dict()}, checkpoint_id=path, no_dist=True)
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


def test_pytorchs_converter_gives_a_nested_torch_save_file(tmp_path):
    model = torch.nn.Linear(3, 2)
    moments = [{"exp_avg": torch.ones(2)}, torch.zeros(3)]
    path = CheckpointStore(tmp_path).save(1, {"model": model.state_dict(), "moments": moments, "lr": 0.1})
    dcp_to_torch_save(path, tmp_path / "plain.pt")
    assert_same(
        torch.load(tmp_path / "plain.pt", weights_only=True), {"model": dict(model.state_dict()), "moments": moments}
    )


def test_saving_and_loading_in_one_process_is_silent(tmp_path, capfd, caplog):
    store = CheckpointStore(tmp_path)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        store.save(1, {"w": torch.ones(2)})
        store.save(2, {"w": torch.ones(2)})
        shutil.rmtree(tmp_path / "step-00000002")
        store.load()
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


# Which checkpoints stay.


def test_the_newest_checkpoints_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 10, 15):
        store.save(step, {"x": step})
    assert store.steps() == [10, 15]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_the_checkpoint_just_saved_stays_even_if_later_steps_are_there(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30):
        store.save(step, {"x": step})
    assert store.load(10).step == 10
    store.save(11, {"x": 11})
    assert store.steps() == [10, 11, 30]
    store.save(12, {"x": 12})
    assert store.steps() == [10, 11, 12]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": "first"})
    store.save(1, {"x": "second"})
    assert store.load().state == {"x": "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_dead_processes_left_goes_at_the_next_save_and_is_never_read(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"x": 1})
    shutil.copytree(path, tmp_path / ".step-00000002.tmp-0123abcd")
    shutil.copytree(path, tmp_path / ".step-00000000.tmp-removed-0123abcd")
    (tmp_path / "notes.txt").write_text("not ours")
    assert store.steps() == [1]
    assert store.load().step == 1
    store.save(3, {"x": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000001", "step-00000003"]


def test_a_replacement_cut_short_leaves_the_replaced_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": "old"}).rename(tmp_path / ".step-00000001.old")
    assert store.load().state == {"x": "old"}
    store.save(2, {"x": "next"})
    assert store.steps() == [1, 2]
    assert store.load(1).state == {"x": "old"}


# Damage.


def remove_data(path):
    (path / "__0_0.distcp").unlink()


def truncate_data(path):
    os.truncate(path / "__0_0.distcp", 100)


def flip_a_bit(path):
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)


def remove_manifest(path):
    (path / "manifest.json").unlink()


def cut_manifest(path):
    os.truncate(path / "manifest.json", 20)


def take_another_steps_files(path):
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-00000001", path)


def use_a_later_format(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


DAMAGE = {
    remove_data: "__0_0.distcp is missing",
    truncate_data: "__0_0.distcp has 100 bytes instead of {size}",
    flip_a_bit: "__0_0.distcp is damaged: its sha256 is not that of the manifest",
    remove_manifest: "manifest.json is missing",
    cut_manifest: "manifest.json is damaged",
    take_another_steps_files: "its manifest is that of step 1",
    use_a_later_format: "it is written in format 2, and this version of headway reads format 1",
    empty_folder: "manifest.json is missing",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    store.save(1, {"w": torch.ones(50)})
    path = store.save(2, {"w": torch.zeros(50)})
    reason = DAMAGE[damage].format(size=(path / "__0_0.distcp").stat().st_size)
    damage(path)
    restored = store.load()
    assert restored.step == 1
    assert_same(restored.state, {"w": torch.ones(50)})
    assert restored.skipped == [f"step 2: {reason}"]
    with pytest.raises(CheckpointError) as refusal:
        store.load(step=2)
    assert str(refusal.value) == f"checkpoint at step 2 cannot be read: {reason}"


def test_no_usable_checkpoint_is_one_line_with_every_reason(tmp_path):
    store = CheckpointStore(tmp_path)
    remove_data(store.save(1, {"w": torch.ones(2)}))
    remove_manifest(store.save(2, {"w": torch.ones(2)}))
    with pytest.raises(CheckpointError) as refusal:
        store.load()
    assert str(refusal.value) == (
        f"no usable checkpoint in {tmp_path}: step 2: manifest.json is missing; step 1: __0_0.distcp is missing"
    )


def test_a_folder_without_checkpoints_says_so(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert store.steps() == []
    with pytest.raises(CheckpointError, match=r"^no usable checkpoint in .*none$"):
        store.load()
    with pytest.raises(CheckpointError, match=r"^no checkpoint at step 5 in .*none \(there are none\)$"):
        store.load(5)
    assert not (tmp_path / "none").exists()


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(10, {})
    store.save(20, {})
    with pytest.raises(CheckpointError, match=r"^no checkpoint at step 15 in .* \(there are 10, 20\)$"):
        store.load(15)


def reseal(path):
    """Make the manifest agree with the files as they are now."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        (path / name).unlink()
        manifest["files"][name] = storage_module.write_file(path / name, content)
    (path / "manifest.json").write_text(json.dumps(manifest))


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_command_in_the_metadata_is_not_run_even_if_the_checksums_agree(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"w": torch.ones(2)})
    trace = tmp_path / "trace"
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data["w"] = Command(f"touch '{trace}'")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    with pytest.raises(CheckpointError, match=r"^checkpoint at step 1 cannot be read: UnpicklingError: .*system"):
        store.load(1)
    assert not trace.exists()


@pytest.mark.parametrize(
    "skeleton",
    [
        {"state": {"dict": {"w": {"tensor": "no such"}}}, "ranks": [None]},
        {"state": {"dict": {"w": {"pickle": "w"}}}, "ranks": [None]},
        {"ranks": []},
        [],
    ],
)
def test_a_skeleton_that_does_not_fit_is_refused_in_one_line(tmp_path, skeleton):
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"w": torch.ones(2)})
    (path / "state.json").write_text(json.dumps(skeleton))
    reseal(path)
    with pytest.raises(CheckpointError, match=r"^checkpoint at step 1 cannot be read: [^\n]+$"):
        store.load(1)


# Saving that fails.


@pytest.fixture
def full_disk(tmp_path):
    """A real file system of three megabytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    if not hasattr(libc, "mount") or libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=3m") != 0:
        pytest.skip(f"no file system may be mounted here: {os.strerror(ctypes.get_errno())}")
    yield place
    libc.umount2(bytes(place), 2)  # MNT_DETACH: a test that failed may still hold a file.


BIG = {"w": torch.zeros(7_000_000)}  # 28 MB


def assert_only_first_is_there(store):
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    restored = store.load()
    assert (restored.step, restored.state, restored.skipped) == (1, {"x": "first"}, [])


def test_a_disk_without_room_is_noticed_before_writing(full_disk, monkeypatch):
    store = CheckpointStore(full_disk)
    store.save(1, {"x": "first"})
    monkeypatch.setattr(dcp, "save", lambda *args, **kwargs: pytest.fail("writing began"))
    with pytest.raises(CheckpointError) as failure:
        store.save(100, BIG)
    assert str(failure.value) == (
        f"checkpoint at step 100 not saved: No space left on device (30 MB needed, 3 MB free in {full_disk})"
    )
    assert_only_first_is_there(store)


def test_a_disk_that_fills_up_while_writing_leaves_the_older_checkpoints(full_disk, monkeypatch):
    store = CheckpointStore(full_disk)
    store.save(1, {"x": "first"})
    free = shutil.disk_usage(full_disk).free
    usage = shutil.disk_usage
    promised = iter([10**9])
    # Only the question before the save gets a wrong answer, as if another process had filled the disk since.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=next(promised, free)))
    with pytest.raises(CheckpointError) as failure:
        store.save(100, BIG)
    assert str(failure.value) == (
        f"checkpoint at step 100 not saved: No space left on device (30 MB needed, 3 MB free in {full_disk})"
    )
    assert_only_first_is_there(store)


def test_no_space_at_any_write_is_one_error_that_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    disk = SimpleNamespace(writes=0, allowed=math.inf)

    class Limited(io.BufferedWriter):
        def write(self, data, /):
            disk.writes += 1
            if disk.writes > disk.allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    class LimitedFile(storage_module._HashedFile, Limited):
        pass

    monkeypatch.setattr(storage_module, "_HashedFile", LimitedFile)
    CheckpointStore(tmp_path / "unlimited").save(100, {"w": torch.ones(5)})
    of_one_save = disk.writes
    store = CheckpointStore(tmp_path / "limited")
    store.save(1, {"x": "first"})
    message = r"^checkpoint at step 100 not saved: No space left on device \(2 MB needed, \d+ MB free in .*limited\)$"
    for allowed in range(of_one_save):
        disk.writes, disk.allowed = 0, allowed
        with pytest.raises(CheckpointError, match=message):
            store.save(100, {"w": torch.ones(5)})
        assert_only_first_is_there(store)
    disk.allowed = math.inf
    store.save(100, {"w": torch.ones(5)})
    assert store.steps() == [1, 100]


def test_the_room_asked_for_covers_what_many_small_tensors_take(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    state = {f"parameters.{index}.name_of_usual_length": {"step": torch.tensor(float(index))} for index in range(1000)}
    path = store.save(1, state)
    written = sum(file.stat().st_size for file in path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError) as failure:
        store.save(2, state)
    needed = int(re.search(r"\((\d+) MB needed", str(failure.value))[1]) * 1_000_000
    assert written <= needed < 3 * written


def test_other_failures_of_the_disk_are_named_too(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": "first"})

    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(CheckpointError, match=r"^checkpoint at step 100 not saved: Input/output error$"):
            store.save(100, {"w": torch.ones(5)})
    assert_only_first_is_there(store)


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"^checkpoint at step 1 not saved: (Not a directory|File exists): "):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, {})


def test_a_failed_last_rename_leaves_the_checkpoint_it_was_to_replace(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": "first"})
    rename = Path.rename

    def limited(path, target):
        if ".tmp-" in path.name and not target.name.startswith("."):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", limited)
        with pytest.raises(CheckpointError, match="Input/output error"):
            store.save(1, {"x": "second"})
    assert_only_first_is_there(store)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"x": 1})
    rename = Path.rename

    def limited(path, target):
        if "removed" in target.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", limited)
        store.save(2, {"x": 2})
    assert store.steps() == [1, 2]
    store.save(3, {"x": 3})
    assert store.steps() == [3]


def test_an_interruption_while_writing_stays_an_interruption(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": "first"})

    def interrupted(file, data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage_module._HashedFile, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save(2, {"w": torch.ones(5)})
    assert_only_first_is_there(store)


def test_a_state_that_cannot_be_saved_names_the_path_and_leaves_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": "first"})
    with pytest.raises(TypeError, match=r"^optimizer\.param_groups\[0\]\.alpha is a builtin_function_or_method; "):
        store.save(2, {"optimizer": {"param_groups": [{"alpha": len}]}})
    with pytest.raises(TypeError, match=r"^rank\.0\.sampler is a "):
        store.save(2, {}, rank_state={"sampler": object()})
    assert_only_first_is_there(store)


@pytest.mark.parametrize("key", ["rank", "rank.0"])
def test_the_key_rank_is_taken(tmp_path, key):
    with pytest.raises(ValueError, match='state must not have the key "rank"'):
        CheckpointStore(tmp_path).save(1, {key: 1})


def test_arguments_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^keep must be a whole number >= 1, got 0$"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(ValueError, match=r"^step must be a whole number >= 0, got -1$"):
        CheckpointStore(tmp_path).save(-1, {})
    with pytest.raises(ValueError, match=r"^step must be a whole number >= 0, got 'last'$"):
        CheckpointStore(tmp_path).load("last")
    with pytest.raises(TypeError, match=r"^state must be a mapping, got list$"):
        CheckpointStore(tmp_path).save(1, [])
