"""The file layer below a checkpoint: what it adds to the file storage of `torch.distributed.checkpoint`.

Writing: each file is hashed while it is written (no second pass over the data) and is on the disk
when it is closed. Reading: the metadata, a pickle, may name the few classes that it consists of and
nothing else, so a checkpoint from anywhere can be opened without running code from it.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.serialization import _get_layout

__all__ = [
    "METADATA_FILE",
    "CheckedReader",
    "DurableWriter",
    "FileRecord",
    "NestedPlanner",
    "check_files",
    "read_metadata",
    "sync_folder",
    "write_file",
]

METADATA_FILE = ".metadata"


class FileRecord(TypedDict):
    """What the manifest says of one file."""

    size: int
    sha256: str


class _HashedFile(io.BufferedWriter):
    """A file opened for writing that hashes what passes through and is synced before it closes."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"), buffer_size=1 << 20)
        self._hash = hashlib.sha256()
        self._size = 0
        self.failure: BaseException | None = None

    def write(self, data: Any, /) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        try:
            return super().write(data)
        except BaseException as failure:
            self.failure = failure
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        finally:
            super().close()

    @property
    def record(self) -> FileRecord:
        return {"size": self._size, "sha256": self._hash.hexdigest()}


class _DurableFiles(FileSystem):
    """The file operations of a writer, with a record of every file written."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _HashedFile(Path(path)) as hashed:
            try:
                yield hashed
            except RuntimeError:
                # torch.save closes its archive when a write fails, trips over the gap, and reports that instead.
                if hashed.failure is not None:
                    raise hashed.failure from None
                raise
        self.records[Path(path).name] = hashed.record

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class DurableWriter(FileSystemWriter):
    """Writes one file per rank into `folder`; `records` then has the size and hash of this rank's files."""

    def __init__(self, folder: Path) -> None:
        # Not sync_files: it syncs the metadata file before the tail of Python's buffer has reached it.
        super().__init__(folder, single_file_per_rank=True, sync_files=False)
        self.fs: _DurableFiles = _DurableFiles()

    def storage_meta(self) -> dcp.StorageMeta:
        """Without the folder, which is about to be renamed."""
        return dcp.StorageMeta(save_id=self.save_id)

    @property
    def records(self) -> Mapping[str, FileRecord]:
        """Name, size and hash of every file written by this rank."""
        return self.fs.records


class NestedPlanner(DefaultSavePlanner):
    """Notes beside each tensor's name its path in the nested state.

    From these `format_utils.dcp_to_torch_save` rebuilds the nesting.
    """

    def __init__(self, paths: Mapping[str, tuple[str | int, ...]]) -> None:
        super().__init__()
        self._paths = dict(paths)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: dcp.StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """As the default planner, but with the paths given."""
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.mappings = self._paths


class CheckedReader(FileSystemReader):
    """Reads tensors from `folder` by `metadata` that `read_metadata` has let through."""

    def __init__(self, folder: Path, metadata: dcp.Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """The metadata given, without opening the file again."""
        return self._metadata


_ALLOWED = {
    f"{known.__module__}.{known.__qualname__}": known
    for known in (
        dcp.ChunkStorageMetadata,
        dcp.Metadata,
        dcp.MetadataIndex,
        dcp.StorageMeta,
        dcp.TensorProperties,
        dcp.TensorStorageMetadata,
        dcp._MEM_FORMAT_ENCODING,
        _StorageInfo,
        _get_layout,
        torch.Size,
    )
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _ALLOWED.get(f"{module}.{name}")
        if known is not None:
            return known
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{METADATA_FILE} names {module}.{name}, which no checkpoint consists of")


def read_metadata(folder: Path, files: Collection[str]) -> dcp.Metadata:
    """The metadata of the checkpoint in `folder`; only tensors, and only in `files`.

    Raises:
        pickle.UnpicklingError: the pickle names anything but the classes of a metadata of tensors.
        ValueError: it describes something other than tensors in `files`.
    """
    with (folder / METADATA_FILE).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, dcp.Metadata):
        raise ValueError(f"{METADATA_FILE} does not hold a checkpoint's metadata")
    # So neither DCP nor `torch.load` ever meets an object other than a tensor, which it would unpickle unchecked.
    if not all(isinstance(entry, dcp.TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
        raise ValueError(f"{METADATA_FILE} describes something that is not a tensor")
    for index, place in metadata.storage_data.items():
        if place.relative_path not in files or place.transform_descriptors:
            raise ValueError(f"{METADATA_FILE} places {index.fqn!r} outside of the checkpoint's own files")
    return metadata


def write_file(path: Path, content: bytes) -> FileRecord:
    """Write and sync one file."""
    with _HashedFile(path) as file:
        file.write(content)
    return file.record


def check_files(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise `ValueError` for the first of `files` that is missing or not what its record says."""
    buffer = memoryview(bytearray(1 << 20))
    for name, record in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{name} is missing")
        if (size := path.stat().st_size) != record["size"]:
            raise ValueError(f"{name} has {size} bytes instead of {record['size']}")
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        if digest.hexdigest() != record["sha256"]:
            raise ValueError(f"{name} is damaged: its sha256 is not that of the manifest")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
