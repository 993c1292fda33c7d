"""`headway train`: the reference composition of the package's parts into one run.

`headway.train.loop` is the loop, to be read first; the other modules hold what it stands on: the
run's folder, the workers, the model, the display, the launcher and the report.
"""

from __future__ import annotations

__all__ = ["TrainError"]


class TrainError(RuntimeError):
    """A run that cannot start or go on; the message is one line for the user."""
