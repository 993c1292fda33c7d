"""How failures reach a person: one line on the error stream, and an exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

__all__ = ["FAILED", "INTERRUPTED", "NOT_HELD", "WRONG_INPUT", "fail", "failures"]

FAILED, WRONG_INPUT, NOT_HELD, INTERRUPTED = 1, 2, 3, 130


def fail(message: str, code: int) -> typer.Exit:
    """Print the line and return what to raise."""
    typer.secho(f"error: {message}", err=True, fg=typer.colors.RED)
    return typer.Exit(code)


@contextlib.contextmanager
def failures(quiet: bool = False) -> Iterator[None]:
    """Turn this package's own errors into one line and an exit code; anything else is a bug and keeps its traceback.

    `quiet` prints nothing: the process that started this one will.
    """
    from headway.config import ConfigError
    from headway.data import DataError

    try:
        yield
    except (ConfigError, DataError) as error:
        raise (typer.Exit(WRONG_INPUT) if quiet else fail(str(error), WRONG_INPUT)) from error
    except RuntimeError as error:
        from headway.resilience import CheckpointError
        from headway.train import TrainError

        if not isinstance(error, TrainError | CheckpointError):
            raise
        raise (typer.Exit(FAILED) if quiet else fail(str(error), FAILED)) from error
    except KeyboardInterrupt as error:
        raise fail("interrupted", INTERRUPTED) from error
