"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headway.data import Progress as DataProgress

__all__ = ["Display"]

_STAGES = {"tokenizer": "training the tokenizer", "tokens": "tokenising the corpus"}


class Display:
    """Shows progress and notes; a silent one (`quiet=True`, all ranks but the first) shows nothing."""

    def __init__(self, quiet: bool = False, log_every: int = 10, console: Console | None = None) -> None:
        self.console = console or Console(quiet=quiet, highlight=False)
        self.log_every = log_every
        self._live = self.console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._total = 0
        self._validation: float | None = None

    def note(self, text: str, style: str = "") -> None:
        """A line above the progress."""
        self.console.print(escape(text), style=style, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that a person should not miss."""
        self.note(f"warning: {text}", style="yellow")

    def data(self, progress: DataProgress) -> None:
        """Progress of the corpus's preparation."""
        if progress.stage != self._stage:
            self._close()
            self._stage = progress.stage
            text = _STAGES.get(progress.stage, progress.stage)
            if self._live:
                self._progress = Progress(
                    TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=self.console
                )
                self._progress.start()
                self._task = self._progress.add_task(text, total=progress.total)
            else:
                self.note(text)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=progress.done, total=progress.total)

    def start(self, done: int, total: int) -> None:
        """Begin showing the steps of training, or begin anew with another total."""
        self._close()
        if self._live:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
                refresh_per_second=4,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total, completed=done, numbers="first step: compiling")
        self._total = total

    def step(self, record: dict[str, Any]) -> None:
        """Show the record of a step, or of an evaluation."""
        self._validation = record.get("validation_loss", self._validation)
        if "loss" not in record:
            if not self._live:
                self.note(f"step {record['step']}/{self._total}  validation loss {record['validation_loss']:.4f}")
            return
        validation = "" if self._validation is None else f"  val {self._validation:.3f}"
        numbers = (
            f"loss {record['loss']:.3f}{validation}  {record['tokens_per_second']:,.0f} tokens/s"
            f"  {record['memory_mb'] / 1024:.1f} GB"
        )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record["step"], numbers=numbers)
        elif record["step"] % self.log_every == 0 or record["step"] in (1, self._total):
            left = (self._total - record["step"]) * record["step_seconds"]
            eta = time.strftime("%H:%M:%S" if left >= 3600 else "%M:%S", time.gmtime(left))
            self.note(f"step {record['step']}/{self._total}  {numbers}  lr {record['lr']:.2e}  left {eta}")

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._close()
