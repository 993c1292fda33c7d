import hashlib
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from headway.resilience.storage import DurableWriter, NestedPlanner, check_files, read_metadata, write_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def written(tmp_path):
    writer = DurableWriter(tmp_path / "new")
    tensors = {"model.w": torch.arange(6.0), "model.b": torch.zeros(0, 2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    paths = {"model.w": ("model", "w"), "model.b": ("model", "b"), "n": ("n",)}
    dcp.save(tensors, storage_writer=writer, planner=NestedPlanner(paths), no_dist=True)
    return tmp_path / "new", writer


def test_records_are_of_the_files_as_they_lie_on_the_disk(written):
    folder, writer = written
    assert set(writer.records) == {".metadata", "__0_0.distcp"} == {path.name for path in folder.iterdir()}
    for name, record in writer.records.items():
        content = (folder / name).read_bytes()
        assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    check_files(folder, writer.records)


def test_every_file_is_synced_after_its_last_byte(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def spy(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", spy)
    writer = DurableWriter(tmp_path)
    dcp.save({"w": torch.ones(1000)}, storage_writer=writer, planner=NestedPlanner({"w": ("w",)}), no_dist=True)
    assert synced == [writer.records["__0_0.distcp"]["size"], writer.records[".metadata"]["size"]]


def test_metadata_does_not_name_the_folder_that_is_about_to_be_renamed(written):
    folder, _ = written
    assert str(folder).encode() not in (folder / ".metadata").read_bytes()
    assert folder.name.encode() not in (folder / ".metadata").read_bytes()


def test_metadata_of_a_checkpoint_is_let_through(written):
    folder, writer = written
    metadata = read_metadata(folder, writer.records)
    with (folder / ".metadata").open("rb") as file:
        assert metadata == pickle.load(file)


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def metadata(**changes):
    index = MetadataIndex("w", torch.Size([0]))
    parts = {
        "state_dict_metadata": {"w": TensorStorageMetadata(TensorProperties(), torch.Size([1]), [])},
        "storage_data": {index: _StorageInfo("__0_0.distcp", 0, 10)},
        "storage_meta": StorageMeta(),
    }
    return Metadata(**(parts | changes))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda command: command,
        lambda command: metadata(planner_data={"w": command}),
        lambda command: metadata(storage_meta=StorageMeta(modules=[command])),
    ],
    ids=["alone", "among the paths", "deep inside"],
)
def test_a_pickle_that_would_run_a_command_is_refused_unrun(tmp_path, wrap):
    trace = tmp_path / "trace"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(wrap(Command(f"touch '{trace}'"))))
    with pytest.raises(pickle.UnpicklingError, match=r"\.metadata names (posix|nt)\.system"):
        read_metadata(tmp_path, ["__0_0.distcp"])
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch load", "torch.serialization load", "torch os.system", "functools partial"]
)
def test_functions_that_could_run_code_are_refused_by_name(tmp_path, name):
    (tmp_path / ".metadata").write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n(tR.")
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint consists of"):
        read_metadata(tmp_path, [])


def test_objects_other_than_tensors_are_refused(tmp_path):
    # They would be read by torch.load(weights_only=False).
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata(state_dict_metadata={"x": BytesStorageMetadata()})))
    with pytest.raises((pickle.UnpicklingError, ValueError), match=r"BytesStorageMetadata|not a tensor"):
        read_metadata(tmp_path, ["__0_0.distcp"])


@pytest.mark.parametrize("place", ["../other/__0_0.distcp", "/etc/passwd", "__1_0.distcp"])
def test_tensors_outside_of_the_checkpoint_are_refused(tmp_path, place):
    changed = metadata(storage_data={MetadataIndex("w"): _StorageInfo(place, 0, 10)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(changed))
    with pytest.raises(ValueError, match="outside of the checkpoint's own files"):
        read_metadata(tmp_path, ["__0_0.distcp"])


def test_something_other_than_metadata_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(["not", "metadata"]))
    with pytest.raises(ValueError, match="does not hold a checkpoint's metadata"):
        read_metadata(tmp_path, [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "^x is missing$"),
        (lambda path: path.write_bytes(b"12"), "^x has 2 bytes instead of 3$"),
        (lambda path: path.write_bytes(b"124"), "^x is damaged: its sha256 is not that of the manifest$"),
    ],
)
def test_a_file_that_is_not_as_recorded_is_named(tmp_path, damage, message):
    records = {"x": write_file(tmp_path / "x", b"123")}
    check_files(tmp_path, records)
    damage(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        check_files(tmp_path, records)


def test_a_record_cannot_point_outside_of_the_folder(tmp_path):
    record = write_file(tmp_path / "secret", b"123")
    (tmp_path / "inner").mkdir()
    with pytest.raises(ValueError, match="is missing"):
        check_files(tmp_path / "inner", {"../secret": record})
