"""A folder of checkpoints that survives crashes, full disks and damaged files.

A checkpoint is a folder `step-00000100` in PyTorch's own distributed-checkpoint format (`.metadata`
and one `__<rank>_0.distcp` per rank), so `torch.distributed.checkpoint.load` and `format_utils` read
its tensors and other numbers of processes can load it. Beside them lie `state.json`, with everything
that is not a tensor, and `manifest.json`, with the size and SHA-256 of every other file.

    write to .step-00000100.tmp-*  ->  manifest  ->  rename to step-00000100  ->  remove what is beyond `keep`

Every file is on the disk before the rename, and the rename is one operation: a folder that is named
`step-*` is complete. What a crash leaves has a name that begins with a dot, and goes at the next save.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _DistWrapper

from headway.constraints import Constraint, Range, check_arguments
from headway.resilience.state import Flat, flatten, unflatten
from headway.resilience.storage import (
    METADATA_FILE,
    CheckedReader,
    DurableWriter,
    FileRecord,
    NestedPlanner,
    check_files,
    read_metadata,
    sync_folder,
    write_file,
)

__all__ = ["CheckpointError", "CheckpointStore", "Restored"]

FORMAT = 1
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
# What the file format adds to a tensor's own bytes, rounded up, and to a checkpoint as a whole.
BYTES_PER_TENSOR = 2048
BYTES_PER_CHECKPOINT = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, or none could be read; one line says why."""


@dataclass(frozen=True)
class Restored:
    """What `CheckpointStore.load` returns.

    `skipped` has one line for each newer checkpoint that could not be used. `rank_state` is this
    rank's own part, or None where there is none.
    """

    step: int
    state: dict[Any, Any]
    skipped: list[str]
    rank_state: Any = None


class CheckpointStore:
    """The checkpoints of one run, in one folder; any number of processes may read while the run writes.

    Where `torch.distributed` is initialised, `save` and `load` are collective: every rank calls
    them, what is the same on all ranks is written once (spread over them), and if one rank fails all raise.

    Args:
        folder: where the checkpoints lie, on a disk that all ranks share; created by the first save.
        keep: how many checkpoints stay, >= 1. Default 3: if the newest is damaged, two are behind it.
        process_group: the ranks that save and load together. Default: all.

    Raises:
        ValueError: `keep` is not a whole number >= 1.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = CheckpointStore(folder.name, keep=2)
    >>> model = torch.nn.Linear(2, 1)
    >>> for step in (10, 20, 30):
    ...     path = store.save(step, {"model": model.state_dict(), "progress": {"best_loss": float("inf")}})
    >>> path.name, store.steps()
    ('step-00000030', [20, 30])
    >>> restored = store.load()
    >>> restored.step, restored.state["progress"], restored.skipped
    (30, {'best_loss': inf}, [])
    >>> _ = model.load_state_dict(restored.state["model"])

    A damaged checkpoint is passed over:

    >>> _ = (path / "state.json").write_text("{}")
    >>> store.load().skipped
    ['step 30: state.json has 2 bytes instead of 199']
    >>> store.load(step=30)
    Traceback (most recent call last):
    ...
    headway.resilience.checkpoint.CheckpointError: checkpoint at step 30 cannot be read: state.json has 2 bytes \
instead of 199
    >>> folder.cleanup()
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "keep": Range(low=1, integer=True),
        "step": Range(low=0, integer=True),
    }

    def __init__(
        self, folder: str | os.PathLike[str], keep: int = 3, process_group: dist.ProcessGroup | None = None
    ) -> None:
        check_arguments(self.constraints, keep=keep)
        self.folder = Path(folder)
        self.keep = keep
        self.process_group = process_group

    def steps(self) -> list[int]:
        """The steps that there is a checkpoint of, ascending."""
        return sorted(self._checkpoints())

    def save(self, step: int, state: Mapping[Any, Any], rank_state: Any = None) -> Path:
        """Write a checkpoint and remove the oldest beyond `keep`.

        A checkpoint of the same step is replaced. Where checkpoints of later steps exist (the run was
        taken back to an earlier one), they are the first to go beyond `keep`.

        Args:
            step: optimizer steps done, >= 0.
            state: nested dicts, lists and tuples of tensors, str, int, float, bool and None, with str or int
                keys; its tensors must be the same on all ranks, and of the rest rank 0's is saved. The key
                "rank" is taken. Values only: tensors come back on the CPU, without `requires_grad`, and a `DTensor`,
                written in the shards that the ranks hold, comes back whole.
            rank_state: what differs between ranks, such as the state of random generators; of the same form.

        Returns:
            The folder written.

        Raises:
            TypeError: the state holds something else; the message names its path.
            ValueError: `step` is out of range, or `state` has the key "rank".
            CheckpointError: the disk is full or writing failed; the checkpoints before are as they were.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     CheckpointStore(folder).save(100, {"schedule": {"lr_lambda": print}})
        Traceback (most recent call last):
        ...
        TypeError: schedule.lr_lambda is a builtin_function_or_method; a checkpoint holds tensors, str, int, \
float, bool, None, and dicts, lists and tuples of them
        """
        check_arguments(self.constraints, step=step)
        exchange = self._exchange()
        shared, own = Flat(), Flat()
        needed = 0

        def describe() -> _Share:
            nonlocal shared, own
            if not isinstance(state, Mapping):
                raise TypeError(f"state must be a mapping, got {type(state).__name__}")
            if any(str(key).split(".")[0] == "rank" for key in state):
                raise ValueError('state must not have the key "rank": it is where rank_state is saved')
            shared = flatten(state)
            own = flatten(rank_state, root=("rank", str(exchange.rank)))
            return _Share(own.skeleton, _form(shared), _size(shared), _size(own))

        def prepare(shares: Sequence[_Share]) -> tuple[Path, int, list[Any]]:
            for rank, share in enumerate(shares):
                if share.form != shares[0].form:
                    raise ValueError(
                        f"state must have the same tensors on all ranks, but ranks 0 and {rank} differ; "
                        "rank_state is for what differs"
                    )
            size = BYTES_PER_CHECKPOINT + shares[0].shared + sum(share.own for share in shares)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            if shutil.disk_usage(self.folder).free < size:
                raise CheckpointError(self._unsaved(step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), size))
            temporary = self.folder / f".step-{step:08d}.tmp-{uuid.uuid4().hex[:8]}"
            temporary.mkdir()
            return temporary, size, [share.skeleton for share in shares]

        def commit(records: Sequence[Mapping[str, FileRecord]]) -> Path:
            files: dict[str, FileRecord] = {}
            for of_rank in records:
                files |= of_rank
            skeleton = {"state": shared.skeleton, "ranks": rank_skeletons}
            files[STATE_FILE] = write_file(temporary / STATE_FILE, _to_json(skeleton))
            manifest = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": files}
            write_file(temporary / MANIFEST_FILE, _to_json(manifest, indent=1))
            sync_folder(temporary)
            target = self._publish(step, temporary)
            self._prune(step)
            return target

        try:
            temporary, needed, rank_skeletons = exchange.all_reduce("describe", describe, prepare)
            writer = DurableWriter(temporary)
            with _quiet():
                dcp.save(
                    {**shared.tensors, **own.tensors},
                    storage_writer=writer,
                    planner=NestedPlanner(shared.paths | own.paths),
                    process_group=self.process_group,
                    no_dist=not exchange.use_dist,
                )
            return exchange.all_reduce("commit", lambda: dict(writer.records), commit)
        except BaseException as failure:
            if exchange.is_coordinator:
                self._sweep()
            if not isinstance(failure, CheckpointException):
                raise
            rank, cause = _cause(failure)
            refused = needed == 0 and isinstance(cause, TypeError | ValueError)
            if refused or isinstance(cause, CheckpointError) or not isinstance(cause, Exception):
                raise cause from None
            where = f"rank {rank}: " if exchange.use_dist else ""
            raise CheckpointError(self._unsaved(step, cause, needed, where)) from cause

    def load(self, step: int | Literal["latest"] | None = None) -> Restored:
        """Read a checkpoint: by default the latest that is whole.

        The number of ranks may differ from the one it was saved with.

        Args:
            step: the step wanted. Default, and "latest": the highest step whose files are all as they
                were written; those passed over are in `skipped`.

        Raises:
            ValueError: `step` is out of range.
            CheckpointError: no checkpoint can be used, or the one asked for cannot.
        """
        step = None if step == "latest" else step
        check_arguments(self.constraints, **({} if step is None else {"step": step}))
        exchange = self._exchange()
        try:
            found: dict[int, Path] = exchange.broadcast("list", self._checkpoints)
        except CheckpointException as failure:
            raise CheckpointError(f"{self.folder} cannot be read: {_one_line(_cause(failure)[1])}") from None
        if step is not None:
            if step not in found:
                there = f"there are {', '.join(map(str, sorted(found)))}" if found else "there are none"
                raise CheckpointError(f"no checkpoint at step {step} in {self.folder} ({there})")
            outcome = self._restore(exchange, step, found[step])
            if isinstance(outcome, str):
                raise CheckpointError(f"checkpoint at step {step} cannot be read: {outcome}")
            return outcome
        skipped: list[str] = []
        for candidate in sorted(found, reverse=True):
            outcome = self._restore(exchange, candidate, found[candidate])
            if not isinstance(outcome, str):
                return replace(outcome, skipped=skipped)
            skipped.append(f"step {candidate}: {outcome}")
        raise CheckpointError(f"no usable checkpoint in {self.folder}" + (f": {'; '.join(skipped)}" if skipped else ""))

    def _restore(self, exchange: _DistWrapper, step: int, path: Path) -> Restored | str:
        """The checkpoint in `path`, or why it cannot be read: the same on all ranks."""
        tensors: dict[str, torch.Tensor] = {}
        state: Any = None
        rank_state: Any = None

        def allocate(name: str) -> torch.Tensor:
            entry = cast(TensorStorageMetadata, metadata.state_dict_metadata[name])
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            return tensors[name]

        def rebuild() -> None:
            nonlocal state, rank_state
            state = unflatten(skeleton["state"], allocate)
            if exchange.rank < len(skeleton["ranks"]):
                rank_state = unflatten(skeleton["ranks"][exchange.rank], allocate)

        try:
            skeleton, metadata = exchange.broadcast("check", lambda: _examine(path, step))
            exchange.all_gather("rebuild", rebuild)
            with _quiet():
                dcp.load(
                    tensors,
                    storage_reader=CheckedReader(path, metadata),
                    planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
                    process_group=self.process_group,
                    no_dist=not exchange.use_dist,
                )
        except CheckpointException as failure:
            _, cause = _cause(failure)
            if isinstance(cause, Exception):
                return _one_line(cause)
            raise cause from None
        return Restored(step, state, [], rank_state)

    def _exchange(self) -> _DistWrapper:
        # The exchange that DCP's own save and load are built on: a failure of one rank is raised on all.
        return _DistWrapper(self.process_group, dist.is_available() and dist.is_initialized(), coordinator_rank=0)

    def _checkpoints(self) -> dict[int, Path]:
        # `.old` is a checkpoint that was being replaced when the process died: it counts if the new one is not there.
        found: dict[int, Path] = {}
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if match := re.fullmatch(r"\.step-(\d{8,})\.old|step-(\d{8,})", path.name):
                    found[int(match[1] or match[2])] = path
        return found

    def _publish(self, step: int, temporary: Path) -> Path:
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            target.rename(self.folder / f".step-{step:08d}.old")
        temporary.rename(target)
        sync_folder(self.folder)
        return target

    def _prune(self, saved: int) -> None:
        # The new checkpoint is safe by now: what cannot be removed is no failure, and the next save tries again.
        with contextlib.suppress(OSError):
            newest_first = sorted(self._checkpoints().items(), key=lambda item: (item[0] > saved, -item[0]))
            for step, path in newest_first[self.keep :]:
                # Out of sight in one operation, so that dying while removing leaves nothing that looks complete.
                path.rename(self.folder / f".step-{step:08d}.tmp-removed-{uuid.uuid4().hex[:8]}")
            self._sweep()

    def _sweep(self) -> None:
        """Remove what interrupted saves and removals left; put a half-replaced checkpoint back."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(".step-*"):
                target = self.folder / path.name[1:].removesuffix(".old")
                if path.name.endswith(".old") and not target.exists():
                    path.rename(target)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    def _unsaved(self, step: int, cause: BaseException, needed: int, where: str = "") -> str:
        text = f"checkpoint at step {step} not saved: {where}{_one_line(cause)}"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.folder).free
            text += f" ({math.ceil(needed / 1e6)} MB needed, {math.floor(free / 1e6)} MB free in {self.folder})"
        return text


@dataclass(frozen=True)
class _Share:
    """What each rank tells the first one before a save."""

    skeleton: Any
    form: str
    shared: int
    own: int


def _form(flat: Flat) -> str:
    listing = sorted((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in flat.tensors.items())
    return hashlib.sha256(repr(listing).encode()).hexdigest()


def _size(flat: Flat) -> int:
    return sum(tensor.nbytes + BYTES_PER_TENSOR for tensor in flat.tensors.values()) + len(_to_json(flat.skeleton))


def _to_json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, allow_nan=False, indent=indent).encode()


def _examine(path: Path, step: int) -> tuple[dict[str, Any], Metadata]:
    """The skeleton and the metadata of the checkpoint in `path`, after its files were compared with the manifest."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
        written, of_step, files = manifest["format"], manifest["step"], manifest["files"]
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_FILE} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST_FILE} is damaged") from None
    if written != FORMAT:
        raise ValueError(f"it is written in format {written}, and this version of headway reads format {FORMAT}")
    if of_step != step:
        raise ValueError(f"its manifest is that of step {of_step}")
    for name in (METADATA_FILE, STATE_FILE):
        if name not in files:
            raise ValueError(f"{MANIFEST_FILE} does not list {name}")
    check_files(path, files)
    return json.loads((path / STATE_FILE).read_bytes()), read_metadata(path, files)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Said on every save and load in a single process, even when asked for by no_dist=True.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(failure: CheckpointException) -> tuple[int, BaseException]:
    """The lowest rank that failed and its exception; but an interruption (Ctrl-C) goes before any error."""
    causes = [(rank, cause) for rank, (cause, _) in sorted(failure.failures.items())]
    return next((pair for pair in causes if not isinstance(pair[1], Exception)), causes[0])


def _one_line(cause: BaseException) -> str:
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}: {cause.filename}" if cause.filename else cause.strerror
    text = str(cause).strip().split("\n")[0]
    return text if isinstance(cause, ValueError) and text else f"{type(cause).__name__}: {text}"
