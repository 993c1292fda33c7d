"""The folder of one run and what is written into it while it trains."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from headway.config import Config, ConfigError, load
from headway.train import TrainError

__all__ = ["MetricsLog", "RunFolder"]


class RunFolder:
    """The files of a run: `config.toml`, `environment.json`, `metrics.jsonl`, `samples.jsonl`,
    `checkpoints/`, `tensorboard/`, `model/` (and `models/`, kept before the end), `report.html`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.environment_file = self.path / "environment.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"

    @classmethod
    def create(cls, path: str | Path | None, config: Config) -> RunFolder:
        """Make the folder (by default `runs/<date>-<time>`) and write the resolved configuration.

        Raises:
            TrainError: the folder exists and is not empty, or cannot be written.
        """
        try:
            if path is None:
                folder = _unused(Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
            else:
                folder = Path(path)
                if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                    raise TrainError(f"run folder must be new or empty, got {str(path)!r} (to go on: --resume {path})")
                folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder)
            run.config_file.write_text(config.to_toml(), encoding="utf-8")
        except OSError as error:
            raise TrainError(f"cannot write run folder {str(path or 'runs')!r}: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunFolder, Config]:
        """An existing run and its configuration.

        Raises:
            TrainError: there is no run in this folder, or its configuration cannot be used.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise TrainError(f"no run in {str(path)!r}: it has no config.toml")
        try:
            return run, load(run.config_file)
        except ConfigError as error:
            raise TrainError(f"{run.config_file}: {error}") from error

    @property
    def complete(self) -> bool:
        """Whether the run has written its model."""
        return (self.model / "config.json").is_file()

    def published(self, step: int) -> Path:
        """The folder of a model that was kept at a step before the run's end."""
        return self.path / "models" / f"step-{step:06d}"

    def keep_model(self) -> None:
        """Move the final model of a run that goes on to where those kept before the end are."""
        from headway.resilience import CheckpointStore

        steps = CheckpointStore(self.checkpoints).steps()
        if self.complete and steps:
            self.published(max(steps)).parent.mkdir(exist_ok=True)
            os.replace(self.model, self.published(max(steps)))

    def write_config(self, config: Config) -> None:
        """Replace `config.toml` in one step."""
        temporary = self.config_file.with_name(f".{self.config_file.name}.{os.getpid()}")
        temporary.write_text(config.to_toml(), encoding="utf-8")
        os.replace(temporary, self.config_file)

    def write_json(self, path: Path, value: Any) -> None:
        """Replace a small file in one step."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _unused(path: Path) -> Path:
    """Create and return `path`, or `path-2`, `path-3`, ...: two runs started in one second differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, candidate = 1, path
    while True:
        try:
            candidate.mkdir()
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        else:
            return candidate


class MetricsLog:
    """`metrics.jsonl` (a line per record, whole or absent) and the TensorBoard events beside it.

    A disk that fills up costs records, not the run: the first loss of each kind is told through
    `warn`. `after` drops the records beyond a step, which the resumed run writes again.
    """

    def __init__(self, run: RunFolder, after: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._events: Any = None
        self._events_failed = self._failed = False
        self._run = run
        self._first_step = after + 1
        if run.metrics_file.exists():
            kept = [line for step, line in _lines(run.metrics_file) if step <= after]
            temporary = run.metrics_file.with_name(".metrics.jsonl")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, run.metrics_file)
        self._file = run.metrics_file.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; its numbers become TensorBoard scalars."""
        start = self._file.tell()
        try:
            line = json.dumps(record).encode() + b"\n"
            if self._file.write(line) != len(line):
                raise OSError("disk full")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            if not self._failed:
                self._warn(f"metrics.jsonl is not being written: {error.strerror or error}")
            self._failed = True
        self._to_tensorboard(record)

    def _to_tensorboard(self, record: dict[str, Any]) -> None:
        if self._events_failed:
            return
        try:
            if self._events is None:
                # Imported after the first step: it takes a second that nobody should wait for.
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(self._run.tensorboard), purge_step=self._first_step)
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, record["step"])
        except Exception as error:
            self._events_failed = True
            self._warn(f"TensorBoard events are not being written: {' '.join(str(error).split())}")

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._events is not None and not self._events_failed:
            with contextlib.suppress(Exception):
                self._events.close()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(step, line) of each whole record; the torn last line of a killed run is left out."""
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                yield int(json.loads(line)["step"]), line
