"""Checkpoints and recovery."""

from headway.resilience.checkpoint import CheckpointError, CheckpointStore, Restored

__all__ = ["CheckpointError", "CheckpointStore", "Restored"]
